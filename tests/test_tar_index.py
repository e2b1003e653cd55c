"""The index of tar files: made once for all processes, whatever happens; and every bad tar."""

import gzip
import io
import logging
import os
import sys
import tarfile

import numpy as np
import pytest

from data import tar
from data.datasets import DataError
from data.tar import INDEX_NAME
from tests.tars import (
    PER_CLASS,
    build,
    contents,
    image_file,
    of_class,
    packed,
    write,
    write_class_tars,
)


@pytest.fixture
def root(tmp_path):
    return write_class_tars(tmp_path)


# ---- One index for all. --------------------------------------------------------------------------


@pytest.fixture
def scanned(monkeypatch):
    """The names of the tars that are scanned from now on."""
    names = []

    def recording(folder, progress, piece, scan=tar.scan):
        names.append(piece.tar)
        return scan(folder, progress, piece)

    monkeypatch.setattr(tar, "scan", recording)
    return names


def test_a_second_start_scans_nothing(root, scanned):
    first = build(root)
    index = root / "train" / INDEX_NAME
    written = index.stat().st_mtime_ns
    assert sorted(scanned) == sorted(PER_CLASS)
    assert sorted(path.name for path in index.parent.iterdir()) == sorted([INDEX_NAME, *PER_CLASS])
    scanned.clear()
    second = build(root)
    assert not scanned and index.stat().st_mtime_ns == written
    assert contents(second) == contents(first)
    assert [second.describe(i) for i in range(12)] == [first.describe(i) for i in range(12)]


def test_tars_that_changed_are_scanned_again(root, scanned):
    build(root)
    scanned.clear()
    write(root / "train" / "dog.tar", packed({"other.jpg": image_file(50)}))
    write(root / "train" / "bee.tar", packed({"bee.jpg": image_file(51)}))
    (root / "train" / "ant.tar").unlink()
    changed = build(root)
    assert sorted(scanned) == ["bee.tar", "cat.tar", "dog.tar"]
    cats = [("cat", file) for file in of_class("cat").values()]
    assert contents(changed) == [("bee", image_file(51)), *cats, ("dog", image_file(50))]
    os.utime(root / "train" / "cat.tar", ns=(1, 1))
    scanned.clear()
    assert contents(build(root)) == contents(changed) and len(scanned) == 3


def flipped(content: bytes) -> bytes:
    middle = content.index(b"ant_0")  # in the names of the images
    return content[:middle] + b"A" + content[middle + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a flipped bit": flipped,
    "text": lambda content: b"<html>404</html>",
    "another array": lambda content: array_file(np.arange(3)),
    "pickled": lambda content: array_file(np.array([{}], dtype=object)),
}


def array_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_anew(root, scanned, damage):
    expected = contents(build(root))
    index = root / "train" / INDEX_NAME
    intact = index.read_bytes()
    index.write_bytes(DAMAGES[damage](intact))
    scanned.clear()
    assert contents(build(root)) == expected and len(scanned) == 3
    assert index.read_bytes() == intact


def test_an_index_of_another_format_is_made_anew(root, scanned, monkeypatch):
    build(root)
    monkeypatch.setattr(tar, "INDEX_FORMAT", 1)
    build(root)
    assert len(scanned) == 6


