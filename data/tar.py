"""Images in .tar files, read where they lie: nothing is unpacked.

The class of an image is the folder it lies in inside its tar or, without one, the name of that tar;
so both shards with class folders and ImageNet's one tar per class are understood. A tar inside a
tar is read in place, too (ILSVRC2012_img_train.tar as shipped). The order of the images is that of
`imagefolder`: the same seed trains on the same batches.
"""

import os
from functools import lru_cache
from io import FileIO
from pathlib import Path

import numpy as np

from data.base import StoredImages
from data.files import existing_folder, require_known_classes, split_folder
from data.imagenet import FLAT_NAME, wnid_of, wnids_from_devkit
from data.tar_index import TarIndex, index_of

EXPECTED = "a folder with train/*.tar and val/*.tar"
# In each process; far below 1024, the usual limit for all its files.
MOST_OPEN_TARS = 256


def build_tar(
    split: str, data_path: str | None, *, index_folder: str | None = None
) -> "TarDataset":
    """train/*.tar and val/*.tar; the classes are those of train/."""
    root = existing_folder("tar", data_path, EXPECTED)
    index = train = index_of(root / "train", index_folder)
    folder, labels = split_folder(root, split), train.places["label"]
    if split == "eval":
        index = index_of(folder, index_folder)
        labels = evaluation_labels(folder, index, train.classes)
    return TarDataset(folder, index, labels, train.classes)


def evaluation_labels(folder: Path, index: TarIndex, classes: list[str]) -> np.ndarray:
    """Positions in `classes`. ImageNet's flat validation set is labelled by the development kit."""
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of.get(name, -1) for name in index.classes])[index.places["label"]]
    rows = np.flatnonzero(labels < 0)
    names = [index.names[row].rpartition("/")[2] for row in rows]
    if any(FLAT_NAME.fullmatch(name) for name in names):
        wnids = wnids_from_devkit(folder)
        found = [wnid_of(folder, name, wnids) for name in names]
    else:
        found = [index.classes[label] for label in index.places["label"][rows]]
    require_known_classes(folder, found, classes)
    labels[rows] = [label_of[name] for name in found]
    return labels


# Forked workers may inherit what is open: each read says where it starts, so none moves another.
@lru_cache(maxsize=MOST_OPEN_TARS)
def open_tar(path: str, modified: int) -> FileIO:
    """It closes when nothing refers to it any more: never while another thread still reads.
    `modified`: a tar that was replaced is another one."""
    return open(path, "rb", buffering=0)


class TarDataset(StoredImages):
    """Images inside the tars of one folder; labels[i] is a position in `classes`."""

    def __init__(
        self, folder: Path, index: TarIndex, labels: np.ndarray, classes: list[str]
    ) -> None:
        self.folder, self.index = folder, index
        # Class by class, as in the index; only labels from the development kit change the order.
        self.rows = np.argsort(labels, kind="stable")
        self.labels = np.asarray(labels, dtype=np.int64)[self.rows]
        self.classes = classes

    def __len__(self) -> int:
        return len(self.rows)

    def contents(self, index: int) -> bytearray:
        _, number, start, size = self.index.places[self.rows[index]].item()
        tar = self.index.tars[number]
        path = os.path.join(self.folder, tar.name)
        file = open_tar(path, tar.modified)
        contents = bytearray(size)
        done = 0
        while done < size:  # a read may return a part of what was asked for
            count = os.preadv(file.fileno(), [memoryview(contents)[done:]], start + done)
            if count == 0:
                raise OSError(f"{path} ends at byte {start + done}: it was longer when indexed")
            done += count
        return contents

    def describe(self, index: int) -> str:
        row = self.rows[index]
        tar = self.index.tars[self.index.places["tar"][row]]
        return os.path.join(self.folder, tar.name, self.index.names[row])
