"""Data sets, image transforms and the loaders that bring batches to the device."""