def test_where_the_folder_cannot_be_written_the_index_lies_at_home(root, scanned, monkeypatch):
    monkeypatch.setenv("HOME", str(root / "home"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    expected = contents(build(root)), contents(build(root, "eval"))
    assert len(list((root / "home/.cache/latent-mim").glob("*.npz"))) == 2
    assert not list(root.glob(f"*/{INDEX_NAME}"))
    scanned.clear()
    assert (contents(build(root)), contents(build(root, "eval"))) == expected and not scanned


def test_where_nothing_can_be_written_a_folder_is_asked_for(root, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(write(root / "file", b"")))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(build(root)) == 12
    assert f"cannot write {root}/file/.cache/" in caplog.text
    assert "each start scans again; dataset.options.index_folder can be a folder" in caplog.text


def test_an_index_that_cannot_be_replaced_is_reported(root, scanned, caplog):
    (root / "train" / INDEX_NAME / "folder").mkdir(parents=True)
    assert len(build(root)) == 12
    assert f"cannot write {root}/train/{INDEX_NAME} (" in caplog.text
    assert not list(root.glob("train/.*.writing"))


def test_index_folder(root, scanned):
    folder = root / "some" / "where"
    for _ in range(2):
        assert len(build(root, "eval", index_folder=str(folder))) == 1
    assert len(scanned) == 4 and len(list(folder.glob("*.npz"))) == 2
    assert not list(root.glob(f"*/{INDEX_NAME}"))


def test_a_person_sees_progress_and_a_log_gets_one_line(root, monkeypatch, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="lmim.data"):
        build(root)
        assert caplog.messages == [f"indexing 3 tar files in {root}/train"]
        caplog.clear()
        (root / "train" / INDEX_NAME).unlink()
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        build(root)
        assert not caplog.messages
    shown = capsys.readouterr().err
    assert shown.startswith(f"\rindexing 3 tar files in {root}/train: ")
    assert shown.rstrip(" ").endswith("\r") or shown.rstrip("\r").endswith(" "), "it stays"


# ---- Bad tars. -----------------------------------------------------------------------------------

INTACT = packed(
    {"first.jpg": image_file(1), "second.jpg": image_file(2)}, format=tarfile.GNU_FORMAT
)
SECOND = 512 + -(-len(image_file(1)) // 512) * 512  # where its header begins
END = SECOND + 512 + -(-len(image_file(2)) // 512) * 512


def without_checksum(offset: int) -> bytes:
    return INTACT[: offset + 148] + b"zz" + INTACT[offset + 150 :]


def with_holes() -> bytes:
    member = tarfile.TarInfo("holes.jpg")
    member.size = 512
    member.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": "512"}
    return member.tobuf(tarfile.PAX_FORMAT) + bytes(512 + 10240)


DAMAGED = "is damaged, incomplete, compressed or joined by cat: "
BAD_TARS = {
    "compressed": (gzip.compress(INTACT), DAMAGED),
    "empty": (b"", DAMAGED),
    "short": (INTACT[:100], DAMAGED),
    "text": (b"<html>404</html>" * 100, DAMAGED),
    "first header": (without_checksum(0), DAMAGED),
    "second header": (without_checksum(SECOND), f"{DAMAGED}.*no zeros from byte "),
    "in the first": (INTACT[: SECOND - 600], f"{DAMAGED}.*(no zeros|unexpected end)"),
    "in the last": (INTACT[: END - 600], f"{DAMAGED}.*(no zeros|unexpected end)"),
    "between": (INTACT[:SECOND], f"{DAMAGED}.*no zeros from byte "),
    "in a header": (INTACT[: SECOND + 100], f"{DAMAGED}.*no zeros from byte "),
    "before its end": (INTACT[:END], rf"{DAMAGED}.*no zeros from byte \d+ to its end"),
    "joined": (INTACT + INTACT, rf"{DAMAGED}.*no zeros from byte \d+ to its end"),
    "with holes": (with_holes(), "holds holes.jpg with holes: pack without --sparse"),
}


@pytest.mark.parametrize("place", ["bad.tar", "outer.tar/deep/bad.tar"])
@pytest.mark.parametrize("kind", BAD_TARS)
def test_a_bad_tar_is_named(root, kind, place):
    stored, message = BAD_TARS[kind]
    if place.startswith("outer"):
        other = packed({"a.jpg": image_file(1)})
        stored = packed({"ok.jpg": image_file(1), "deep/bad.tar": stored, "other.tar": other})
    write(root / "train" / place.split("/")[0], stored)
    with pytest.raises(DataError, match=f"^{root}/train/{place} {message}"):
        build(root)
    assert not (root / "train" / INDEX_NAME).exists()


def test_a_tar_without_images_is_named(root):
    write(root / "train" / "bad.tar", packed({"a.txt": b"!"}))
    with pytest.raises(DataError, match="train has tar files that contain no images: bad.tar; exp"):
        build(root)


def test_compressed_tars_are_not_left_out(root):
    path = write(root / "train" / "bee.tar.gz", b"")
    with pytest.raises(DataError, match=f"^{path} is compressed; expected plain .tar files: dec"):
        build(root)
    path.unlink()
    write(root / "train" / "all.tar", packed({"x/bee.tgz": b""}))
    with pytest.raises(DataError, match="train/all.tar/x/bee.tgz is compressed"):
        build(root)


def test_a_broken_link_is_named(root):
    (root / "train" / "bee.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match="cannot read .*train/bee.tar: No such file"):
        build(root)
