"""Every op of the library, registered with torch under ``torch.ops.sparseticket``."""

from ._dispatch import Choice, call, explain_op, on_plain_cpu, signed64
from .apply_mask import apply_mask
from .conv2d_flip import conv2d_flip
from .conv2d_taps import conv2d_taps
from .gather_live import gather_live
from .mask_ops import mask_ops
from .masked_conv2d import masked_conv2d
from .masked_linear import masked_linear
from .masked_step import masked_step
from .pack_mask import pack_mask
from .popup_conv2d import popup_conv2d
from .popup_linear import popup_linear
from .popup_linear_ds import popup_linear_ds
from .popup_step import bind_step, popup_step
from .popup_weight import popup_weight
from .regenerate import regenerate
from .regenerate_many import regenerate_many
from .rice_decode import rice_decode
from .rice_encode import rice_encode
from .scatter_live import scatter_live
from .select_mask import select_mask
from .sign_words import sign_words
from .sparse_conv2d import compile_conv2d, release_code, sparse_conv2d
from .sparse_conv2d_dw import sparse_conv2d_dw
from .sparse_linear import sparse_linear
from .sparse_linear_dw import sparse_linear_dw
from .sparse_linear_dx import sparse_linear_dx
from .sparse_pattern import device_pattern, sparse_pattern
from .subset_sum import subset_sum
from .ticket_codes import ticket_codes
from .ticket_conv2d import ticket_conv2d
from .ticket_linear import ticket_linear
from .unpack_mask import unpack_mask

__all__ = [
    "Choice",
    "apply_mask",
    "bind_step",
    "call",
    "compile_conv2d",
    "conv2d_flip",
    "conv2d_taps",
    "device_pattern",
    "explain_op",
    "gather_live",
    "mask_ops",
    "masked_conv2d",
    "masked_linear",
    "masked_step",
    "on_plain_cpu",
    "pack_mask",
    "popup_conv2d",
    "popup_linear",
    "popup_step",
    "popup_linear_ds",
    "popup_weight",
    "regenerate",
    "regenerate_many",
    "release_code",
    "rice_decode",
    "rice_encode",
    "scatter_live",
    "select_mask",
    "sign_words",
    "signed64",
    "sparse_conv2d",
    "sparse_conv2d_dw",
    "sparse_linear",
    "sparse_linear_dw",
    "sparse_linear_dx",
    "sparse_pattern",
    "subset_sum",
    "ticket_codes",
    "ticket_conv2d",
    "ticket_linear",
    "unpack_mask",
]
