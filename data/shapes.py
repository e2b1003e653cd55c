"""Shapes: drawn images whose class is the outline of an object, and nothing else.

A textured object lies on a textured background. Colours and textures are drawn without looking at
the class, so only a representation of form can tell the classes apart. Each image is a pure
function of (seed, split, index), at any size, with an exact mask of the object.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from data.masks import MaskedImages

# Each pixel is the mean of this many samples squared: soft edges.
SAMPLES_PER_PIXEL = 3
# Mean colours of object and background are at least this far apart (RGB in 0..1).
CONTRAST = 0.4


# ---- Outlines: is the point (x, y) inside? Each fits the unit disc. ------------------------------


def in_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five tips at radius 1, five notches at radius 0.45."""
    # Fold the plane onto one tenth of the star, where the outline is one straight line.
    angle = np.abs((np.arctan2(y, x) % (2 * math.pi / 5)) - math.pi / 5)
    radius = np.sqrt(x * x + y * y)
    along, across = radius * np.cos(math.pi / 5 - angle), radius * np.sin(math.pi / 5 - angle)
    notch_along, notch_across = 0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5)
    return (1 - along) * notch_across > across * (1 - notch_along)


def in_cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return (np.maximum(x, y) < 0.9) & (np.minimum(x, y) < 0.28)


def in_heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = 1.2 * x, 0.12 - 1.2 * y
    return (x * x + y * y - 1 + 0.25) ** 3 < x * x * y * y * y


OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: x * x + y * y < 0.81,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.7,
    "triangle": lambda x, y: (y < 0.5) & (math.sqrt(3) * np.abs(x) - y < 1),
    "star": in_star,
    "ring": lambda x, y: (x * x + y * y < 0.9) & (x * x + y * y > 0.3),
    "cross": in_cross,
    "crescent": lambda x, y: (x * x + y * y < 0.95) & ((x - 0.42) ** 2 + y * y > 0.55),
    "heart": in_heart,
    "half_disc": lambda x, y: (x * x + (y + 0.4) ** 2 < 0.8) & (y > -0.4),
    "bar": lambda x, y: (np.abs(x) < 0.95) & (np.abs(y) < 0.27),
}


# ---- Textures: a value in 0..1 for each pixel, from coordinates in 0..1. -------------------------


def stripes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    direction, phase = rng.uniform(0, 2 * math.pi, size=2).tolist()
    frequency = 2 * math.pi * rng.uniform(3, 9)
    across = math.cos(direction) * x + math.sin(direction) * y
    return 0.5 + 0.5 * np.sin(frequency * across + phase)


def checks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    direction, phase = rng.uniform(0, 2 * math.pi, size=2).tolist()
    frequency = math.pi * rng.uniform(4, 9)
    cosine, sine = math.cos(direction), math.sin(direction)
    wave = np.sin(frequency * (cosine * x + sine * y) + phase)
    wave = wave * np.sin(frequency * (cosine * y - sine * x) + phase)
    # A steep ramp instead of a step keeps the edges of the fields free of jagged pixels.
    return np.clip(0.5 + 4 * wave, 0, 1)


def spots(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    direction, phase = rng.uniform(0, 2 * math.pi, size=2).tolist()
    frequency = 2 * math.pi * rng.uniform(3, 7)
    cosine, sine = math.cos(direction), math.sin(direction)
    wave = np.cos(frequency * (cosine * x + sine * y) + phase)
    wave = wave + np.cos(frequency * (cosine * y - sine * x) + phase)
    return np.clip(2 * wave - 1, 0, 1)


def ramp(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    direction = rng.uniform(0, 2 * math.pi)
    return np.clip(0.5 + math.cos(direction) * (x - 0.5) + math.sin(direction) * (y - 0.5), 0, 1)


def clouds(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise: a few random values, enlarged."""
    cells = int(rng.integers(4, 12))
    values = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.clip(np.asarray(values.resize(x.shape[::-1], Image.Resampling.BICUBIC)), 0, 1)


def grain(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.random(x.shape, dtype=np.float32)


TEXTURES = (stripes, checks, spots, ramp, clouds, grain)


# ---- The data set. -------------------------------------------------------------------------------


class Shapes(MaskedImages):
    """`images` drawings of side `image_size`; classes take turns, so they are balanced."""

    classes = list(OUTLINES)

    def __init__(self, split: str, image_size: int, images: int, seed: int) -> None:
        self.split, self.image_size, self.seed = split, image_size, seed
        self.labels: np.ndarray = np.arange(images, dtype=np.int64) % len(OUTLINES)
        self.pixels = grid(image_size)
        self.samples = grid(image_size * SAMPLES_PER_PIXEL)

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self, index: int) -> str:
        return f"shapes/{self.split}[{index}]"

    def load(self, index: int) -> Image.Image:
        rng = self._generator(index)
        covered = self._coverage(index, rng)[..., None]
        behind, front = draw_palettes(rng)
        background = paint(*self.pixels, behind, rng)
        texture = paint(*self.pixels, front, rng)
        image = background + covered * (texture - background)
        return Image.fromarray(np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8))

    def mask(self, index: int) -> np.ndarray:
        """uint8 [H, W]: 0 is background, class + 1 is the object."""
        covered = self._coverage(index, self._generator(index))
        return np.where(covered > 0.5, self.labels[index] + 1, 0).astype(np.uint8)

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(self.split == "train"), index])

    def _coverage(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """The part of each pixel that the object covers: [H, W] in 0..1. Where the object lies is
        the first that is drawn for an image; lengths are fractions of its side."""
        radius = rng.uniform(0.2, 0.42)
        centre_x, centre_y = rng.uniform(radius, 1 - radius, size=2).tolist()
        angle = rng.uniform(0, 2 * math.pi)
        x, y = (self.samples[0] - centre_x) / radius, (self.samples[1] - centre_y) / radius
        cosine, sine = math.cos(angle), math.sin(angle)
        is_inside = OUTLINES[self.classes[self.labels[index]]]
        inside = is_inside(cosine * x + sine * y, cosine * y - sine * x)
        side = self.image_size
        blocks = inside.reshape(side, SAMPLES_PER_PIXEL, side, SAMPLES_PER_PIXEL)
        return blocks.mean(axis=(1, 3), dtype=np.float32)


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the pixel centres, each [side, side] in 0..1."""
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = np.meshgrid(centres, centres)
    return x, y


def draw_palettes(rng: np.random.Generator) -> np.ndarray:
    """Two colours for the background, two for the object: [2, 2, 3] in 0..1."""
    while True:
        palettes = rng.random((2, 2, 3), dtype=np.float32)
        behind, front = palettes.mean(axis=1)
        if np.linalg.norm(behind - front) > CONTRAST:
            return palettes


def paint(
    x: np.ndarray, y: np.ndarray, palette: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A random texture between the two colours of the palette: float32 [H, W, 3]."""
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    share = texture(x, y, rng).astype(np.float32)[..., None]
    return palette[0] + share * (palette[1] - palette[0])


def build_shapes(
    split: str,
    data_path: str | None,
    *,
    image_size: int = 64,
    train_images: int = 20000,
    eval_images: int = 2000,
    seed: int = 0,
) -> Shapes:
    """Nothing is read from disk: data_path is not used."""
    return Shapes(split, image_size, train_images if split == "train" else eval_images, seed)
