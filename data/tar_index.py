"""The index of a folder of .tar files: where each image lies. Built once, saved, used by all.

It is valid as long as the tars have the same names, sizes and times. It lies next to them, or where
that is not allowed, in ~/.cache/latent-mim.
"""

import fcntl
import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from data.base import DataError, first_few
from data.files import ENDINGS, EXTENSIONS, SCAN_THREADS, PathList
from util.files import write_whole

logger = logging.getLogger("lmim.data")

INDEX_NAME = "index-latent-mim.npz"
CACHE_FOLDER = "~/.cache/latent-mim"
INDEX_FORMAT = 2
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
# Headers lie a whole image apart. The default buffer is the file system's preferred size:
# on a cluster often a megabyte, and the scan would read everything.
SCAN_BUFFER = 4096
# Behind its end mark, a tar is filled up with zeros; some kilobytes are usual.
MOST_PADDING = 2**20


class TarFile(NamedTuple):
    """With another size or time, a tar is scanned again."""

    name: str
    size: int
    modified: int  # nanoseconds


class Member(NamedTuple):
    """An image inside a tar."""

    category: str
    name: str  # inside the tar; for one in an inner tar: inner.tar/name
    tar: str
    offset: int
    size: int


class Piece(NamedTuple):
    """What is scanned in one go: a tar, or a tar inside a tar."""

    tar: str
    inside: str  # name of the inner tar; empty for the tar itself
    start: int
    end: int


# Where an image lies; label and tar are positions in the classes and in the tars. An array of this
# stays shared, as PathList says.
PLACE = np.dtype([("label", "i8"), ("tar", "i4"), ("offset", "i8"), ("size", "i8")])


class TarIndex(NamedTuple):
    """Where the images of a folder of tars lie, sorted by class and then by file name."""

    tars: list[TarFile]
    classes: list[str]
    names: PathList
    places: np.ndarray  # PLACE [N]

    def members(self) -> Iterator[Member]:
        for name, (label, tar, offset, size) in zip(self.names, self.places.tolist(), strict=True):
            yield Member(self.classes[label], name, self.tars[tar].name, offset, size)


def make_index(tars: list[TarFile], members: list[Member]) -> TarIndex:
    members.sort(key=lambda member: (member.category, member.name.rpartition("/")[2], *member[1:]))
    classes = sorted({member.category for member in members})
    label_of = {name: label for label, name in enumerate(classes)}
    number_of = {tar.name: number for number, tar in enumerate(tars)}
    names = PathList([member.name for member in members])
    places = [(label_of[m.category], number_of[m.tar], m.offset, m.size) for m in members]
    return TarIndex(tars, classes, names, np.array(places, dtype=PLACE))


def index_of(folder: Path, index_folder: str | None, only: str = "") -> TarIndex:
    """The saved index if it fits the tars, or else a new one, which one process makes for all.
    only: the name of the one tar that counts."""
    tars, place = list_tars(folder, only), index_place(folder, index_folder, only)
    index = read_index(place)
    if index is not None and index.tars == tars:
        return index
    with locked(place):
        # Another process may have written it while this one waited.
        tars, index = list_tars(folder, only), read_index(place)
        if index is None or index.tars != tars:
            index = scan_tars(folder, tars, index)
            write_index(index, place)
    return index


