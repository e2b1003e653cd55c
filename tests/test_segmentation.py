"""Segmentation: the measures against slow independent ones, images whose answer is known, bad
input, and one process against two. Whole runs: tests/test_segmentation_by_hand.py."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.base import DataError
from data.masks import IGNORE
from eval import segmentation
from eval.common import run_joined
from eval.segmentation import class_counts, matched_miou, score_image
from launch.config import ConfigError, compose_config
from launch.validate import check_config
from tests.backbones import digits_checkpoint
from tests.runs import run_together
from tests.test_masks import blocks, save, write_blocks
from util.distributed import Ranks

# ---- The measures. -------------------------------------------------------------------------------


def random_maps(seed: int, labels: int, segments: int):
    """Labels of 42 pixels, and segments that agree with them in part."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, labels, 42)
    return truth, np.where(rng.random(42) < 0.5, truth, rng.integers(0, segments, 42)) % segments


def slow_matched_miou(truth: np.ndarray, found: np.ndarray) -> float:
    """The best of all ways to give each label its own segment, or none."""
    labels = [truth == value for value in np.unique(truth)]
    parts = [found == value for value in np.unique(found)]
    parts += [np.zeros(truth.shape, bool) for _ in labels]  # no segment
    overlaps = np.array([[(a & b).sum() / (a | b).sum() for b in parts] for a in labels])
    ways = itertools.permutations(range(len(parts)), len(labels))
    return max(overlaps[range(len(labels)), way].mean() for way in ways)


@pytest.mark.parametrize("seed, labels, segments", [(0, 2, 2), (1, 3, 5), (2, 4, 2), (3, 1, 3)])
def test_matched_miou_is_the_best_of_all_assignments(seed, labels, segments):
    truth, found = random_maps(seed, labels, segments)
    ours = matched_miou(truth, found)
    assert ours == pytest.approx(slow_matched_miou(truth, found), abs=1e-12)


def test_matched_miou_by_hand():
    truth = np.array([0, 0, 0, 1, 0, 0, 0, 1, 2, 2, 1])
    found = np.array([5, 5, 5, 5, 5, 5, 5, 3, 5, 5, 3])
    # 0 gets 5: 6 / 9 pixels. 1 gets 3: 2 / 3. 2 gets nothing.
    assert matched_miou(truth, found) == pytest.approx((6 / 9 + 2 / 3 + 0) / 3)


def test_pixels_without_a_class_are_left_out():
    """Two patches are two segments, and one is unlabelled but for one of its pixels."""
    cfg = compose_config("segmentation", ["segments=[2,truth]"])
    mask = np.array([[1, 1, IGNORE, IGNORE], [1, 1, IGNORE, 1]], np.uint8)
    one_class = score_image(cfg, np.eye(2), (1, 2), mask)
    assert one_class == pytest.approx([1, 4 / 5, 0, 1, 1])
    mask[1, 3] = 4
    assert score_image(cfg, np.eye(2), (1, 2), mask) == pytest.approx([2, 1, 1, 1, 1])
    assert score_image(cfg, np.eye(2), (1, 2), np.full_like(mask, IGNORE)) == [0]


