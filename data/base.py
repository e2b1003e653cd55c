"""What every data set offers, and the one error type for bad input.

Data sets list their images without torch, for the launcher: decoding brings it in."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from data.picture import Picture

# What Pillow is known to raise for a damaged file. Anything else is a bug and should show as one.
UNREADABLE = (
    OSError,  # includes PIL.UnidentifiedImageError and "image file is truncated"
    EOFError,
    SyntaxError,  # broken PNG chunks
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class DataError(ValueError):
    """The data or its settings are unusable; the message says what would be valid."""


class UnusableImages(DataError):
    """More unreadable ones than a run may leave out, or one that these settings cannot bring to 8
    bits."""

    exit_code = 2  # also after some steps: the same images would be met again


@contextmanager
def readable(name: object) -> Iterator[None]:
    """Inside, an image that cannot be read is named."""
    try:
        yield
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"cannot read {name}: {type(error).__name__}: {error}") from error


class DataTimeout(Exception):
    """An image has not come in time. Not a DataError, which would make it a bad image."""

    exit_code = 1  # as of a crash: the same command may succeed later


class ImageDataset:
    """Numbered images, with or without labels."""

    classes: list[str] | None = None
    labels: np.ndarray | None = None  # int64 [N]; -1 marks a single image without label
    others = ""  # what lies next to the images and is left out, such as "2 .heic, 1 .mov"

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> "Picture":
        """The picture in RGB (data/picture.py); raises one of UNREADABLE if that fails."""
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Where the image comes from, for messages to people."""
        raise NotImplementedError


class StoredImages(ImageDataset):
    """Images in files. build_dataset says how they are decoded (data/picture.py)."""

    decoder = "pil"
    max_value: float | None = None

    def contents(self, index: int) -> bytearray:
        """The file as it is stored."""
        raise NotImplementedError

    def load(self, index: int) -> "Picture":
        from data.picture import decode

        return decode(self.contents(index), self.decoder, self.max_value, self.describe(index))


class ArrayDataset(ImageDataset):
    """Images that all fit in memory: uint8 [N, H, W, 3]."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, classes: list[str]):
        self.name, self.images, self.classes = name, images, classes
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.images[index]))

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"


class LabelledImages(ImageDataset):
    """Those images of a data set that have a label."""

    def __init__(self, dataset: ImageDataset):
        labels = np.asarray(dataset.labels, dtype=np.int64)
        self.dataset, self.classes, self.others = dataset, dataset.classes, dataset.others
        self.positions = np.flatnonzero(labels >= 0)
        self.labels: np.ndarray = labels[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def load(self, index: int) -> "Picture":
        return self.dataset.load(int(self.positions[index]))

    def describe(self, index: int) -> str:
        return self.dataset.describe(int(self.positions[index]))


def count_images(dataset: ImageDataset) -> str:
    """How many, and what was left out."""
    left_out = f" (left out: {dataset.others})" if dataset.others else ""
    return f"{len(dataset)} images{left_out}"


def first_few(names: list[str], count: int = 5) -> str:
    """'a, b, c (and 7 more)': error messages stay readable however much is wrong."""
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown} (and {len(names) - count} more)"
