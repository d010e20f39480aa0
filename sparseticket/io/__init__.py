"""Tickets on disk: the file format and the mask codecs."""

from .codecs import CODECS, decode_mask, encode_mask
from .ticket import Ticket, TicketError

__all__ = ["CODECS", "Ticket", "TicketError", "decode_mask", "encode_mask"]
