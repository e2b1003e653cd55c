"""Handwritten digits that come with scikit-learn: 1,797 images of 8 x 8 pixels, no download."""

import numpy as np

from data.base import ArrayDataset

# The original order keeps the writers apart: a random split would put the same hand on both sides.
TRAIN_IMAGES = 1400
HIGHEST_VALUE = 16


def build_digits(split: str, data_path: str | None) -> ArrayDataset:
    """The first 1,400 images for training, the last 397 for evaluation; data_path is not used."""
    from sklearn.datasets import load_digits

    part = slice(None, TRAIN_IMAGES) if split == "train" else slice(TRAIN_IMAGES, None)
    digits = load_digits()
    grey = np.rint(digits.images[part] * (255 / HIGHEST_VALUE)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    return ArrayDataset(f"digits/{split}", images, digits.target[part], list("0123456789"))
