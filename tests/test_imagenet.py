"""ImageNet and its subset of 100 classes: labels, and what is said if a part is missing."""

from pathlib import Path

import numpy as np
import pytest

from data.base import DataError
from data.datasets import build_dataset
from data.files import GROUND_TRUTH, META, SUBSET_FILE
from tests.test_datasets import paths_of, red_of, save_image

SUBSET = SUBSET_FILE.read_text().split()
WNIDS = ["n01440764", "n01443537", "n01484850"]


def validation_numbers(dataset) -> list[int]:
    return [int(path.stem[-8:]) for path in paths_of(dataset)]  # ILSVRC2012_val_00000001.JPEG


def write_devkit(folder: Path, wnids: list[str], ground_truth: list[int]) -> None:
    """A development kit whose IDs are ground truth numbers; inner nodes of the tree follow."""
    from scipy.io import savemat

    rows = [(number, wnid, "words") for number, wnid in enumerate(wnids, 1)]
    rows.append((len(wnids) + 1, "n00001740", "entity"))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / META, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    (folder / GROUND_TRUTH).write_text("".join(f"{number}\n" for number in ground_truth))


def save_flat_validation(root: Path, count: int) -> None:
    for number in range(1, count + 1):
        save_image(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", red=number * 20)


@pytest.fixture
def imagenet(tmp_path):
    for wnid in WNIDS:
        save_image(tmp_path / "train" / wnid / f"{wnid}_1.JPEG")
    return tmp_path


@pytest.mark.parametrize("place", ["", "ILSVRC2012_devkit_t12/data", "devkit/data", "data"])
def test_imagenet_labels_a_flat_validation_folder(imagenet, place):
    # The kit numbers the classes in an order that is not the sorted one.
    (imagenet / META).touch()  # half of a kit is none, unless the other half is there too
    write_devkit(imagenet / place, [WNIDS[2], WNIDS[0], WNIDS[1]], [2, 1, 3, 1])
    save_flat_validation(imagenet, 4)
    evaluation = build_dataset("imagenet", "eval", imagenet)
    numbers = validation_numbers(evaluation)
    assert dict(zip(numbers, evaluation.labels, strict=True)) == {1: 0, 2: 2, 3: 1, 4: 2}
    assert evaluation.classes == WNIDS
    brightness = [red_of(evaluation.load(i)) for i in range(4)]
    assert np.allclose(brightness, 20 * np.array(numbers), atol=3)


def test_imagenet_reads_class_folders(imagenet):
    save_image(imagenet / "val" / WNIDS[2] / "ILSVRC2012_val_00000001.JPEG")
    assert build_dataset("imagenet", "train", imagenet).labels.tolist() == [0, 1, 2]
    assert build_dataset("imagenet", "eval", imagenet).labels.tolist() == [2]


def test_imagenet_says_which_part_is_missing(imagenet):
    with pytest.raises(DataError, match="evaluation images in .*: val or validation or test$"):
        build_dataset("imagenet", "eval", imagenet)
    save_flat_validation(imagenet, 2)
    with pytest.raises(DataError, match=f"{GROUND_TRUTH} and {META} are needed.*devkit_t12"):
        build_dataset("imagenet", "eval", imagenet)
    write_devkit(imagenet, WNIDS, [1])
    with pytest.raises(DataError, match="contains ILSVRC2012_val_00000002.JPEG; expected names"):
        build_dataset("imagenet", "eval", imagenet)
    write_devkit(imagenet, WNIDS, [1, 2])
    other = save_image(imagenet / "val" / "own.JPEG")
    with pytest.raises(DataError, match="contains own.JPEG; expected names"):
        build_dataset("imagenet", "eval", imagenet)
    other.unlink()
    write_devkit(imagenet, WNIDS, [1, 9])
    with pytest.raises(DataError, match="val has classes that .*train lacks: class 9$"):
        build_dataset("imagenet", "eval", imagenet)
    write_devkit(imagenet, [*WNIDS, "n99999999"], [1, 4])
    with pytest.raises(DataError, match="val has classes that .*train lacks: n99999999$"):
        build_dataset("imagenet", "eval", imagenet)


@pytest.fixture
def imagenet100(tmp_path):
    """The 100 classes, one that does not belong, and one of those without images."""
    (tmp_path / "train" / "n00000002").mkdir(parents=True)
    for wnid in [*SUBSET, "n00000001"]:
        save_image(tmp_path / "train" / wnid / "image.JPEG", size=(4, 4))
    return tmp_path


def test_imagenet100_labels_are_line_numbers(imagenet100):
    train = build_dataset("imagenet100", "train", imagenet100)
    assert len(train) == len(set(SUBSET)) == 100 and train.classes == SUBSET
    for index in (0, 57, 99):
        assert Path(train.describe(index)).parent.name == SUBSET[train.labels[index]]


def test_imagenet100_takes_its_classes_out_of_a_full_validation_set(imagenet100):
    write_devkit(imagenet100, ["n00000001", *SUBSET[::-1]], list(range(1, 102)))
    save_flat_validation(imagenet100, 101)
    evaluation = build_dataset("imagenet100", "eval", imagenet100)
    assert len(evaluation) == 100
    assert evaluation.labels.tolist() == [101 - n for n in validation_numbers(evaluation)]


def test_imagenet100_names_missing_classes(imagenet):
    with pytest.raises(DataError, match=f"lacks 100 of the 100 classes.*{min(SUBSET)}, .* 95 more"):
        build_dataset("imagenet100", "train", imagenet)
