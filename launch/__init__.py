"""What happens before and around a run: imports no torch, local.py excepted."""
