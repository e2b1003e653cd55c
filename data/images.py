"""`images`: what there is, in a folder or in one .tar: train/ and val/; or class folders, of which
every tenth image is kept for evaluation; or images without classes."""

import hashlib
import os
from pathlib import Path

import numpy as np

from data.base import ImageDataset
from data.files import EVAL_FOLDERS, FileDataset, PathList, images_below
from data.tar import COMPRESSED, TarDataset, index_of

EXPECTED = "a folder of images, of class folders, or of train/ and val/; or a .tar of one of these"
KEPT = 10  # one image of so many
Name = tuple[str, ...]  # folders, file


def build_images(
    split: str, data_path: str | None, *, index_folder: str | None = None
) -> ImageDataset:
    path = Path(data_path or "").expanduser()
    is_tar = path.is_file() and path.name.lower().endswith((".tar", *COMPRESSED))
    if is_tar:
        index = index_of(path.parent, index_folder, path.name)
        paths, others = list(index.names), []
    else:
        paths, others = images_below("images", data_path, EXPECTED)
    names = [tuple(path.split("/")) for path in paths]
    common = len(os.path.commonprefix([name[:-1] for name in names]))  # wherever they lie
    names = [name[common:] for name in names]
    splits, classes = divide(names)
    rows = splits[split]
    paths = [paths[row] for row in rows]
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of.get(names[row][-2:][0], -1) for row in rows])
    dataset: ImageDataset
    if is_tar:
        index = index._replace(names=PathList(paths), places=index.places[rows])
        dataset = TarDataset(path.parent, index, labels, classes)
    else:
        dataset = FileDataset(paths, labels, classes, others)
    if not classes:
        dataset.labels = dataset.classes = None
    return dataset


def divide(names: list[Name]) -> tuple[dict[str, list[int]], list[str]]:
    """The rows of each split, sorted by name, and the classes: two folders or more, if all images
    lie directly in one of them."""
    rows = sorted(range(len(names)), key=names.__getitem__)
    tops = {name[0] for name in names if len(name) > 1}
    given = [name for name in EVAL_FOLDERS if {"train", name} <= tops][:1]
    sides = ["train", *given] if given else [False, True]
    side_of = [name[0] if given else is_kept(name) for name in names]
    train, kept = ([row for row in rows if side_of[row] == side] for side in sides)
    folders = {names[row][len(given) : -1] for row in (*train, *kept)}
    if len(folders) > 1 and len(kept) > 1 and all(len(folder) == 1 for folder in folders):
        return {"train": train, "eval": kept}, sorted(name for (name,) in folders)
    return {"train": train if given else rows, "eval": kept if given else rows}, []


def is_kept(name: Name) -> bool:
    """By its own name alone: other images may come and go."""
    digest = hashlib.sha256(os.fsencode("/".join(name))).digest()
    return int.from_bytes(digest[:8], "big") % KEPT == 0
