"""The GPU path, proved in numbered steps: `python -m benchmarks.gpu --help`."""
