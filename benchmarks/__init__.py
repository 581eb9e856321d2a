"""Benchmarks, run from the repository root: ``python -m benchmarks.cpu``, ``python -m benchmarks.memory``,
``pytest benchmarks/bench_alrp.py``. None of this is installed with the package."""
