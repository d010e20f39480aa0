"""Triton kernels, one file per op: kernel(s) and a launcher; imported as sparseticket.kernels."""

if __name__ != "sparseticket.kernels":
    raise ImportError(
        f"these kernels were imported as {__name__!r}; import sparseticket.kernels instead"
    )
