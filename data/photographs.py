"""Photographs that come with scikit-image and scikit-learn (NOTICE says whose they are): crops of
them, and mosaics of their textures with exact masks.

The left part of each serves training, the right part evaluation. An image is a pure function of
(seed, split, index), and of integers or exactly rounded throughout, so that no library's version
and no processor changes a bit.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from data.base import DataError, ImageDataset
from data.masks import MaskedImages, opened

PARTS = {"train": (0, 55), "eval": (57, 100)}  # percent of the width, from and to
PHOTOGRAPHS = (
    *("skimage/data/astronaut.png", "skimage/data/brick.png", "skimage/data/camera.png"),
    *("skimage/data/chelsea.png", "skimage/data/clock_motion.png", "skimage/data/coffee.png"),
    *("skimage/data/coins.png", "skimage/data/grass.png", "skimage/data/gravel.png"),
    *("skimage/data/hubble_deep_field.jpg", "skimage/data/ihc.png", "skimage/data/page.png"),
    *("skimage/data/motorcycle_left.png", "skimage/data/retina.jpg", "skimage/data/rocket.jpg"),
    *("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
)
# A texture: where it is, the part of the photograph, how many times smaller.
TEXTURES: dict[str, tuple[str, tuple[int, int, int, int], int]] = {
    "brick": ("skimage/data/brick.png", (0, 0, 512, 512), 2),
    "grass": ("skimage/data/grass.png", (0, 0, 512, 512), 2),
    "gravel": ("skimage/data/gravel.png", (0, 0, 512, 512), 2),
    "tissue": ("skimage/data/ihc.png", (0, 0, 512, 512), 1),
    "stars": ("skimage/data/hubble_deep_field.jpg", (0, 0, 512, 512), 1),
    "fur": ("skimage/data/chelsea.png", (0, 60, 451, 300), 1),
    "print": ("skimage/data/page.png", (0, 0, 384, 191), 1),
    "metal": ("skimage/data/motorcycle_left.png", (200, 150, 741, 500), 1),
    "coins": ("skimage/data/coins.png", (0, 0, 384, 303), 1),
    "roofs": ("sklearn/datasets/images/china.jpg", (70, 100, 330, 330), 1),
    "leaves": ("sklearn/datasets/images/china.jpg", (340, 315, 640, 427), 1),
    "petals": ("sklearn/datasets/images/flower.jpg", (185, 95, 435, 350), 1),
}
REGIONS = (2, 4)  # of a mosaic, at least and at most
RADIUS = 12  # contrast is relative to the square of pixels up to so far away
LEAST_CONTRAST = 4  # levels: what is nearly blank stays so
CLIP = 2.5  # deviations from the mean that become black and white


def installed(name: str) -> Path:
    """A file of an installed package, which is not imported: that takes a second."""
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"{name} is not installed: expected the packages of requirements.txt")
    return Path(spec.origin).parent / rest


def read(name: str, mode: str) -> np.ndarray:
    with opened(installed(name)) as image:
        return np.asarray(image.convert(mode))


def part_of(pixels: np.ndarray, split: str) -> np.ndarray:
    first, last = (pixels.shape[1] * percent // 100 for percent in PARTS[split])
    return pixels[:, first:last]


def reduced(pixels: np.ndarray, times: int) -> np.ndarray:
    """So many times smaller: each pixel is the mean of a square, rounded."""
    height, width = pixels.shape[0] // times, pixels.shape[1] // times
    squares = pixels[: height * times, : width * times]
    squares = squares.reshape(height, times, width, times, *pixels.shape[2:])
    sums = squares.sum(axis=(1, 3), dtype=np.int64)
    return ((sums + times**2 // 2) // times**2).astype(np.uint8)


def box_sums(values: np.ndarray) -> np.ndarray:
    """int64 [H, W]: of the square around each pixel; beyond its edges the image is mirrored."""
    sums = np.pad(values, (RADIUS + 1, RADIUS), mode="symmetric")
    for _ in range(2):
        sums = sums.cumsum(axis=0)
        sums = (sums[2 * RADIUS + 1 :] - sums[: -2 * RADIUS - 1]).T
    return sums


def contrast_normalised(grey: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: each pixel's distance from the mean around it, in deviations around it."""
    values, count = grey.astype(np.int64), (2 * RADIUS + 1) ** 2
    sums = box_sums(values)
    deviation = np.sqrt(count * box_sums(values**2) - sums**2)  # times count, as the distance
    scores = (count * values - sums) / (deviation + count * LEAST_CONTRAST)
    return (255 / (2 * CLIP) * (scores.clip(-CLIP, CLIP) + CLIP)).astype(np.uint8)


