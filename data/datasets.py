"""From a name and a folder to a data set. Nothing is ever downloaded."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from data import files, images, masks, tar
from data.base import ArrayDataset, DataError, ImageDataset
from data.files import existing_folder
from data.photographs import Photographs, Textures

OF_CLASS_FOLDERS = ("imagefolder", "imagenet", "imagenet100")
DIGITS = Path(__file__).with_name("digits.npz")
ARCHIVES = {  # what torchvision reads: the folder, and the archive that it comes from
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "stl10": ("stl10_binary", "stl10_binary.tar.gz"),
}
UNPACKED = "a folder that contains {}/ (unpacked from {})"


def build_digits(split: str, data_path: str | None) -> ArrayDataset:
    """Handwritten digits of 8 x 8 pixels: the first 1,400 for training, the last 397 for
    evaluation; data_path is not used.

    digits.npz holds those of scikit-learn (load_digits, from the UCI repository's "Optical
    Recognition of Handwritten Digits"): importing it takes longer than a short training."""
    # Their order keeps the writers apart: a random split would put the same hand on both sides.
    part = slice(None, 1400) if split == "train" else slice(1400, None)
    with np.load(DIGITS) as digits:
        values, labels = digits["images"][part], digits["labels"][part]
    grey = np.rint(values * (255 / 16)).astype(np.uint8)  # 16 is white
    images = np.repeat(grey[..., None], 3, axis=-1)
    return ArrayDataset(f"digits/{split}", images, labels, list("0123456789"))


def build_archive(name: str, split: str, data_path: str | None) -> ArrayDataset:
    """What torchvision reads; it compares the files with their published checksums. stl10, train:
    the 5,000 labelled images, then the 100,000 without label (-1)."""
    from torchvision import datasets

    folder, is_train = ARCHIVES[name][0], split == "train"
    root = existing_folder(name, data_path, LAYOUTS[name], folder)
    try:
        if name == "stl10":
            part = "train+unlabeled" if is_train else "test"
            source = datasets.STL10(root, split=part)
            images, labels = source.data.transpose(0, 2, 3, 1), source.labels
        else:
            source = getattr(datasets, name.upper())(root, train=is_train)
            images, labels = source.data, source.targets
    except RuntimeError as error:
        problem = "is incomplete or damaged: unpack its archive again"
        raise DataError(f"{root / folder} {problem}") from error
    return ArrayDataset(f"{name}/{split}", images, labels, source.classes)


DATASETS: dict[str, Callable[..., ImageDataset]] = {
    "digits": build_digits,
    "textures": Textures,
    "photographs": Photographs,
    "tar": tar.build_tar,
    "folder": files.build_folder,
    "images": images.build_images,
    "masks": masks.build_masks,
    "voc": masks.build_voc,
    **{name: partial(build_archive, name) for name in ARCHIVES},
    **{name: partial(files.build_imagefolder, name) for name in OF_CLASS_FOLDERS},
}
# What data_path has to be; the others need none.
LAYOUTS = {
    **dict.fromkeys(OF_CLASS_FOLDERS, files.CLASSES_LAYOUT),
    **{name: UNPACKED.format(*archive) for name, archive in ARCHIVES.items()},
    "tar": tar.EXPECTED,
    "folder": files.FOLDER_LAYOUT,
    "images": images.EXPECTED,
    "masks": masks.MASKS_LAYOUT,
    "voc": masks.VOC_LAYOUT,
    "DAVIS-2017": masks.DAVIS_LAYOUT,
}
# The options of those that are stored in files, and their defaults. One process lists the files for
# all.
DECODING: dict[str, dict[str, object]] = {
    **dict.fromkeys(
        (*OF_CLASS_FOLDERS, "tar", "folder", "images"), {"decoder": "fast", "max_value": None}
    ),
    "masks": {"max_value": None},
}


def build_dataset(
    name: str, split: str, data_path: str | None = None, options: dict | None = None
) -> ImageDataset:
    """The `train` or `eval` split of a data set; `options` are its own extra settings."""
    builder = DATASETS[name]
    options, decoding = options or {}, DECODING.get(name, {})
    parameters = inspect.signature(builder).parameters.values()
    own = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    valid = [*decoding, *own]
    if unknown := [option for option in options if option not in valid]:
        problem = f"{name} has no such option; expected one of {', '.join(valid) or 'none'}"
        raise DataError(f"dataset.options.{unknown[0]}: {problem}")
    dataset = builder(split, data_path, **{key: options[key] for key in own if key in options})
    for option, default in decoding.items():
        setattr(dataset, option, options.get(option, default))
    return dataset


def check_data_path(name: str, data_path: str | None) -> None:
    """Whether it is there at all. Raises what the data set itself would say."""
    is_tar = name == "images" and Path(data_path or "").expanduser().is_file()
    if name in LAYOUTS and not is_tar:
        existing_folder(name, data_path, LAYOUTS[name])
