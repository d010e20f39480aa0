"""Drop-in sparse modules and the conversion of whole models."""

from ._sparse import Options, Selection, SparseModule, attach, reselect, selections, update_masks
from .conv2d import SparseConv2d
from .convert import Report, SparsityConfig, densify_, explain, sparsify_, to_form_
from .fuse import fuse_batchnorm_
from .linear import SparseLinear
from .recipe import WeightRecipe

__all__ = [
    "Options",
    "Report",
    "Selection",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "SparsityConfig",
    "WeightRecipe",
    "attach",
    "densify_",
    "explain",
    "fuse_batchnorm_",
    "reselect",
    "selections",
    "sparsify_",
    "to_form_",
    "update_masks",
]
