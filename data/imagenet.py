"""ImageNet-1K as it is distributed, and its usual 100-class subset.

train/ holds one folder per class. val/ either does too, or is flat, as in the original archive;
then the labels come from two files of the development kit:
ILSVRC2012_validation_ground_truth.txt and meta.mat.
"""

import re
from pathlib import Path

from data.base import DataError, first_few
from data.files import (
    FileDataset,
    class_folders,
    existing_folder,
    images_by_class,
    labelled_dataset,
    list_folder,
    require_known_classes,
)

SUBSET_FILE = Path(__file__).with_name("imagenet100.txt")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
DEVKIT_FOLDERS = ("", "ILSVRC2012_devkit_t12/data", "devkit/data", "data")
FLAT_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
EXPECTED = "a folder with train/WNID/*.JPEG and val/"


def build_imagenet(split: str, data_path: str | None, *, decoder: str = "fast") -> FileDataset:
    """All classes found in train/; label = position of the WNID in sorted order."""
    root = existing_folder("imagenet", data_path, EXPECTED)
    classes = class_folders(root / "train")
    if split == "train":
        return labelled_dataset(images_by_class(root / "train", classes), classes, decoder)
    images = validation_images(root)
    require_known_classes(root / "val", images, classes)
    return labelled_dataset(images, classes, decoder)


def build_imagenet100(split: str, data_path: str | None, *, decoder: str = "fast") -> FileDataset:
    """The classes in imagenet100.txt, from a full ImageNet or from a copy of these classes alone.

    Label = line number in that file, counted from 0.
    """
    root = existing_folder("imagenet100", data_path, EXPECTED)
    classes = SUBSET_FILE.read_text().split()
    if split == "train":
        require_subset(root / "train", class_folders(root / "train"), classes)
        return labelled_dataset(images_by_class(root / "train", classes), classes, decoder)
    images = validation_images(root)
    require_subset(root / "val", list(images), classes)
    return labelled_dataset(images, classes, decoder)


def require_subset(folder: Path, present: list[str], classes: list[str]) -> None:
    missing = sorted(set(classes) - set(present))
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(classes)} classes of imagenet100: "
            f"{first_few(missing)}"
        )


def validation_images(root: Path) -> dict[str, list[str]]:
    """Paths of the validation images of each WNID, from either layout."""
    folder = root / "val"
    if not folder.is_dir():
        raise DataError(
            f"{folder} does not exist; expected val/WNID/*.JPEG, or val/*.JPEG with the devkit"
        )
    subfolders, flat_images = list_folder(folder)
    if subfolders:
        return images_by_class(folder, subfolders)
    if not flat_images:
        raise DataError(f"{folder} contains no images and no class folders")
    wnids = wnids_from_devkit(root)
    images: dict[str, list[str]] = {}
    for name in flat_images:
        images.setdefault(wnid_of(folder, name, wnids), []).append(str(folder / name))
    return images


def wnid_of(folder: Path, name: str, wnids: list[str]) -> str:
    match = FLAT_NAME.fullmatch(name)
    number = int(match[1]) if match else 0
    if not 1 <= number <= len(wnids):
        raise DataError(
            f"{folder} contains {name}; expected names from ILSVRC2012_val_00000001.JPEG "
            f"to ILSVRC2012_val_{len(wnids):08d}.JPEG"
        )
    return wnids[number - 1]


def wnids_from_devkit(root: Path) -> list[str]:
    """WNID of each validation image, in the order of their numbers."""
    # Slow to import, and only this layout needs it.
    from scipy.io import loadmat

    folder = devkit_folder(root)
    synsets = loadmat(folder / META, squeeze_me=True)["synsets"]
    # The ground truth counts classes by ILSVRC2012_ID, which is not the sorted order of the WNIDs.
    wnid_by_id = {
        int(number): str(wnid)
        for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
    }
    numbers = [int(line) for line in (folder / GROUND_TRUTH).read_text().split()]
    unknown = sorted(set(numbers) - set(wnid_by_id))
    if unknown:
        raise DataError(f"{folder / GROUND_TRUTH} has class {unknown[0]}, which {META} lacks")
    return [wnid_by_id[number] for number in numbers]


def devkit_folder(root: Path) -> Path:
    for name in DEVKIT_FOLDERS:
        if (root / name / GROUND_TRUTH).is_file() and (root / name / META).is_file():
            return root / name
    places = ", ".join(str(root / name) for name in DEVKIT_FOLDERS)
    raise DataError(
        f"{root / 'val'} has no class folders, so {GROUND_TRUTH} and {META} are needed "
        f"to label its images; looked in {places}"
    )
