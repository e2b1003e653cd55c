"""Measurements: python -m bench.step, bench.loader."""
