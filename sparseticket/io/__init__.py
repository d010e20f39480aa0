"""Tickets on disk: the file format, the mask codecs, sizes; import and export."""

from .accounting import Account, accounts
from .codecs import CODECS, decode_mask, encode_mask
from .export import export_dense, export_onnx, to_dense
from .foreign import ImportReport, import_masks
from .ticket import Ticket, TicketError

__all__ = [
    "CODECS",
    "Account",
    "ImportReport",
    "Ticket",
    "TicketError",
    "accounts",
    "decode_mask",
    "encode_mask",
    "export_dense",
    "export_onnx",
    "import_masks",
    "to_dense",
]
