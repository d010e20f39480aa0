"""Tickets on disk: the file format, the mask codecs, sizes."""

from .accounting import Account, accounts
from .codecs import CODECS, decode_mask, encode_mask
from .ticket import Ticket, TicketError

__all__ = [
    "CODECS",
    "Account",
    "Ticket",
    "TicketError",
    "accounts",
    "decode_mask",
    "encode_mask",
]
