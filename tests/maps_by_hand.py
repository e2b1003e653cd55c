"""Pictures and masks cut and resized by hand, for what whole evaluations are compared with."""

import numpy as np
from PIL import Image
from torch import Tensor


def blurred_noise(seed: int, width: int, height: int) -> Image.Image:
    """A picture in which neighbouring pixels are alike, as in photographs."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    image = Image.fromarray(noise.astype(np.uint8))
    return image.resize((width, height), Image.Resampling.BILINEAR)


def regions(seed: int, width: int, height: int, numbers: list[int]) -> np.ndarray:
    """A mask uint8 [H, W] of regions with ragged edges, with each of these numbers somewhere."""
    rng = np.random.default_rng(seed)
    points = rng.random((2 * len(numbers), 2)) * (height, width)
    y, x = np.mgrid[:height, :width]
    distances = [np.hypot(y - row, x - column) for row, column in points]
    distances = np.array(distances) + rng.random((len(points), height, width))
    return np.array(2 * numbers, np.uint8)[distances.argmin(axis=0)]


def resized_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """The shorter side becomes `shorter`, the longer one is rounded down."""
    least = min(width, height)
    return shorter * width // least, shorter * height // least


def central(values: np.ndarray, side: int) -> np.ndarray:
    """[H, W, ...] -> [side, side, ...]"""
    top, left = (round((length - side) / 2) for length in values.shape[:2])
    return values[top : top + side, left : left + side]


def central_picture(image: Image.Image, side: int, shorter: int) -> np.ndarray:
    """uint8 [side, side, 3]"""
    image = image.resize(resized_size(*image.size, shorter), Image.Resampling.BICUBIC)
    return central(np.array(image), side)


def nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W] -> [height, width]: each pixel takes the value at its middle."""
    rows = [(2 * row + 1) * values.shape[0] // (2 * height) for row in range(height)]
    columns = [(2 * column + 1) * values.shape[1] // (2 * width) for column in range(width)]
    return values[rows][:, columns]


def central_mask(mask: np.ndarray, side: int, shorter: int) -> np.ndarray:
    """uint8 [side, side]"""
    width, height = resized_size(mask.shape[1], mask.shape[0], shorter)
    return central(nearest(mask, height, width), side)


def enlarged(maps: np.ndarray, times: int) -> np.ndarray:
    """[rows, columns, C] -> [times * rows, times * columns, C]: linear between the middles of the
    cells, constant outside of them."""
    for axis in (0, 1):
        maps = np.apply_along_axis(enlarged_line, axis, maps, times)
    return maps


def enlarged_line(values: np.ndarray, times: int) -> np.ndarray:
    places = (np.arange(len(values) * times) + 0.5) / times - 0.5
    return np.interp(places, np.arange(len(values)), values)


def patches_of(images: Tensor, side: int) -> Tensor:
    """The pixels of patches, row by row: [N, 3, H, W] -> [N, L, 3 side^2], colours last."""
    cells = images.unfold(2, side, side).unfold(3, side, side)
    return cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
