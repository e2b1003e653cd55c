"""Data sets made of image files: `folder`, without labels, and those with one folder per class,
`imagefolder`, ImageNet-1K as it is distributed and its 100-class subset.

The val/ of the latter may also be flat, as in ImageNet's archive; then the labels come from two
files of the development kit: ILSVRC2012_validation_ground_truth.txt and meta.mat.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import glob
from pathlib import Path

import numpy as np

from data.base import DataError, StoredImages, first_few

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
ENDINGS = f"expected files ending in {' '.join(EXTENSIONS)}"
FOLDER_LAYOUT = "a folder with images, at any depth"
CLASSES_LAYOUT = "a folder with train/CLASS/ and val/"
EVAL_FOLDERS = ("val", "validation", "test")
SUBSET_FILE = Path(__file__).with_name("imagenet100.txt")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
DEVKIT_FOLDERS = ("", "ILSVRC2012_devkit_t12/data", "devkit/data", "data")
FLAT_NAME = "ILSVRC2012_val_{:08d}.JPEG"
# Listing folders waits for the file server, not for the processor.
SCAN_THREADS = 16


class PathList:
    """A list of paths kept in one array.

    Reading a Python string writes its reference count, so a million strings would slowly be copied
    into every forked worker. An array stays shared."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.encoded = np.array([os.fsencode(path) for path in paths], dtype=bytes)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.encoded[index])

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded)


class FileDataset(StoredImages):
    """One image per file; labels[i] is a position in `classes`. others: the endings of other files
    that lie there."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Sequence[int] | np.ndarray | None = None,
        classes: list[str] | None = None,
        others: Iterable[str] = (),
    ) -> None:
        self.paths = PathList(paths)
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes, self.others = classes, counted(others)

    def __len__(self) -> int:
        return len(self.paths)

    def contents(self, index: int) -> bytearray:
        with open(self.paths[index], "rb") as file:
            return bytearray(file.read())

    def describe(self, index: int) -> str:
        return self.paths[index]


def existing_folder(name: str, data_path: str | None, expected: str, *inside: str) -> Path:
    """data_path as a Path to a folder that exists, with these folders inside."""
    if data_path is None or str(data_path) == "":
        raise DataError(f"dataset {name} needs data_path: {expected}")
    folder = Path(data_path).expanduser()
    for place in (folder, *map(folder.joinpath, inside)):
        if not place.is_dir():
            problem = f"{place} is not a folder"
            raise DataError(f"data_path={data_path}: {problem}; dataset {name} needs {expected}")
    return folder


def list_folder(
    folder: str | os.PathLike[str], others: list[str] | None = None
) -> tuple[list[str], list[str]]:
    """Sorted names of the (subfolders, image files) in a folder; hidden ones are left out. The
    endings of other files are added to `others`."""
    subfolders, images = [], []
    try:
        # scandir knows a file from a folder without asking the file system once per entry.
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                # Following links, which only decides about other names, would ask once per image.
                is_named_image = entry.name.lower().endswith(EXTENSIONS)
                if entry.is_dir(follow_symlinks=not is_named_image):
                    subfolders.append(entry.name)
                elif is_named_image:
                    images.append(entry.name)
                elif others is not None:
                    others.append(ending_of(entry.name))
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from error
    return sorted(subfolders), sorted(images)


def ending_of(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without ending"


def counted(endings: Iterable[str]) -> str:
    """'2 .heic, 1 .mov': the most frequent ones first."""
    counts = sorted(Counter(endings).items(), key=lambda pair: (-pair[1], pair[0]))
    return first_few([f"{count} {ending}" for ending, count in counts], 10)


def find_images(folder: str | os.PathLike[str], others: list[str] | None = None) -> list[str]:
    """Paths of all images below a folder, always in the same order. others: as in list_folder."""
    subfolders, images = list_folder(folder, others)
    paths = [os.path.join(folder, image) for image in images]
    for subfolder in subfolders:
        paths.extend(find_images(os.path.join(folder, subfolder), others))
    return paths


def require_files(what: str, paths: Iterable[Path]) -> None:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"these {what} are missing: {first_few(missing)}")


def split_folder(root: Path, split: str) -> Path:
    if split == "train":
        return root / "train"
    for name in EVAL_FOLDERS:
        if (root / name).is_dir():
            return root / name
    names = " or ".join(EVAL_FOLDERS)
    raise DataError(f"data_path: expected a folder of evaluation images in {root}: {names}")


def require_known_classes(folder: Path, names: Iterable[str], classes: list[str]) -> None:
    """Evaluation classes that training never named would have no label."""
    if unknown := sorted(set(names) - set(classes)):
        train = folder.parent / "train"
        raise DataError(f"{folder} has classes that {train} lacks: {first_few(unknown)}")


def build_folder(split: str, data_path: str | None) -> FileDataset:
    """All images below data_path, without labels; both splits are the same images."""
    paths, others = images_below("folder", data_path, FOLDER_LAYOUT)
    return FileDataset(paths, others=others)


def images_below(name: str, data_path: str | None, expected: str) -> tuple[list[str], list[str]]:
    """-> their paths, and the endings of other files"""
    root, others = existing_folder(name, data_path, expected), []
    paths = find_images(root, others)
    if not paths:
        raise DataError(f"{root} contains no images; {ENDINGS}{found_instead(others)}")
    return paths, others


def found_instead(others: list[str]) -> str:
    return f", found {counted(others)}" if others else ""


def given_images(pattern: str, max_value: float | None = None) -> FileDataset:
    """Of images=: one file, a folder with images at any depth, or a glob; sorted by path."""
    path, others = os.path.expanduser(pattern), []
    if os.path.isdir(path):
        paths = find_images(path, others)
    elif os.path.isfile(path):
        paths = [path]
    else:  # what else a glob matches is left out, as it is of a folder
        files = [path for path in glob(path, recursive=True) if not os.path.isdir(path)]
        paths = [path for path in files if path.lower().endswith(EXTENSIONS)]
        others = [ending_of(path) for path in files if not path.lower().endswith(EXTENSIONS)]
    if not paths:
        valid = f"an image file, a folder with images, or a glob of images; {ENDINGS}"
        raise DataError(f"images={pattern}: expected {valid}{found_instead(others)}")
    dataset = FileDataset(sorted(paths), others=others)
    dataset.decoder, dataset.max_value = "fast", max_value
    return dataset


# ---- One folder per class. -----------------------------------------------------------------------


def build_imagefolder(name: str, split: str, data_path: str | None) -> FileDataset:
    """Label = position of the class: in sorted order, of all that are in train/; of imagenet100 in
    imagenet100.txt, from a full ImageNet or from a copy of these classes alone."""
    only = SUBSET_FILE.read_text().split() if name == "imagenet100" else None
    root = existing_folder(name, data_path, CLASSES_LAYOUT, "" if only else "train")
    classes = only or class_folders(root / "train")
    folder = split_folder(root, split)
    others: list[str] = []
    images = images_by_class(folder, others, only)
    if only is None:
        require_known_classes(folder, images, classes)
    elif missing := sorted(set(only) - set(images)):
        problem = f"{len(missing)} of the {len(only)} classes of imagenet100"
        raise DataError(f"{folder} lacks {problem}: {first_few(missing)}")
    by_label = [images.get(own, []) for own in classes]  # images of other classes are left out
    paths = [path for of_class in by_label for path in of_class]
    labels = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in by_label])
    return FileDataset(paths, labels, classes, others)


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in train/ or val/; there must be some."""
    subfolders, _ = list_folder(folder)
    if not subfolders:
        raise DataError(f"{folder} contains no class folders; expected {folder}/CLASS/*.jpg")
    return subfolders


