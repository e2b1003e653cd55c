"""From a name and a folder to a data set. Nothing is ever downloaded."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.base import UNREADABLE, ArrayDataset, DataError, ImageDataset
from data.digits import build_digits
from data.files import build_folder, build_imagefolder, existing_folder
from data.imagenet import build_imagenet, build_imagenet100
from data.masks import build_masks, build_voc
from data.shapes import build_shapes
from data.tar import build_tar

__all__ = ["DATASETS", "UNREADABLE", "DataError", "ImageDataset", "build_dataset"]

SPLITS = ("train", "eval")


def build_cifar10(split: str, data_path: str | None) -> ArrayDataset:
    from torchvision.datasets import CIFAR10

    files = unpacked("cifar10", data_path, "cifar-10-batches-py", "cifar-10-python.tar.gz")
    source = open_files(CIFAR10, files, train=split == "train")
    return ArrayDataset(f"cifar10/{split}", source.data, source.targets, source.classes)


def build_cifar100(split: str, data_path: str | None) -> ArrayDataset:
    from torchvision.datasets import CIFAR100

    files = unpacked("cifar100", data_path, "cifar-100-python", "cifar-100-python.tar.gz")
    source = open_files(CIFAR100, files, train=split == "train")
    return ArrayDataset(f"cifar100/{split}", source.data, source.targets, source.classes)


def build_stl10(split: str, data_path: str | None) -> ArrayDataset:
    """train: the 5,000 labelled images, then the 100,000 without label (-1). eval: the test set."""
    from torchvision.datasets import STL10

    files = unpacked("stl10", data_path, "stl10_binary", "stl10_binary.tar.gz")
    source = open_files(STL10, files, split="train+unlabeled" if split == "train" else "test")
    images = np.transpose(source.data, (0, 2, 3, 1))
    return ArrayDataset(f"stl10/{split}", images, source.labels, source.classes)


def unpacked(name: str, data_path: str | None, folder: str, archive: str) -> Path:
    """The folder that an archive unpacks to, below data_path."""
    expected = f"a folder that contains {folder}/ (unpacked from {archive})"
    files = existing_folder(name, data_path, expected) / folder
    if not files.is_dir():
        raise DataError(f"data_path={data_path} has no {folder}/; dataset {name} needs {expected}")
    return files


def open_files(source: Callable, files: Path, **arguments):
    """A torchvision data set; it compares the files with their published checksums."""
    try:
        return source(files.parent, download=False, **arguments)
    except RuntimeError as error:
        raise DataError(f"{files} is incomplete or damaged: unpack its archive again") from error


DATASETS: dict[str, Callable[..., ImageDataset]] = {
    "digits": build_digits,
    "shapes": build_shapes,
    "imagefolder": build_imagefolder,
    "tar": build_tar,
    "folder": build_folder,
    "imagenet": build_imagenet,
    "imagenet100": build_imagenet100,
    "cifar10": build_cifar10,
    "cifar100": build_cifar100,
    "stl10": build_stl10,
    "masks": build_masks,
    "voc": build_voc,
}


def build_dataset(
    name: str, split: str, data_path: str | None = None, options: dict | None = None
) -> ImageDataset:
    """The `train` or `eval` split of a data set; `options` are its own extra settings."""
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}; choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    builder = DATASETS[name]
    options = options or {}
    parameters = inspect.signature(builder).parameters.values()
    valid = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = [option for option in options if option not in valid]
    if unknown:
        raise DataError(
            f"dataset {name} has no option {unknown[0]!r}; valid: {', '.join(valid) or 'none'}"
        )
    return builder(split, data_path, **options)
