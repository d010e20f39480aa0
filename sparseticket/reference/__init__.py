"""Plain torch oracles: slow, obvious, float64-capable. One file per op, same names and arguments.

Tests and benchmarks compare against these, and tensors on a device without a kernel run on them.
"""
