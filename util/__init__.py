"""What surrounds the training loop: configuration, processes, schedules, optimiser, metrics,
checkpoints.
"""
