"""Images in .tar files, read where they lie: nothing is unpacked.

The class of an image is the folder it lies in inside its tar or, without one, the name of that tar;
so both shards with class folders and ImageNet's one tar per class are understood. A tar inside a
tar is read in place, too (ILSVRC2012_img_train.tar as shipped). The order of the images is that of
`imagefolder`: the same seed trains on the same batches.

Where each image lies is found once and kept in an index, which is valid as long as the tars have
the same names, sizes and times. It lies next to them, or where that is not allowed, in
~/.cache/latent-mim.
"""

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import files
from data.base import DataError, StoredImages, first_few
from data.files import PathList
from util.files import write_whole

logger = logging.getLogger("lmim.data")

EXPECTED = "a folder with train/*.tar and val/*.tar"
# In each process; far below 1024, the usual limit for all its files.
MOST_OPEN_TARS = 256
INDEX_NAME = "index-latent-mim.npz"
CACHE_FOLDER = "~/.cache/latent-mim"
INDEX_FORMAT = 2
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# Headers lie a whole image apart. The default buffer is the file system's preferred size:
# on a cluster often a megabyte, and the scan would read everything.
SCAN_BUFFER = 4096
# Behind its end mark, a tar is filled up with zeros; some kilobytes are usual.
MOST_PADDING = 2**20


class TarFile(NamedTuple):
    """With another size or time, it is another one."""

    name: str
    size: int
    modified: int  # nanoseconds


# Where an image lies; label and tar are positions in the classes and in the tars. An array of this
# stays shared, as PathList says.
PLACE = np.dtype([("label", "i8"), ("tar", "i4"), ("offset", "i8"), ("size", "i8")])


class TarIndex(NamedTuple):
    """Where the images of a folder of tars lie, sorted by class and then by file name."""

    tars: list[TarFile]
    classes: list[str]
    names: PathList  # inside the tar; of an image in an inner tar: inner.tar/name
    places: np.ndarray  # PLACE [N]


def build_tar(
    split: str, data_path: str | None, *, index_folder: str | None = None
) -> "TarDataset":
    """train/*.tar and val/*.tar; the classes are those of train/."""
    root = files.existing_folder("tar", data_path, EXPECTED, "train")
    index = train = index_of(root / "train", index_folder)
    folder, labels = files.split_folder(root, split), train.places["label"]
    if split == "eval":
        index = index_of(folder, index_folder)
        labels = evaluation_labels(folder, index, train.classes)
    return TarDataset(folder, index, labels, train.classes)


def evaluation_labels(folder: Path, index: TarIndex, classes: list[str]) -> np.ndarray:
    """Positions in `classes`. ImageNet's flat validation set is labelled by the development kit."""
    label_of = {name: label for label, name in enumerate(classes)}
    found = [index.classes[label] for label in index.places["label"]]
    rows = [row for row, name in enumerate(found) if name not in label_of]
    names = [index.names[row].rpartition("/")[2] for row in rows]
    if any(name.startswith("ILSVRC2012_val_") for name in names):
        for row, wnid in zip(rows, files.wnids_of_flat(folder, names), strict=True):
            found[row] = wnid
    files.require_known_classes(folder, found, classes)
    return np.array([label_of[name] for name in found])


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


# ---- The index. ----------------------------------------------------------------------------------


def index_of(folder: Path, index_folder: str | None, only: str = "") -> TarIndex:
    """The saved index if it fits the tars, or else a new one. only: the one tar that counts."""
    tars, place = list_tars(folder, only), index_place(folder, index_folder, only)
    index = read_index(place)
    if index is None or index.tars != tars:
        index = scan_tars(folder, tars)
        write_index(index, place)
    return index


def index_place(folder: Path, index_folder: str | None, only: str) -> Path:
    next_to_tars = folder / (f"{only}-{INDEX_NAME}" if only else INDEX_NAME)
    if index_folder is None and (next_to_tars.exists() or os.access(folder, os.W_OK)):
        return next_to_tars
    digest = hashlib.sha256(os.fsencode((folder / only).resolve())).hexdigest()[:32]
    return Path(index_folder or CACHE_FOLDER).expanduser() / f"{digest}.npz"


def read_index(path: Path) -> TarIndex | None:
    """None if there is none that can be used: then a new one is made."""
    if not path.is_file():
        return None
    try:
        # numpy leaves a file open that it opened itself and found damaged.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            contents = json.loads(str(stored["contents"]))
            names = os.fsdecode(stored["names"].tobytes()).split("\0")
            places = stored["places"]
        if contents["format"] != INDEX_FORMAT:
            return None
        tars = [TarFile(*tar) for tar in contents["tars"]]
        return TarIndex(tars, contents["classes"], PathList(names), places)
    except Exception as error:  # damage shows in many ways; a new index replaces it
        logger.info("the index %s cannot be read (%s): it is made again", path, error)
        return None


