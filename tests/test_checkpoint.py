"""Checkpoint files: whole or not there, found again, refused where they do not fit."""

import multiprocessing
import os
import pickle
import random
import socket
import struct
import time
import zipfile

import pytest
import torch

from launch.config import compose_config
from launch.job import prepare_job_directory
from launch.lock import unlock
from util.checkpoint import (
    FORMAT,
    CheckpointError,
    CheckpointWriter,
    checkpoint_name,
    list_checkpoints,
    load_file,
    load_weights,
    newest_readable,
)


def contents(value: float) -> dict:
    weights = {"weight": torch.full((1000,), value)}
    return {"state_dict": weights, "step": int(value), "epoch": 0, "config": {"epochs": 1}}


def save(folder, steps, epochs=()) -> list[str]:
    """-> what was reported"""
    reports = []
    writer = CheckpointWriter(folder, reports.append)
    for step in steps:
        writer.save(contents(step), step, step if step in epochs else None)
    writer.wait()
    return reports


def names(folder) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_the_last_two_and_the_epochs_are_kept(tmp_path):
    assert save(tmp_path, [1, 2, 3, 4, 5, 6], epochs=[2, 4]) == []
    assert names(tmp_path) == [
        checkpoint_name(6),
        checkpoint_name(5),
        checkpoint_name(4, epoch=4),
        checkpoint_name(2, epoch=2),
    ]


def test_what_training_does_after_save_is_not_in_the_file(tmp_path):
    weight = torch.zeros(2_000_000)
    writer = CheckpointWriter(tmp_path, print)
    writer.save({"weight": weight, "nested": [{"weight": weight}]}, 1)
    weight.fill_(7)
    writer.wait()
    loaded = load_file(list_checkpoints(tmp_path)[0])
    assert loaded["weight"].abs().max() == 0
    assert loaded["nested"][0]["weight"].abs().max() == 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_newest_file_is_named_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, [1, 2])
    newest = tmp_path / checkpoint_name(2)
    whole = newest.read_bytes()
    newest.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hi"}[damage])
    reports = []
    path, loaded = newest_readable(tmp_path, reports.append)
    assert path.name == checkpoint_name(1) and loaded["step"] == 1
    assert len(reports) == 1
    assert str(newest) in reports[0]


def places_of_numbers(path) -> list[range]:
    """Where the bytes of each tensor lie in the file."""
    with zipfile.ZipFile(path) as archive:
        found = [record for record in archive.infolist() if "/data/" in record.filename]
    contents, places = path.read_bytes(), []
    for record in found:
        name, extra = struct.unpack("<2H", contents[record.header_offset + 26 :][:4])
        start = record.header_offset + 30 + name + extra
        places.append(range(start, start + record.file_size))
    return places


def test_twenty_flipped_bits_are_named_and_none_is_used(tmp_path):
    """In a whole training state; among them at least one of each kind of tensor."""
    layer = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(30)).sum().backward()
    optimizer.step()
    state = {"state_dict": layer.state_dict(), "optimizer": optimizer.state_dict()}
    writer = CheckpointWriter(tmp_path, print)
    for step in (1, 2):
        writer.save(state | {"step": step, "config": {}}, step)
    writer.wait()
    newest = tmp_path / checkpoint_name(2)
    whole, places = newest.read_bytes(), places_of_numbers(newest)
    assert len(places) == 8
    chance = random.Random(0)
    for flip in range(20):
        which = flip % 8
        damaged = bytearray(whole)
        damaged[chance.choice(places[which])] ^= 1 << chance.randrange(8)
        newest.write_bytes(damaged)
        reason = rf"{newest} is damaged: \S+/data/{which} has changed"
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_file(newest)
        reports = []
        assert newest_readable(tmp_path, reports.append)[0].name == checkpoint_name(1)
        assert reports == [f"{caught.value}; using the one before"]


