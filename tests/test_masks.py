"""Data sets with masks: which files belong together, and what is said where they do not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import DataError, build_dataset
from data.masks import IGNORE, WithMasks
from data.transforms import EvalTransform, MaskTransform
from tests.maps_by_hand import central_mask, regions

PALETTE = [0, 0, 0, 128, 0, 0, *range(253), *range(253), *range(253), 224, 224, 192]


def save(path: Path, array: np.ndarray, palette: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array.astype(np.uint8))
    if array.ndim == 2 and palette:
        image.putpalette(PALETTE)
    image.save(path)


def blocks(seed: int, side: int = 24, patch: int = 4, classes: int = 2):
    """An image of noisy patches whose colour tells the class (0 red, 1 green, 2 blue), its mask."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((side // patch, side // patch), np.uint8)
    top, left = rng.integers(0, len(cells) - 2, 2)
    cells[top : top + 3, left : left + 3] = 1 + seed % (classes - 1)
    mask = cells.repeat(patch, axis=0).repeat(patch, axis=1)
    image = rng.integers(0, 20, (side, side, 3))
    return image + 200 * (mask[..., None] == np.arange(3)), mask


def write_blocks(root: Path, split: str = "val", count: int = 5, classes: int = 2) -> Path:
    for number in range(count):
        image, mask = blocks(number + (100 if split == "train" else 0), classes=classes)
        save(root / "images" / split / f"{number}.png", image)
        save(root / "masks" / split / f"{number}.png", mask)
    return root


def write_voc(root: Path) -> np.ndarray:
    image, mask = blocks(0)
    mask[0, :5] = IGNORE
    save(root / "JPEGImages" / "2007_1.jpg", image)
    save(root / "SegmentationClass" / "2007_1.png", mask)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_1\n")
    return mask


def test_masks_belong_to_their_images(tmp_path):
    write_blocks(tmp_path, "val", 3)
    write_blocks(tmp_path, "train", 2)
    train, evaluation = (build_dataset("masks", split, tmp_path) for split in ("train", "eval"))
    assert (len(train), len(evaluation)) == (2, 3)
    for dataset, first in ((train, 100), (evaluation, 0)):
        for index in range(len(dataset)):
            image, mask = blocks(first + index)
            assert np.array_equal(np.asarray(dataset.load(index)), image)
            assert np.array_equal(dataset.mask(index), mask)


@pytest.mark.parametrize("palette", [True, False])
def test_folders_without_splits_serve_both(tmp_path, palette):
    image, mask = blocks(0)
    save(tmp_path / "images" / "deep" / "a.jpg", image)
    save(tmp_path / "masks" / "deep" / "a.png", mask, palette)
    for split in ("train", "eval"):
        dataset = build_dataset("masks", split, tmp_path)
        assert len(dataset) == 1 and np.array_equal(dataset.mask(0), mask)


def test_voc_masks_are_the_numbers_behind_the_colours(tmp_path):
    mask = write_voc(tmp_path)
    dataset = build_dataset("voc", "eval", tmp_path)
    assert np.array_equal(dataset.mask(0), mask)
    with Image.open(tmp_path / "SegmentationClass" / "2007_1.png") as image:
        assert image.mode == "P"
        colours = np.asarray(image.convert("RGB"))
    # As published: 0 black, 1 aeroplane (128, 0, 0), 255 the border (224, 224, 192).
    assert {tuple(c) for c in colours[mask == 1].tolist()} == {(128, 0, 0)}
    assert {tuple(c) for c in colours[mask == IGNORE].tolist()} == {(224, 224, 192)}


def test_masks_are_cropped_like_their_images(tmp_path):
    """A mask that is the image's own red channel stays so, where nothing is blended."""
    values = np.arange(30 * 20).reshape(30, 20) % 250
    save(tmp_path / "images" / "a.png", np.stack([values] * 3, axis=2))
    save(tmp_path / "masks" / "a.png", values)
    pair = WithMasks(build_dataset("masks", "eval", tmp_path)).load(0)
    cropped = MaskTransform(side=16, crop_ratio=0.8)(pair)  # the shorter side stays 20 pixels
    assert cropped.shape == (4, 16, 16)
    assert torch.equal(cropped[0], cropped[3])


@pytest.mark.parametrize("width, height, crop_ratio", [(30, 30, 1), (45, 31, 0.8)])
def test_a_smaller_mask_holds_classes_of_the_larger_one(width, height, crop_ratio):
    """Blended, classes 2 and 9 would make others."""
    mask = regions(0, width, height, [2, 9, IGNORE])
    found = EvalTransform(16, crop_ratio).mask(Image.fromarray(mask))[0].numpy()
    assert set(found.ravel().tolist()) == {2, 9, IGNORE}
    assert np.array_equal(found, central_mask(mask, 16, round(16 / crop_ratio)))


def test_bad_voc_folders_are_named(tmp_path):
    write_voc(tmp_path)
    with pytest.raises(DataError, match="Segmentation/train.txt: expected the names of"):
        build_dataset("voc", "train", tmp_path)
    names = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    names.write_text("2007_1\n2007_2\n")
    with pytest.raises(DataError, match="these images are missing: .*2007_2.jpg"):
        build_dataset("voc", "eval", tmp_path)
    names.write_text("\n")
    with pytest.raises(DataError, match="val.txt: expected the names of"):
        build_dataset("voc", "eval", tmp_path)