def index_place(folder: Path, index_folder: str | None, only: str = "") -> Path:
    next_to_tars = folder / (f"{only}-{INDEX_NAME}" if only else INDEX_NAME)
    if index_folder is None and (next_to_tars.exists() or os.access(folder, os.W_OK)):
        return next_to_tars
    digest = hashlib.sha256(os.fsencode((folder / only).resolve())).hexdigest()[:32]
    return Path(index_folder or CACHE_FOLDER).expanduser() / f"{digest}.npz"


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """The kernel gives the lock back when its process ends, however it ends."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = open(place.with_name(f".{place.name}.lock"), "a")  # noqa: SIM115 (closed below, by `with`)
    except OSError as error:
        valid = f"a folder that can be written, which {place.parent} is not"
        raise DataError(f"dataset.options.index_folder: expected {valid}") from error
    with lock:
        # On a file system without locks each process makes the same index and puts it there.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
        tars = [TarFile(*tar) for tar in contents["tars"]]
        index = TarIndex(tars, contents["classes"], PathList(names), places)
        ends = np.array([tar.size for tar in tars])[places["tar"]]
        lie_inside = (ends - places["offset"] >= places["size"]).all()
        counted = min(places[name].min() for name in PLACE.names) >= 0
        labelled = places["label"].max() < len(index.classes) and len(places) == len(names)
        is_sound = lie_inside and counted and labelled and places.dtype == PLACE
        return index if contents["format"] == INDEX_FORMAT and is_sound else None
    except Exception as error:  # damage shows in many ways; a new index replaces it
        logger.info("the index %s cannot be read (%s): it is made again", path, error)
        return None


def write_index(index: TarIndex, path: Path) -> None:
    contents = {"format": INDEX_FORMAT, "tars": index.tars, "classes": index.classes}
    names = np.frombuffer(os.fsencode("\0".join(index.names)), dtype=np.uint8)
    arrays: dict = {"contents": json.dumps(contents), "names": names, "places": index.places}
    try:
        write_whole(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        logger.warning("cannot write %s (%s): the next start scans again", path, error)


def list_tars(folder: Path, only: str = "") -> list[TarFile]:
    """Sorted by name; there must be some, and none that is compressed."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; expected {folder}/*.tar")
    tars = []
    try:
        for path in [folder / only] if only else sorted(folder.iterdir()):
            if path.name.startswith(".") or path.is_dir():
                continue
            if path.name.lower().endswith(COMPRESSED):
                raise compressed(str(path))
            if path.name.lower().endswith(".tar"):
                status = path.stat()
                tars.append(TarFile(path.name, status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    if not tars:
        raise DataError(f"{folder} contains no tar files; expected {folder}/*.tar")
    return tars


def compressed(path: str) -> DataError:
    return DataError(f"{path} is compressed; expected plain .tar files: decompress it first")


def scan_tars(folder: Path, tars: list[TarFile], known: TarIndex | None) -> TarIndex:
    """The index of `tars`; those that `known` has are not scanned again."""
    unchanged = {tar.name for tar in set(tars) & set(known.tars)} if known else set()
    members = [member for member in known.members() if member.tar in unchanged] if known else []
    pieces = [Piece(tar.name, "", 0, tar.size) for tar in tars if tar.name not in unchanged]
    title = f"indexing {len(pieces)} tar files in {folder}"
    # Threads, because a scan mostly waits for the file server. Forked processes would read headers
    # in memory faster, but would also copy a process that uses a GPU, and could outlive it.
    bar = tqdm(desc=title, unit=" images", leave=False, disable=None)
    with bar as progress, ThreadPoolExecutor(SCAN_THREADS) as pool:
        if progress.disable:  # no terminal
            logger.info(title)
        while pieces:
            results = list(pool.map(partial(scan, folder, progress), pieces))
            members.extend(member for images, _ in results for member in images)
            pieces = [inner for _, inner_tars in results for inner in inner_tars]
    if empty := sorted({tar.name for tar in tars} - {member.tar for member in members}):
        problem = f"tar files that contain no images: {first_few(empty)}"
        raise DataError(f"{folder} has {problem}; {ENDINGS}")
    return make_index(tars, members)


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
        ending = name[-10:].lower()
        if ending.endswith(EXTENSIONS):
            if member.issparse():
                raise DataError(f"{path} holds {member.name} with holes: pack without --sparse")
            category = parts[-2] if len(parts) > 1 else own_class
            images[name] = Member(category, name, piece.tar, member.offset_data, member.size)
            progress.update()
        elif ending.endswith(".tar"):
            start = member.offset_data
            inner_tars.append(Piece(piece.tar, name, start, start + member.size))
        elif ending.endswith(COMPRESSED):
            raise compressed(f"{path}/{member.name}")
    return list(images.values()), inner_tars


def members_of(folder: Path, piece: Piece, path: str) -> Iterator[tarfile.TarInfo]:
    """Whatever a tar contains. tarfile takes a damaged header for the end; here it is an error."""
    outer = os.path.join(folder, piece.tar)
    try:
        with open(outer, "rb", buffering=SCAN_BUFFER) as file:
            file.seek(piece.start)
            is_compressed = file.read(8).startswith(COMPRESSED_STARTS)
            file.seek(piece.start)
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 (it holds nothing of its own: `file` is closed)
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.isreg() and member.offset_data + member.size > piece.end:
                    raise tarfile.ReadError(f"it ends in the middle of {member.name}")
                yield member
                if tar.offset >= piece.end:
                    break
            check_end(file, tar.offset, piece.end)
    except OSError as error:
        raise DataError(f"cannot read {outer}: {error.strerror}") from error
    # The last three: numbers that make no sense.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        if is_compressed:
            raise compressed(path) from error
        problem = f"is damaged or incomplete: {str(error) or repr(error)}"
        raise DataError(f"{path} {problem}; copy or download it again") from error


def check_end(file: BinaryIO, offset: int, end: int) -> None:
    """Where the last member ends, a block of zeros must follow, then nothing else."""
    file.seek(offset)
    rest = file.read(max(0, min(end - offset, MOST_PADDING)))
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end mark")
    if any(rest[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"no member begins at byte {offset}")
    if rest.strip(b"\0"):
        hint = "join by tar --concatenate, not cat"
        raise tarfile.ReadError(f"it goes on after its end mark ({hint})")
