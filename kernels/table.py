"""Small tables of addresses and sizes in device memory, written without a copy from the host.

A kernel that works on many tensors reads where they are from such a table. Values travel as kernel
arguments: that needs no synchronisation, and a CUDA graph replays it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .variants import Variant

__all__ = ["VARIANTS", "device_table"]

_AT_ONCE = 64


@triton.jit(do_not_specialize=["count", *(f"v{i}" for i in range(_AT_ONCE))])
def _fill(
    p_out, count,
    v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64,
    v6: tl.int64, v7: tl.int64, v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64,
    v12: tl.int64, v13: tl.int64, v14: tl.int64, v15: tl.int64, v16: tl.int64, v17: tl.int64,
    v18: tl.int64, v19: tl.int64, v20: tl.int64, v21: tl.int64, v22: tl.int64, v23: tl.int64,
    v24: tl.int64, v25: tl.int64, v26: tl.int64, v27: tl.int64, v28: tl.int64, v29: tl.int64,
    v30: tl.int64, v31: tl.int64, v32: tl.int64, v33: tl.int64, v34: tl.int64, v35: tl.int64,
    v36: tl.int64, v37: tl.int64, v38: tl.int64, v39: tl.int64, v40: tl.int64, v41: tl.int64,
    v42: tl.int64, v43: tl.int64, v44: tl.int64, v45: tl.int64, v46: tl.int64, v47: tl.int64,
    v48: tl.int64, v49: tl.int64, v50: tl.int64, v51: tl.int64, v52: tl.int64, v53: tl.int64,
    v54: tl.int64, v55: tl.int64, v56: tl.int64, v57: tl.int64, v58: tl.int64, v59: tl.int64,
    v60: tl.int64, v61: tl.int64, v62: tl.int64, v63: tl.int64,
):  # fmt: skip
    """Store the first ``count`` values; their types are fixed, so that it compiles once."""
    values = (
        v0, v1, v2, v3, v4, v5, v6, v7,
        v8, v9, v10, v11, v12, v13, v14, v15,
        v16, v17, v18, v19, v20, v21, v22, v23,
        v24, v25, v26, v27, v28, v29, v30, v31,
        v32, v33, v34, v35, v36, v37, v38, v39,
        v40, v41, v42, v43, v44, v45, v46, v47,
        v48, v49, v50, v51, v52, v53, v54, v55,
        v56, v57, v58, v59, v60, v61, v62, v63,
    )  # fmt: skip
    for i in tl.static_range(64):
        if i < count:
            tl.store(p_out + i, values[i])


def device_table(values: list[int], device: torch.device) -> torch.Tensor:
    """int64 ``[len(values)]`` on ``device``."""
    table = torch.empty(len(values), dtype=torch.int64, device=device)
    for start in range(0, len(values), _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        _fill[(1,)](table[start:], len(part), *part, *[0] * (_AT_ONCE - len(part)), num_warps=1)
    return table


VARIANTS = [
    Variant(
        "table",
        _fill,
        {"p_out": "*i64", "count": "i32", **{f"v{i}": "i64" for i in range(_AT_ONCE)}},
        {},
        warps=1,
    )
]