def test_files_without_check_values_are_read(tmp_path):
    """Those of torch before 1.6, and those that were written with the values switched off."""
    torch.save(contents(3), tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    torch.save(contents(3), tmp_path / "off")
    torch.serialization.set_crc32_options(True)
    for name in ("old", "off"):
        assert load_file(tmp_path / name)["step"] == 3


def test_nothing_readable_is_an_error_and_nothing_there_is_not(tmp_path):
    assert newest_readable(tmp_path / "none", print) is None
    save(tmp_path, [1, 2])
    for path in list_checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        newest_readable(tmp_path, lambda text: None)


def test_a_file_of_another_program_is_named_and_the_one_before_is_used(tmp_path):
    save(tmp_path, [1])
    newest = tmp_path / checkpoint_name(2)
    wrong = ({"step": "2"}, {"step": True}, {"step": -5}, {"step": 2.0}, {"config": None})
    ours = [contents(2) | change for change in wrong]
    for foreign in ([1, 2], torch.zeros(3), {"model": {}, "epoch": 3}, *ours):
        torch.save(foreign, newest)
        reports = []
        assert newest_readable(tmp_path, reports.append)[0].name == checkpoint_name(1)
        assert reports == [f"{newest} is of another program; using the one before"]


@pytest.mark.parametrize("number", [FORMAT + 1, "pt"])
def test_a_newer_format_is_refused_and_not_the_one_before_used(tmp_path, number):
    save(tmp_path, [1])
    torch.save(contents(2) | {"format": number}, tmp_path / checkpoint_name(2))
    words = f"{checkpoint_name(2)} has format {number}: expected 1 to {FORMAT}"
    with pytest.raises(CheckpointError, match=words):
        newest_readable(tmp_path, print)


def test_a_file_with_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    path = tmp_path / checkpoint_name(1)
    path.write_bytes(pickle.dumps({"state_dict": Harmful()}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_file(path)
    torch.save({"state_dict": Harmful()}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_file(path)
    assert not (tmp_path / "harm").exists()


def test_a_failed_write_is_reported_and_leaves_the_older_file(tmp_path):
    """The name is taken by a folder here; a full disk is tested with a small file system."""
    reports = []
    writer = CheckpointWriter(tmp_path, reports.append)
    writer.save(contents(1), 1)
    writer.wait()
    (tmp_path / f"{checkpoint_name(2)}.{socket.gethostname()}-{os.getpid()}.writing").mkdir()
    writer.save(contents(2), 2)
    writer.wait()
    assert len(reports) == 1
    assert "step-00000002.pth could not be written" in reports[0]
    assert names(tmp_path) == [checkpoint_name(1)]
    writer.save(contents(3), 3)
    writer.wait()
    assert len(reports) == 1 and names(tmp_path)[0] == checkpoint_name(3)


def test_an_old_checkpoint_that_cannot_be_removed_is_said(tmp_path):
    """A folder of that name here: also root cannot remove it as a file."""
    (tmp_path / checkpoint_name(1)).mkdir()
    (report,) = save(tmp_path, [2, 3])
    assert f"{checkpoint_name(1)} could not be removed (Is a directory)" in report
    assert names(tmp_path) == [checkpoint_name(3), checkpoint_name(2), checkpoint_name(1)]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    cfg = compose_config("demo", [f"output_dir={tmp_path}"])
    leftover = tmp_path / "demo" / "checkpoints" / "step-00000009.writing"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    unlock(prepare_job_directory(cfg))
    assert not leftover.exists()


def test_weights_of_another_architecture_are_refused_with_the_first_differences():
    small, large = torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)
    with pytest.raises(CheckpointError, match=r"file holds .*size mismatch for weight: .*\[3, 2\]"):
        load_weights(large, small.state_dict(), "file")
    with pytest.raises(CheckpointError, match='Missing key.*"bias". Unexpected key.*"extra"'):
        load_weights(small, {"weight": small.weight, "extra": small.bias}, "file")


def test_the_prefix_of_published_checkpoints_is_accepted():
    source, target = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    load_weights(target, {f"module.{k}": v for k, v in source.state_dict().items()}, "file")
    assert torch.equal(source.weight, target.weight)


def write_for_ever(folder) -> None:
    writer = CheckpointWriter(folder, print)
    for step in range(1, 10**9):
        weight = torch.full((300_000,), float(step))
        writer.save({"weight": weight, "step": step}, step)


@pytest.mark.slow
def test_kill_during_writing_always_leaves_a_whole_newest_file(tmp_path):
    """kill -9 at 20 moments of a process that does nothing but write checkpoints."""
    found_half_written = 0
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=[folder])
        process.start()
        while len(list_checkpoints(folder)) < 2:
            time.sleep(0.001)
        time.sleep(0.0007 * attempt)
        process.kill()
        process.join()
        found_half_written += any(folder.glob("*.writing"))
        newest = list_checkpoints(folder)[0]
        loaded = load_file(newest)
        assert newest.name == checkpoint_name(loaded["step"])
        assert (loaded["weight"] == loaded["step"]).all()
    assert found_half_written > 0, "no kill fell into a write: the test proves nothing"
