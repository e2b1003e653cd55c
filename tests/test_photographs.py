"""Photographs that come with packages: where each pixel is from, and that the splits keep apart."""

import sys
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from data import photographs
from data.base import DataError
from data.datasets import build_dataset
from data.photographs import PHOTOGRAPHS, TEXTURES, contrast_normalised, reduced

PACKAGES = {name: Path(find_spec(name).origin).parent for name in ("skimage", "sklearn")}


@pytest.fixture
def fresh():
    """Nothing is remembered of other files, and nothing is left behind."""
    functions = (photographs.textures, photographs.photographs)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def stored(name: str, mode: str = "RGB") -> np.ndarray:
    package, _, rest = name.partition("/")
    return np.asarray(Image.open(PACKAGES[package] / rest).convert(mode)).astype(int)


def own_part(pixels: np.ndarray, split: str) -> np.ndarray:
    width = pixels.shape[1]
    return pixels[:, : width * 55 // 100] if split == "train" else pixels[:, width * 57 // 100 :]


def places(shown: np.ndarray, inside: np.ndarray, source: np.ndarray) -> int:
    """At how many places of the source its pixels are those that `inside` marks."""
    windows = sliding_window_view(source, shown.shape)
    pixels = np.random.default_rng(0).permutation(np.argwhere(inside))
    candidates = np.argwhere(windows[:, :, *pixels[0]] == shown[*pixels[0]])
    for y, x in pixels[1:]:
        if len(candidates) == 0:
            break
        candidates = candidates[windows[*candidates.T, y, x] == shown[y, x]]
    return len(candidates)


@pytest.mark.parametrize("split, other, count", [("train", "eval", 12), ("eval", "train", 3)])
def test_a_mask_tells_the_texture_of_each_pixel(split, other, count):
    dataset = build_dataset("textures", split, options={"image_size": 64})
    sources, others = dataset.pictures, photographs.textures(other)
    seen = set()
    for index in range(count):
        image, mask = np.asarray(dataset.load(index)), dataset.mask(index)
        assert image.shape == (64, 64, 3) and (image == image[..., :1]).all()
        assert mask.shape == (64, 64) and mask.dtype == np.uint8
        numbers = np.unique(mask).tolist()
        rng = dataset.generator(index)
        points = rng.integers(64, size=(rng.integers(2, 5), 2))
        assert len(numbers) == len(points) and mask[32, 32] == dataset.labels[index] == index
        for pixel in [*np.ndindex(64, 64)][::7]:
            distances = np.square(points - pixel).sum(axis=1)
            nearest = points[distances == distances.min()]
            assert mask[pixel] in mask[*nearest.T]
        for number in numbers:
            inside = mask == number
            assert places(image[..., 0], inside, sources[number]) >= 1
            if inside.sum() > 100:  # enough to tell from the others
                seen.add(number)
                wrong = [source for n, source in enumerate(sources) if n != number]
                for source in (*wrong, *others):
                    if min(source.shape) >= 64:
                        assert places(image[..., 0], inside, source) == 0
    assert len(seen) == 12 or count < 12


@pytest.mark.parametrize("split", ["train", "eval"])
def test_textures_are_their_parts_with_contrast_normalised(split):
    for (name, box, times), found in zip(
        TEXTURES.values(), photographs.textures(split), strict=True
    ):
        grey = Image.fromarray(stored(name, "L").astype(np.uint8)).crop(box)
        part = own_part(np.asarray(grey.reduce(times)).astype(int), split)
        assert found.shape == part.shape and found.dtype == np.uint8
        around = sliding_window_view(np.pad(part, 12, mode="symmetric"), (25, 25))
        for y, x in np.random.default_rng(0).integers(0, part.shape, (50, 2)):
            square = around[y, x]
            score = (part[y, x] - square.mean()) / (square.std() + 4)
            assert abs(found[y, x] - 255 * (np.clip(score, -2.5, 2.5) + 2.5) / 5) < 1 + 1e-9


def test_textures_of_one_photograph_lie_apart():
    for (name, first, _), (other, second, _) in combinations(TEXTURES.values(), 2):
        corners = zip(first[:2], second[:2], strict=True), zip(first[2:], second[2:], strict=True)
        (left, top), (right, bottom) = (map(max, corners[0]), map(min, corners[1]))
        assert name != other or left >= right or top >= bottom


def test_a_blank_texture_is_grey():
    assert (contrast_normalised(np.full((9, 7), 200, np.uint8)) == 127).all()


def test_crops_of_photographs_are_whole_numbers_smaller():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    found = reduced(pixels, 3)
    assert found.shape == (2, 3, 3)
    for row, column in np.ndindex(2, 3):
        square = pixels[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert np.abs(found[row, column] - square.mean(axis=(0, 1))).max() <= 0.5


@pytest.mark.parametrize("split, images, loaded", [("train", 6000, 10), ("eval", 400, 2)])
def test_photographs_are_crops_of_the_files(split, images, loaded):
    dataset = build_dataset("photographs", split, options={"image_size": 100})
    assert dataset.labels is None and len(dataset) == images
    parts = [own_part(stored(name), split) for name in PHOTOGRAPHS]
    colours = [part.astype(int) @ [1, 256, 65536] for part in parts]
    everywhere, found = np.ones((100, 100), bool), set()
    for index in range(loaded):
        crop = np.asarray(dataset.load(index)).astype(int) @ [1, 256, 65536]
        assert crop.shape == (100, 100)
        fitting = [n for n, part in enumerate(colours) if places(crop, everywhere, part)]
        found |= set(fitting)
    assert len(found) > 2 or split == "eval"  # the other crops are made smaller


@pytest.mark.parametrize("name", ["textures", "photographs"])
def test_windows_never_cross_from_into_the_other(name, monkeypatch, fresh):
    """Photographs whose left and right are unlike each other in every way."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (300, 256))
    modes = {"L": ramp, "RGB": np.stack([ramp] * 3, axis=2)}
    monkeypatch.setattr(photographs, "read", lambda name, mode: modes[mode])
    monkeypatch.setattr(photographs, "contrast_normalised", lambda grey: grey)
    monkeypatch.setattr(photographs, "TEXTURES", dict.fromkeys(TEXTURES, ("", (0, 0, 256, 300), 1)))
    for split, least, most in (("train", 0, 139), ("eval", 145, 255)):
        dataset = build_dataset(name, split, options={"image_size": 20})
        images = np.stack([np.asarray(dataset.load(index)) for index in range(100)])
        assert least <= images.min() < least + 5 and most - 5 < images.max() <= most


@pytest.mark.parametrize("name", ["textures", "photographs"])
def test_images_are_a_function_of_seed_split_and_index(name):
    def image(split="train", index=0, **options):
        return build_dataset(name, split, options=options).load(index)

    first = image().tobytes()
    assert image(train_images=5, eval_images=2).tobytes() == first
    for other in (image(seed=1), image("eval"), image(index=12)):
        assert other.tobytes() != first
    assert image(image_size=300).size == (300, 300)  # more than some photographs have


def test_the_packages_are_found_and_not_imported(monkeypatch, fresh):
    for name in PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("textures", "photographs"):
        build_dataset(name, "eval").load(0)
    assert not PACKAGES.keys() & sys.modules.keys()


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="^skimage/data/page.png is not installed: expected"):
        photographs.read("skimage/data/page.png", "L")
