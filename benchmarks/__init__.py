"""Measurements that are repeated by hand: `python -m benchmarks.<name> --help`. Each prints and writes one report."""