def write_index(index: TarIndex, path: Path) -> None:
    contents = {"format": INDEX_FORMAT, "tars": index.tars, "classes": index.classes}
    names = np.frombuffer(os.fsencode("\0".join(index.names)), dtype=np.uint8)
    arrays: dict = {"contents": json.dumps(contents), "names": names, "places": index.places}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        remedy = "dataset.options.index_folder can be a folder that can be written"
        logger.warning("cannot write %s (%s): each start scans again; %s", path, error, remedy)


def list_tars(folder: Path, only: str) -> list[TarFile]:
    """Sorted by name; there must be some, and none that is compressed."""
    tars = []
    try:
        for path in [folder / only] if only else sorted(folder.iterdir()):
            if path.name.startswith(".") or path.is_dir():
                continue
            require_not_compressed(str(path))
            if path.name.lower().endswith(".tar"):
                status = path.stat()
                tars.append(TarFile(path.name, status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    if not tars:
        raise DataError(f"{folder} contains no tar files; expected {folder}/*.tar")
    return tars


def require_not_compressed(path: str) -> None:
    if path.lower().endswith(COMPRESSED):
        raise DataError(f"{path} is compressed; expected plain .tar files: decompress it first")


class Member(NamedTuple):
    """An image inside a tar."""

    category: str
    name: str
    tar: str
    offset: int
    size: int


class Piece(NamedTuple):
    """What is scanned in one go: a tar, or a tar inside a tar."""

    tar: str
    inside: str  # name of the inner tar; empty for the tar itself
    start: int
    end: int


def scan_tars(folder: Path, tars: list[TarFile]) -> TarIndex:
    members: list[Member] = []
    pieces = [Piece(tar.name, "", 0, tar.size) for tar in tars]
    title = f"indexing {len(pieces)} tar files in {folder}"
    # Threads, because a scan mostly waits for the file server. Forked processes would read headers
    # in memory faster, but would also copy a process that uses a GPU, and could outlive it.
    bar = tqdm(desc=title, unit=" images", leave=False, disable=None)
    with bar as progress, ThreadPoolExecutor(files.SCAN_THREADS) as pool:
        if progress.disable:  # no terminal
            logger.info(title)
        while pieces:
            results = list(pool.map(partial(scan, folder, progress), pieces))
            members.extend(member for images, _ in results for member in images)
            pieces = [inner for _, inner_tars in results for inner in inner_tars]
    if empty := sorted({tar.name for tar in tars} - {member.tar for member in members}):
        problem = f"tar files that contain no images: {first_few(empty)}"
        raise DataError(f"{folder} has {problem}; {files.ENDINGS}")
    members.sort(key=lambda member: (member.category, member.name.rpartition("/")[2], *member[1:]))
    classes = sorted({member.category for member in members})
    label_of = {name: label for label, name in enumerate(classes)}
    number_of = {tar.name: number for number, tar in enumerate(tars)}
    names = PathList([member.name for member in members])
    places = [(label_of[m.category], number_of[m.tar], m.offset, m.size) for m in members]
    return TarIndex(tars, classes, names, np.array(places, dtype=PLACE))


def scan(folder: Path, progress: tqdm, piece: Piece) -> tuple[list[Member], list[Piece]]:
    """The images and the inner tars of one tar."""
    path = os.path.join(folder, piece.tar, piece.inside).rstrip("/")
    own_class = PurePosixPath(path).stem
    images: dict[str, Member] = {}  # by name: of several the last counts, as in unpacking
    inner_tars = []
    for member in members_of(folder, piece, path):
        parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
        if not member.isreg() or any(part.startswith(".") for part in parts):
            continue
        name = "/".join([piece.inside, *parts] if piece.inside else parts)
        require_not_compressed(f"{path}/{member.name}")
        if name.lower().endswith(files.EXTENSIONS):
            if member.issparse():
                raise DataError(f"{path} holds {member.name} with holes: pack without --sparse")
            category = parts[-2] if len(parts) > 1 else own_class
            images[name] = Member(category, name, piece.tar, member.offset_data, member.size)
            progress.update()
        elif name.lower().endswith(".tar"):
            start = member.offset_data
            inner_tars.append(Piece(piece.tar, name, start, start + member.size))
    return list(images.values()), inner_tars


def members_of(folder: Path, piece: Piece, path: str) -> Iterator[tarfile.TarInfo]:
    """Whatever a tar contains. tarfile takes a damaged header for the end: here a block of zeros
    must follow the last member, then nothing else."""
    outer = os.path.join(folder, piece.tar)
    try:
        with open(outer, "rb", buffering=SCAN_BUFFER) as file:
            file.seek(piece.start)
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 (it holds nothing of its own: `file` is closed)
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                yield member
                if tar.offset >= piece.end:
                    break
            file.seek(tar.offset)
            rest = file.read(max(0, min(piece.end - tar.offset, MOST_PADDING)))
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
                raise tarfile.ReadError(f"no zeros from byte {tar.offset} to its end")
    except OSError as error:
        raise DataError(f"cannot read {outer}: {error.strerror}") from error
    # The last three: numbers that make no sense.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        problem = (
            f"is damaged, incomplete, compressed or joined by cat: {str(error) or repr(error)}"
        )
        raise DataError(f"{path} {problem}; expected a plain tar, copied whole") from error
