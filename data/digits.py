"""Handwritten digits: 1,797 images of 8 x 8 pixels, no download.

digits.npz holds those of scikit-learn (load_digits, from the UCI repository's "Optical Recognition
of Handwritten Digits"): importing scikit-learn for them takes longer than a short training.
"""

from pathlib import Path

import numpy as np

from data.base import ArrayDataset

FILE = Path(__file__).with_name("digits.npz")
# The original order keeps the writers apart: a random split would put the same hand on both sides.
TRAIN_IMAGES = 1400
HIGHEST_VALUE = 16


def build_digits(split: str, data_path: str | None) -> ArrayDataset:
    """The first 1,400 images for training, the last 397 for evaluation; data_path is not used."""
    part = slice(None, TRAIN_IMAGES) if split == "train" else slice(TRAIN_IMAGES, None)
    with np.load(FILE) as digits:
        values, labels = digits["images"][part], digits["labels"][part]
    grey = np.rint(values * (255 / HIGHEST_VALUE)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    return ArrayDataset(f"digits/{split}", images, labels, list("0123456789"))
