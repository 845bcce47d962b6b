"""Measurements of this package beside others; each module is a command: ``python -m benchmarks.update``."""
