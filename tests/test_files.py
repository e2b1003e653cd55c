"""One way of writing a file whole."""

import os
from pathlib import Path

import pytest

from util.files import write_whole


def test_the_order_that_survives_a_power_cut(tmp_path, monkeypatch):
    """Contents first, then the name, then the folder that holds it."""
    done = []

    def noting(name: str):
        function = getattr(os, name)

        def note(*arguments):
            on = arguments[0]
            path = Path(os.readlink(f"/proc/self/fd/{on}")) if isinstance(on, int) else Path(on)
            done.append((name, path.name.partition(".")[0], path.suffix))
            return function(*arguments)

        monkeypatch.setattr(os, name, note)

    for name in ("fsync", "replace"):
        noting(name)
    write_whole(tmp_path / "file.txt", b"whole")
    assert (tmp_path / "file.txt").read_bytes() == b"whole"
    assert done == [
        ("fsync", "file", ".writing"),
        ("replace", "file", ".writing"),
        ("fsync", tmp_path.name, ""),
    ]


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"
