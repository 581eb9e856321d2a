"""Benchmarks, installed as ``alrp_triton.benchmarks`` and run by ``alrp-triton bench``, or from the repository root:
``python -m benchmarks.suite``, ``python -m benchmarks.cpu``, ``pytest benchmarks/bench_suite.py``."""
