"""Measurements: python -m bench.step, bench.loader, bench.train."""
