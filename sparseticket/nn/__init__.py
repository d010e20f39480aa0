"""Drop-in sparse modules and the conversion of whole models."""

from ._sparse import (
    Options,
    Selection,
    SparseModule,
    attach,
    gain_of,
    reselect,
    selections,
    update_masks,
)
from .attention import SparseMultiheadAttention, close_attention_, open_attention_
from .conv1d import SparseConv1d
from .conv2d import SparseConv2d
from .conv_transpose2d import SparseConvTranspose2d
from .convert import Report, SparsityConfig, densify_, explain, sparsify_, to_form_
from .embedding import SparseEmbedding
from .frozen import FrozenPattern
from .fuse import fuse_batchnorm_
from .linear import SparseLinear
from .recipe import WeightRecipe
from .score_layer import (
    ScoreConv1d,
    ScoreConv2d,
    ScoreConvTranspose2d,
    ScoreLayer,
    ScoreLinear,
    WeightRule,
    tickets_,
)
from .superposed import (
    Plane,
    Superposed,
    SuperposedConv1d,
    SuperposedConv2d,
    SuperposedConvTranspose2d,
    SuperposedLinear,
)
from .tuning import Tuned, tune

__all__ = [
    "FrozenPattern",
    "Options",
    "Plane",
    "Report",
    "ScoreConv1d",
    "ScoreConv2d",
    "ScoreConvTranspose2d",
    "ScoreLayer",
    "ScoreLinear",
    "Selection",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConvTranspose2d",
    "SparseEmbedding",
    "SparseLinear",
    "SparseModule",
    "SparseMultiheadAttention",
    "SparsityConfig",
    "Superposed",
    "SuperposedConv1d",
    "SuperposedConv2d",
    "SuperposedConvTranspose2d",
    "SuperposedLinear",
    "Tuned",
    "WeightRecipe",
    "WeightRule",
    "attach",
    "close_attention_",
    "densify_",
    "explain",
    "fuse_batchnorm_",
    "gain_of",
    "open_attention_",
    "reselect",
    "selections",
    "sparsify_",
    "tickets_",
    "to_form_",
    "tune",
    "update_masks",
]
