"""One folder per class: `imagefolder`, ImageNet-1K as it is distributed, its 100-class subset.

val/ may also be flat, as in ImageNet's archive; then the labels come from two files of the
development kit: ILSVRC2012_validation_ground_truth.txt and meta.mat.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from data import files
from data.base import DataError, first_few
from data.files import FileDataset, existing_folder, list_folder

SUBSET_FILE = Path(__file__).with_name("imagenet100.txt")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
DEVKIT_FOLDERS = ("", "ILSVRC2012_devkit_t12/data", "devkit/data", "data")
FLAT_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
EXPECTED = "a folder with train/CLASS/ and val/"


def build_imagefolder(name: str, split: str, data_path: str | None) -> FileDataset:
    """Label = position of the class: in sorted order, of all that are in train/; of imagenet100 in
    imagenet100.txt, from a full ImageNet or from a copy of these classes alone."""
    root = existing_folder(name, data_path, EXPECTED)
    only = SUBSET_FILE.read_text().split() if name == "imagenet100" else None
    classes = only or class_folders(root / "train")
    folder = files.split_folder(root, split)
    others: list[str] = []
    images = images_by_class(folder, others, only)
    if only is None:
        files.require_known_classes(folder, images, classes)
    elif missing := sorted(set(only) - set(images)):
        problem = f"{len(missing)} of the {len(only)} classes of imagenet100"
        raise DataError(f"{folder} lacks {problem}: {first_few(missing)}")
    by_label = [images.get(own, []) for own in classes]  # images of other classes are left out
    paths = [path for of_class in by_label for path in of_class]
    labels = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in by_label])
    return FileDataset(paths, labels, classes, others)


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in train/ or val/; there must be some."""
    subfolders = list_folder(folder)[0] if folder.is_dir() else []
    if not subfolders:
        problem = "contains no class folders" if folder.is_dir() else "does not exist"
        raise DataError(f"{folder} {problem}; expected {folder}/CLASS/*.jpg")
    return subfolders


def images_by_class(
    folder: Path, others: list[str], only: list[str] | None = None
) -> dict[str, list[str]]:
    """Paths of the images of each class, from either layout; of class folders only those named.
    others: as in list_folder."""
    subfolders, flat_images = list_folder(folder, others)
    if flat_images and not subfolders:
        wnids, flat = wnids_from_devkit(folder), {}
        for name in flat_images:
            flat.setdefault(wnid_of(folder, name, wnids), []).append(str(folder / name))
        return flat
    names = [name for name in class_folders(folder) if only is None or name in only]
    with ThreadPoolExecutor(files.SCAN_THREADS) as pool:
        list_class = partial(files.find_images, others=others)
        paths = pool.map(list_class, [os.path.join(folder, name) for name in names])
        images = dict(zip(names, paths, strict=True))
    empty = [name for name in names if not images[name]]  # was its archive unpacked?
    if empty:
        problem = f"class folders that contain no images: {first_few(empty)}"
        raise DataError(f"{folder} has {problem}; {files.ENDINGS}")
    return images


def wnid_of(folder: Path, name: str, wnids: list[str]) -> str:
    match = FLAT_NAME.fullmatch(name)
    number = int(match[1]) if match else 0
    if not 1 <= number <= len(wnids):
        valid = f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(wnids):08d}.JPEG"
        raise DataError(f"{folder} contains {name}; expected names from {valid}")
    return wnids[number - 1]


def wnids_from_devkit(folder: Path) -> list[str]:
    """WNID of each image in the validation folder, in the order of their numbers."""
    # Slow to import, and only this layout needs it.
    from scipy.io import loadmat

    devkit = devkit_folder(folder)
    synsets = loadmat(devkit / META, squeeze_me=True)["synsets"]
    # The ground truth counts classes by ILSVRC2012_ID, which is not the sorted order of the WNIDs.
    ids, wnids = synsets["ILSVRC2012_ID"], synsets["WNID"]
    wnid_by_id = {int(number): str(wnid) for number, wnid in zip(ids, wnids, strict=True)}
    numbers = [int(line) for line in (devkit / GROUND_TRUTH).read_text().split()]
    unknown = sorted(set(numbers) - set(wnid_by_id))
    if unknown:
        raise DataError(f"{devkit / GROUND_TRUTH} has class {unknown[0]}, which {META} lacks")
    return [wnid_by_id[number] for number in numbers]


def devkit_folder(folder: Path) -> Path:
    places = [folder.parent / name for name in DEVKIT_FOLDERS]
    for place in places:
        if (place / GROUND_TRUTH).is_file() and (place / META).is_file():
            return place
    needed = f"{GROUND_TRUTH} and {META} are needed to label its images"
    looked = f"looked in {', '.join(map(str, places))}"
    raise DataError(f"{folder} has no class folders, so {needed}; {looked}")