def images_by_class(
    folder: Path, others: list[str], only: list[str] | None = None
) -> dict[str, list[str]]:
    """Paths of the images of each class, from either layout; of class folders only those named.
    others: as in list_folder."""
    subfolders, flat_images = list_folder(folder, others)
    if flat_images and not subfolders:
        flat: dict[str, list[str]] = {}
        for name, wnid in zip(flat_images, wnids_of_flat(folder, flat_images), strict=True):
            flat.setdefault(wnid, []).append(str(folder / name))
        return flat
    names = [name for name in class_folders(folder) if only is None or name in only]
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        paths = pool.map(partial(find_images, others=others), [folder / name for name in names])
        images = dict(zip(names, paths, strict=True))
    if empty := [name for name in names if not images[name]]:  # was its archive unpacked?
        problem = f"class folders that contain no images: {first_few(empty)}"
        raise DataError(f"{folder} has {problem}; {ENDINGS}")
    return images


def wnids_of_flat(folder: Path, names: list[str]) -> list[str]:
    """The classes of these images of a flat validation folder."""
    # Slow to import, and only this layout needs it.
    from scipy.io import loadmat

    places = [folder.parent / place for place in DEVKIT_FOLDERS]
    kits = [kit for kit in places if (kit / GROUND_TRUTH).is_file() and (kit / META).is_file()]
    if not kits:
        needed = f"{GROUND_TRUTH} and {META} are needed to label its images"
        looked = f"looked in {', '.join(map(str, places))}"
        raise DataError(f"{folder} has no class folders, so {needed}; {looked}")
    synsets = loadmat(kits[0] / META, squeeze_me=True)["synsets"]
    # The ground truth counts classes by ILSVRC2012_ID, which is not the sorted order of the WNIDs.
    wnids = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
    numbers = map(int, (kits[0] / GROUND_TRUTH).read_text().split())
    wnid_of = {
        FLAT_NAME.format(place): wnids.get(number, f"class {number}")
        for place, number in enumerate(numbers, 1)
    }
    if unknown := [name for name in names if name not in wnid_of]:
        valid = f"{FLAT_NAME.format(1)} to {FLAT_NAME.format(len(wnid_of))}"
        raise DataError(f"{folder} contains {unknown[0]}; expected names from {valid}")
    return [wnid_of[name] for name in names]
