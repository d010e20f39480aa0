"""Benchmarks: ``python -m bench.run`` (kernels), ``python -m bench.accuracy`` (searches)."""
