"""Faults that `scripts/reliability.py` injects: one file per family of faults, each with its `ROWS`."""
