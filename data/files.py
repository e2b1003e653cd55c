"""Data sets made of image files: `folder` (no labels) and `imagefolder` (one folder per class)."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.base import DataError, ImageDataset, first_few
from data.picture import Picture, check_decoder, decode

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
EVAL_FOLDERS = ("val", "validation", "test")
# Listing folders waits for the file server, not for the processor.
SCAN_THREADS = 16


class PathList:
    """A list of paths kept in two arrays.

    Reading a Python string writes its reference count, so a million strings would slowly be copied
    into every forked worker. Arrays stay shared.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.characters = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index > 0 else 0
        return os.fsdecode(self.characters[start : self.ends[index]].tobytes())


class FileDataset(ImageDataset):
    """One image per file; labels[i] is a position in `classes`."""

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: list[str] | None = None,
        decoder: str = "pil",
    ) -> None:
        self.decoder = check_decoder(decoder)
        self.paths = PathList(paths)
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Picture:
        return decode(self.contents(index), self.decoder)

    def contents(self, index: int) -> bytearray:
        """The file as it is stored."""
        with open(self.paths[index], "rb") as file:
            return bytearray(file.read())

    def describe(self, index: int) -> str:
        return self.paths[index]


def existing_folder(name: str, data_path: str | os.PathLike | None, expected: str) -> Path:
    """data_path as a Path to a folder that exists."""
    if data_path is None or str(data_path) == "":
        raise DataError(f"dataset {name} needs data_path: {expected}")
    folder = Path(data_path).expanduser()
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"data_path={data_path} {problem}; dataset {name} needs {expected}")
    return folder


def list_folder(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Sorted names of the (subfolders, image files) in a folder; hidden ones are left out."""
    subfolders, images = [], []
    try:
        # scandir knows a file from a folder without asking the file system once per entry.
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(EXTENSIONS):
                    images.append(entry.name)
                elif entry.is_dir():
                    subfolders.append(entry.name)
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from error
    return sorted(subfolders), sorted(images)


def find_images(folder: str | os.PathLike) -> list[str]:
    """Paths of all images below a folder, always in the same order."""
    subfolders, images = list_folder(folder)
    paths = [os.path.join(folder, image) for image in images]
    for subfolder in subfolders:
        paths.extend(find_images(os.path.join(folder, subfolder)))
    return paths


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in train/ or val/; there must be some."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; expected {folder}/CLASS/*.jpg")
    subfolders, _ = list_folder(folder)
    if not subfolders:
        raise DataError(f"{folder} contains no class folders; expected {folder}/CLASS/*.jpg")
    return subfolders


def images_by_class(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """The images of each class folder; an empty one is an error: was its archive unpacked?"""
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        paths = pool.map(find_images, [os.path.join(folder, name) for name in names])
        images = dict(zip(names, paths, strict=True))
    empty = [name for name in names if not images[name]]
    if empty:
        raise DataError(
            f"{folder} has class folders that contain no images: {first_few(empty)}; "
            f"expected files ending in {' '.join(EXTENSIONS)}"
        )
    return images


def labelled_dataset(images: dict[str, list[str]], classes: list[str], decoder: str) -> FileDataset:
    """Label = position in `classes`; images of other classes are left out."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_this_class = images.get(name, [])
        paths.extend(of_this_class)
        labels.extend([label] * len(of_this_class))
    return FileDataset(paths, labels, classes, decoder)


def require_known_classes(folder: Path, names: Iterable[str], classes: list[str]) -> None:
    """Evaluation classes that training never named would have no label."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise DataError(
            f"{folder} has classes without a folder in {folder.parent / 'train'}: "
            f"{first_few(unknown)}"
        )


def build_imagefolder(split: str, data_path: str | None, *, decoder: str = "fast") -> FileDataset:
    """train/CLASS/*.jpg and val/CLASS/*.jpg; the classes are the folders of train/."""
    root = existing_folder("imagefolder", data_path, "a folder with train/CLASS/ and val/CLASS/")
    classes = class_folders(root / "train")
    if split == "train":
        return labelled_dataset(images_by_class(root / "train", classes), classes, decoder)
    folder = next((root / name for name in EVAL_FOLDERS if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(
            f"data_path={root} has no folder of evaluation images: expected one named "
            f"{' or '.join(EVAL_FOLDERS)}"
        )
    names = class_folders(folder)
    require_known_classes(folder, names, classes)
    return labelled_dataset(images_by_class(folder, names), classes, decoder)


def build_folder(split: str, data_path: str | None, *, decoder: str = "fast") -> FileDataset:
    """All images below data_path, without labels; both splits are the same images."""
    root = existing_folder("folder", data_path, "a folder with images, at any depth")
    paths = find_images(root)
    if not paths:
        raise DataError(
            f"data_path={root} contains no images; expected files ending in {' '.join(EXTENSIONS)}"
        )
    return FileDataset(paths, decoder=decoder)