def test_class_counts_of_patches():
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 3, (2, 4, 6)).astype(np.uint8)
    masks[rng.random(masks.shape) < 0.2] = IGNORE
    counts = class_counts(torch.from_numpy(masks), (2, 3), 3)
    for image, row, column, number in itertools.product(range(2), range(2), range(3), range(3)):
        cell = masks[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert counts[image, 3 * row + column, number] == (cell == number).sum()


# ---- Whole evaluations. --------------------------------------------------------------------------

PIXELS = ["dataset=masks", "features=pixels", "segments=[2]"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return digits_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def evaluate(checkpoint: Path, tmp_path: Path, *overrides: str) -> dict:
    """In this process. -> its report"""
    settings = [f"pretrained={checkpoint}", f"output_dir={tmp_path}", "num_workers=0"]
    cfg = compose_config("segmentation", [*settings, *overrides])
    alone = Ranks(0, 1, torch.device("cpu"))
    return run_joined(cfg, alone, segmentation.evaluate).report


def test_other_numbers_of_segments_are_worse(checkpoint, tmp_path):
    write_blocks(tmp_path / "data")
    found = evaluate(
        checkpoint, tmp_path, *PIXELS, f"data_path={tmp_path / 'data'}", "segments=[1,2,6]"
    )
    results = found["results"]
    # One segment: the background's 27 of 36 patches, and nothing for the object.
    assert results["miou_1"] == pytest.approx(100 * (27 / 36) / 2) and results["ari_1"] == 0
    assert results["ari_2"] == 100 > results["ari_6"]


def test_a_blank_patch_is_no_error(checkpoint, tmp_path):
    save(tmp_path / "images" / "a.png", np.full((24, 24, 3), 51))
    mask = np.zeros((24, 24))
    mask[:12] = 1
    save(tmp_path / "masks" / "a.png", mask)
    blank = [f"dataset.mean={[0.2] * 3}", "segments=[1]"]
    found = evaluate(checkpoint, tmp_path, *PIXELS, f"data_path={tmp_path}", *blank)
    assert found["results"] == {"miou_1": 25.0, "ari_1": 0.0}


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_what_is_learned_needs_images_of_its_own(checkpoint, tmp_path, method):
    image, mask = blocks(0)
    save(tmp_path / "images" / "a.png", image)
    save(tmp_path / "masks" / "a.png", mask)
    with pytest.raises(DataError, match="both splits are the same images"):
        evaluate(checkpoint, tmp_path, "dataset=masks", f"data_path={tmp_path}", f"method={method}")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unsupervised", "linear", "knn"])
def test_two_processes_give_the_same_numbers(checkpoint, tmp_path, method):
    data = ["dataset=textures", "dataset.options.image_size=24", "dataset.options.train_images=18"]
    settings = [*data, "dataset.options.eval_images=14", "batch_size=4", f"method={method}"]
    settings += ["patch_head.epochs=2", "bank_patches=200"]
    alone = evaluate(checkpoint, tmp_path, *settings)
    place = [f"output_dir={tmp_path}", "job_name=two", "num_workers=0"]
    arguments = [f"pretrained={checkpoint}", *place, *settings]
    run_together(2, *arguments, program="eval/segmentation.py")
    (path,) = (tmp_path / "two" / "results").glob("*.json")
    two = json.loads(path.read_text())
    assert two["processes"] == 2 and two["results"] == alone["results"]
    assert two["images"] == alone["images"] == 14


# ---- Bad input. ----------------------------------------------------------------------------------


def wrong_size(root: Path) -> None:
    save(root / "masks" / "val" / "0.png", np.zeros((24, 23)))


def colour_mask(root: Path) -> None:
    save(root / "masks" / "val" / "0.png", np.zeros((24, 24, 3)))


def truncated_mask(root: Path) -> None:
    path = root / "masks" / "val" / "0.png"
    path.write_bytes(path.read_bytes()[:50])


def no_mask(root: Path) -> None:
    (root / "masks" / "val" / "0.png").unlink()


def no_masks_folder(root: Path) -> None:
    (root / "masks").rename(root / "labels")


def empty_split(root: Path) -> None:
    for path in (root / "images" / "val").iterdir():
        path.unlink()


def other_split(root: Path) -> None:
    (root / "images" / "val").rename(root / "images" / "train")


def white_objects(root: Path) -> None:
    for path in (root / "masks" / "val").iterdir():
        save(path, 255 * (blocks(0)[1] > 0), palette=False)


DAMAGES = {
    wrong_size: "the mask of .*val/0.png has 23 x 24 pixels: expected 24 x 24, as the image$",
    colour_mask: "the mask .*0.png is stored as RGB: expected palette or 8-bit grey",
    truncated_mask: "cannot read .*masks/val/0.png",
    no_mask: "these masks are missing: .*masks/val/0.png$",
    no_masks_folder: "/masks is not a folder; dataset masks needs a folder with images/ and masks/",
    empty_split: "images/val contains no images",
    other_split: "evaluation images in .*/images: val or validation or test$",
    white_objects: "none of the 5 masks holds two classes",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_masks_are_named(checkpoint, tmp_path, damage):
    damage(write_blocks(tmp_path / "data"))
    with pytest.raises(DataError, match=DAMAGES[damage]) as caught:
        evaluate(checkpoint, tmp_path, *PIXELS, f"data_path={tmp_path / 'data'}")
    assert "\n" not in str(caught.value)


def test_a_data_set_without_masks_is_named(checkpoint, tmp_path):
    with pytest.raises(DataError, match="dataset=digits has no masks.*textures, masks, voc$"):
        evaluate(checkpoint, tmp_path, "dataset=digits")


def test_more_segments_than_patches_is_an_error(checkpoint, tmp_path):
    write_blocks(tmp_path / "data")
    with pytest.raises(ConfigError, match="segments: 37 of 36 patches"):
        evaluate(checkpoint, tmp_path, *PIXELS, f"data_path={tmp_path / 'data'}", "segments=[37]")


def test_an_empty_bank_is_an_error(checkpoint, tmp_path):
    for split in ("train", "val"):
        write_blocks(tmp_path / "data", split)
    data = ["dataset=masks", f"data_path={tmp_path / 'data'}", "method=knn", "neighbours=[181]"]
    with pytest.raises(ConfigError, match="=181: expected 1 to 180, as many training patches of"):
        evaluate(checkpoint, tmp_path, *data)


def test_ward_is_euclidean():
    with pytest.raises(ConfigError, match="expected euclidean with clustering.linkage=ward"):
        check_config(compose_config("segmentation", ["clustering.linkage=ward"]))
