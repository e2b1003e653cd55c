"""Evaluations: what a backbone has learned, measured by the protocols of the field."""