def mirrored(pixels: np.ndarray, side: int) -> np.ndarray:
    """Continued to at least side x side by its mirror images."""
    missing = [(0, max(0, side - length)) for length in pixels.shape[:2]]
    return np.pad(pixels, missing + [(0, 0)] * (pixels.ndim - 2), mode="symmetric")


def window(rng: np.random.Generator, pixels: np.ndarray, side: int) -> np.ndarray:
    top, left = (int(rng.integers(length - side + 1)) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


@cache  # the training and the evaluation of a run, and its copies
def photographs(split: str) -> list[np.ndarray]:
    return [part_of(read(name, "RGB"), split) for name in PHOTOGRAPHS]


@cache
def textures(split: str) -> list[np.ndarray]:
    """The parts are normalised each for itself: nothing of the one gets into the other."""
    found = []
    for name, (left, top, right, bottom), times in TEXTURES.values():
        grey = reduced(read(name, "L")[top:bottom, left:right], times)
        found.append(contrast_normalised(part_of(grey, split)))
    return found


class Photographs(ImageDataset):
    """Square crops at random places and of random size, made smaller by a whole number."""

    name = "photographs"
    sources: Callable[[str], list[np.ndarray]] = staticmethod(photographs)

    def __init__(
        self,
        split: str,
        data_path: str | None,
        *,
        image_size: int = 96,
        train_images: int = 6000,
        eval_images: int = 400,
        seed: int = 0,
    ) -> None:
        """data_path is not used."""
        self.split, self.image_size, self.seed = split, image_size, seed
        self.images = train_images if split == "train" else eval_images
        self.pictures = [mirrored(pixels, image_size) for pixels in self.sources(split)]
        if self.classes:
            self.labels = np.arange(self.images, dtype=np.int64) % len(self.classes)

    def __len__(self) -> int:
        return self.images

    def describe(self, index: int) -> str:
        return f"{self.name}/{self.split}[{index}]"

    def generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(self.split == "train"), index])

    def load(self, index: int) -> Image.Image:
        rng = self.generator(index)
        pixels = self.pictures[rng.integers(len(self.pictures))]
        times = int(rng.integers(1, min(pixels.shape[:2]) // self.image_size + 1))
        return Image.fromarray(reduced(window(rng, pixels, times * self.image_size), times))


class Textures(Photographs, MaskedImages):
    """Each pixel shows the texture of the nearest of a few random points. The class of an image,
    which its mask knows best, is the texture in its middle."""

    name = "textures"
    sources = staticmethod(textures)
    classes = list(TEXTURES)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.mosaic(index)[0]).convert("RGB")

    def mask(self, index: int) -> np.ndarray:
        """uint8 [H, W]: positions in `classes`."""
        return self.mosaic(index)[1]

    def mosaic(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image, grey, and its mask; uint8 [H, W]"""
        rng, side, label = self.generator(index), self.image_size, index % len(TEXTURES)
        points = rng.integers(side, size=(rng.integers(REGIONS[0], REGIONS[1] + 1), 2))
        y, x = np.ogrid[:side, :side]
        regions = np.stack([(y - row) ** 2 + (x - column) ** 2 for row, column in points])
        regions = regions.argmin(axis=0)
        others = np.delete(np.arange(len(TEXTURES), dtype=np.uint8), label)
        shown = rng.permutation(others)[: len(points)]
        shown[regions[side // 2, side // 2]] = label
        windows = np.stack([window(rng, self.pictures[number], side) for number in shown])
        return np.take_along_axis(windows, regions[None], axis=0)[0], shown[regions]
