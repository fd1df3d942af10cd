"""Measurements beside the other user-mode networks installed here. `python -m benchmarks --help`; `micro.py` times functions."""
