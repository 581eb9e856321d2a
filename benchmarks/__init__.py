"""Benchmarks, installed as ``alrp_triton.benchmarks`` and run by ``alrp-triton bench``, or from the repository root:
``python -m benchmarks.run``; docs/design/performance.md lists all commands."""
