"""The loaders' promises: the same batches for any workers, any split into processes, any resume."""

import ctypes
import logging
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from data import picture
from data.base import UnusableImages
from data.datasets import DataError, build_dataset
from data.loader import EvalLoader, TrainLoader, epoch_order
from data.transforms import EvalTransform, TrainTransform

IMAGES = 50


class Numbered:
    """Images that carry their index as colour, so that a batch tells what it was made of."""

    classes = None

    def __init__(self, size: int = IMAGES, labelled: bool = True) -> None:
        self.size = size
        self.labels = np.arange(size) + 1000 if labelled else None

    def __len__(self) -> int:
        return self.size

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (12, 10), (index, 0, 0))

    def describe(self, index: int) -> str:
        return f"numbered[{index}]"


def train_loader(dataset=None, **settings) -> TrainLoader:
    defaults = {
        "seed": 3,
        "batch_size": 4,
        "accum_iter": 1,
        "rank": 0,
        "world_size": 1,
        "num_workers": 0,
        "device": "cpu",
    }
    transform = settings.pop("transform", TrainTransform(side=8, min_crop=0.2, flip=True, seed=3))
    return TrainLoader(dataset or Numbered(), transform, **defaults | settings)


def indices_of(batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def steps(loader: TrainLoader, first: int, last: int) -> list[list[int]]:
    """The image indices of each step, micro-step after micro-step."""
    batches = [indices_of(batch) for batch in loader.stream(first, last)]
    steps = loader.accum_iter
    return [sum(batches[start : start + steps], []) for start in range(0, len(batches), steps)]


def assert_same_batches(ours, theirs) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert one.unreadable == other.unreadable


# ---- Order. --------------------------------------------------------------------------------------


def test_epoch_order_is_a_permutation_that_seed_and_epoch_decide():
    order = epoch_order(100, seed=1, epoch=2)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(100))
    assert torch.equal(order, epoch_order(100, seed=1, epoch=2))
    assert not torch.equal(order, epoch_order(100, seed=1, epoch=3))
    assert not torch.equal(order, epoch_order(100, seed=2, epoch=2))


def test_an_epoch_runs_whole_steps_and_no_image_twice():
    loader = train_loader(batch_size=4, accum_iter=3)
    assert loader.steps_per_epoch == 4
    for epoch in range(2):
        seen = sum(steps(loader, epoch * 4, epoch * 4 + 4), [])
        assert seen == epoch_order(IMAGES, 3, epoch)[:48].tolist()


def test_images_and_labels_belong_together():
    batch = next(train_loader().stream(0, 1))
    assert batch.images.shape == (4, 3, 8, 8) and batch.images.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [index + 1000 for index in indices_of(batch)]


def test_images_without_labels_get_minus_one():
    batch = next(train_loader(Numbered(labelled=False)).stream(0, 1))
    assert batch.labels.tolist() == [-1] * 4


def test_a_data_set_smaller_than_one_step_is_an_error():
    with pytest.raises(DataError, match="50 images, but one step needs 64: batch_size=16 x accum"):
        train_loader(batch_size=16, accum_iter=2, world_size=2)


# ---- What must not change the images of a step. --------------------------------------------------


def test_processes_share_the_images_of_one_large_batch():
    alone = [indices_of(batch) for batch in train_loader(batch_size=8).stream(0, 9)]
    ranks = [train_loader(batch_size=4, world_size=2, rank=rank).stream(0, 9) for rank in range(2)]
    shared = [indices_of(first) + indices_of(second) for first, second in zip(*ranks, strict=True)]
    assert shared == alone


def test_accumulation_splits_a_batch_without_changing_it():
    assert steps(train_loader(batch_size=4, accum_iter=2), 0, 9) == steps(
        train_loader(batch_size=8, accum_iter=1), 0, 9
    )


def test_processes_and_accumulation_together_see_each_step_once():
    ranks = [
        steps(train_loader(batch_size=3, accum_iter=2, world_size=2, rank=rank), 2, 7)
        for rank in range(2)
    ]
    alone = steps(train_loader(batch_size=12), 2, 7)
    for step, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert sorted(parts[0] + parts[1]) == sorted(step)


def test_pixels_do_not_depend_on_the_number_of_workers():
    dataset = build_dataset("textures", "train", options={"image_size": 24, "train_images": 22})
    # Five steps an epoch: the stream crosses epochs, and three workers share them unevenly.
    streams = [train_loader(dataset, num_workers=workers).stream(3, 14) for workers in (0, 3)]
    expected, found = (list(stream) for stream in streams)
    assert len(expected) == 11
    assert_same_batches(found, expected)


def test_resuming_continues_the_uninterrupted_stream():
    dataset = build_dataset("digits", "eval")
    dataset.images = dataset.images[:IMAGES]
    # Six steps an epoch: the starts lie inside epochs and on their borders.
    whole = list(train_loader(dataset, accum_iter=2).stream(0, 15))
    for first_step, workers in ((1, 0), (5, 0), (6, 1), (12, 0), (13, 0)):
        resumed = train_loader(dataset, accum_iter=2, num_workers=workers).stream(first_step, 15)
        assert_same_batches(resumed, whole[first_step * 2 :])


def test_workers_leave_torchs_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(train_loader(num_workers=1).stream(0, 2))
    assert torch.equal(torch.rand(1), expected)


class WorkerSignals(Numbered):
    """Sends its own process the signals of a scheduler before each image."""

    def load(self, index: int) -> Image.Image:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        return super().load(index)


def test_workers_are_forked_whatever_else_is_started_how(monkeypatch):
    """Spawned, they would have to get the data set through a pickle, and import everything."""
    default = multiprocessing.context._default_context
    monkeypatch.setattr(default, "_actual_context", multiprocessing.get_context("spawn"))

    class CannotBePickled(Numbered):
        """Not at the top of a module, and so in no pickle."""

    assert len(list(train_loader(CannotBePickled(), num_workers=1).stream(0, 2))) == 2


def test_workers_outlive_the_signals_of_the_scheduler():
    assert_same_batches(
        train_loader(WorkerSignals(), num_workers=2).stream(0, 6), train_loader().stream(0, 6)
    )


def test_a_stream_can_be_left_early():
    stream = train_loader(num_workers=2).stream(0, 10_000)
    assert len(list(islice(stream, 3))) == 3
    stream.close()


# ---- Unreadable images. --------------------------------------------------------------------------


@pytest.fixture
def damaged_folder(tmp_path):
    """Twelve JPEG files 00.jpg .. 11.jpg, the brightness telling the number; 4, 5 and 11 broken."""
    for number in range(12):
        Image.new("RGB", (20, 20), (number * 20,) * 3).save(tmp_path / f"{number:02d}.jpg")
    content = (tmp_path / "04.jpg").read_bytes()
    (tmp_path / "04.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "05.jpg").write_bytes(b"")
    (tmp_path / "11.jpg").write_text("not an image")
    return tmp_path


def test_an_unreadable_image_is_replaced_by_the_next_and_reported(damaged_folder, caplog):
    dataset = build_dataset("folder", "train", damaged_folder)
    loader = train_loader(dataset, batch_size=12, num_workers=2)
    with caplog.at_level(logging.WARNING, logger="lmim.data"):
        batches = list(loader.stream(0, 2))
    replaced = {4: 6, 5: 6, 11: 0}
    for epoch, batch in enumerate(batches):
        order = epoch_order(12, 3, epoch).tolist()
        expected = [20 * replaced.get(index, index) for index in order]
        assert np.allclose(batch.images[:, 0, 4, 4], expected, atol=3)
        # 4 falls through to 5 and on to 6, so 5 is reported for both.
        assert sorted(path[-6:] for path in batch.unreadable) == [
            "04.jpg",
            "05.jpg",
            "05.jpg",
            "11.jpg",
        ]
    broken = {str(damaged_folder / name) for name in ("04.jpg", "05.jpg", "11.jpg")}
    assert loader.bad_images == broken
    assert sorted(record.args[-1] for record in caplog.records) == sorted(broken)


class OddOnly(Numbered):
    def load(self, index: int) -> Image.Image:
        if index % 2 == 0:
            raise OSError("even")
        return super().load(index)


def test_a_replacement_brings_its_own_label():
    batch = next(train_loader(OddOnly(), batch_size=20).stream(0, 1))
    assert batch.unreadable
    assert all(index % 2 for index in indices_of(batch))
    assert batch.labels.tolist() == [index + 1000 for index in indices_of(batch)]


def test_a_replacement_is_cropped_with_the_numbers_of_the_image_asked_for():
    def by_index(picture, epoch: int, index: int):
        return torch.tensor(index, dtype=torch.uint8).expand(3, 8, 8)

    batch = next(train_loader(OddOnly(), transform=by_index, batch_size=20).stream(0, 1))
    asked = epoch_order(IMAGES, 3, 0)[:20]
    assert indices_of(batch) == asked.tolist()
    assert batch.labels.tolist() == (1000 + (asked | 1)).tolist()


def test_too_many_unreadable_images_stop_the_training(damaged_folder):
    dataset = build_dataset("folder", "train", damaged_folder)
    tolerant = train_loader(dataset, max_bad_images=0.25)
    strict = train_loader(dataset, max_bad_images=0.24)
    for loader in (tolerant, strict):
        list(loader.stream(0, 3))
    tolerant.check_bad_images()
    with pytest.raises(DataError, match=r"3 of 12 .* max_bad_images=0.24 .*04.jpg, .*05.jpg, .*11"):
        strict.check_bad_images()


def loaders(folder, workers: int) -> dict:
    """Each with what it gives."""
    train, evaluation = (build_dataset("folder", name, folder) for name in ("train", "eval"))
    loader = eval_loader(evaluation, batch_size=2, num_workers=workers)
    return {
        "train": train_loader(train, batch_size=4, num_workers=workers).stream(0, 3),
        "eval": iter(loader),
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("most, warnings", [(4095, 1), (65535, 0)])
def test_dark_images_of_16_bits_are_warned_of_once(tmp_path, workers, most, warnings, monkeypatch):
    monkeypatch.setattr(picture, "DARK_IS_SAID", mmap.mmap(-1, 1))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        values = np.full((20, 20), most * (number + 2) // 9, dtype=np.uint16)
        Image.fromarray(values).save(folder / f"{number}.png")
    logger, handler = logging.getLogger("lmim.data"), logging.FileHandler(tmp_path / "log")
    logger.addHandler(handler)
    kinds = [*loaders(folder, workers).values(), *loaders(folder, workers).values()]
    found = {
        int(image[0, 5, 5]) for batches in kinds for batch in batches for image in batch.images
    }
    logger.removeHandler(handler)
    assert found == {most * (number + 2) // 9 >> 8 for number in range(8)}
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == warnings
    for line in lines:
        assert str(folder) in line and "dataset.options.max_value=4095 reads 12 bits" in line


@pytest.mark.parametrize("kind, workers", [("train", 2), ("eval", 0)])
def test_the_first_image_whose_range_is_unknown_ends_the_run(tmp_path, kind, workers):
    for number in range(8):
        Image.fromarray(np.ones((20, 20), dtype=np.float32)).save(tmp_path / f"{number}.tif")
    message = rf"^dataset.options.max_value=null: expected the value that is white in {tmp_path}/"
    with pytest.raises(UnusableImages, match=message) as caught:
        list(loaders(tmp_path, workers)[kind])
    assert caught.value.exit_code == 2, "the same after some steps"


def test_a_folder_without_any_readable_image_is_one_clear_error(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    loader = train_loader(build_dataset("folder", "train", tmp_path))
    with pytest.raises(DataError, match="^20 images in a row .* cannot identify image file"):
        list(loader.stream(0, 1))


def test_an_evaluation_of_no_image_at_all_is_an_error():
    """Also where max_bad_images allows each of them."""
    loader = eval_loader(Numbered(2))
    loader.leave_out(["a.jpg"])
    with pytest.raises(UnusableImages, match=r"^2 of 2 images .* allows: a.jpg, b.jpg$"):
        loader.leave_out(["b.jpg"])


def test_an_error_in_a_worker_does_not_keep_the_workers(tmp_path):
    """Nor does what holds the traceback of that error, as pytest.raises does."""
    (tmp_path / "empty.jpg").write_bytes(b"")
    loader = train_loader(build_dataset("folder", "train", tmp_path), batch_size=1, num_workers=2)
    others = set(multiprocessing.active_children())
    with pytest.raises(DataError) as caught:
        list(loader.stream(0, 1))
    assert set(multiprocessing.active_children()) <= others
    assert caught.value.__traceback__


HOLDS_ITS_WORKERS = """
from data.datasets import build_digits
from data.loader import TrainLoader
from data.transforms import TrainTransform

order = {"seed": 3, "batch_size": 4, "accum_iter": 1, "rank": 0, "world_size": 1}
transform = TrainTransform(side=8, min_crop=0.2, flip=True, seed=3)
loader = TrainLoader(build_digits("eval", None), transform, num_workers=2, device="cpu", **order)
stream = loader.stream(0, 10_000)
print(next(stream).unreadable)
"""


def load_with_shared_memory_of(size: str, num_workers: int, answer) -> None:
    ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS: what is mounted here is seen here alone
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
    transform = TrainTransform(side=200, min_crop=0.2, flip=True, seed=3)  # 480 kB a batch
    try:
        batches = list(train_loader(transform=transform, num_workers=num_workers).stream(0, 8))
        answer.write_text(f"{len(batches)} batches")
    except DataError as error:
        answer.write_text(str(error))
    finally:
        os._exit(0)  # as a command does: the workers ignore the TERM that multiprocessing sends


@pytest.mark.parametrize(("size", "num_workers"), [("64k", 2), ("512k", 2), ("64k", 0)])
def test_too_little_shared_memory_is_one_sentence(size, num_workers, tmp_path):
    """As in containers, which have a /dev/shm of their own."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    answer = tmp_path / "answer"
    arguments = [size, num_workers, answer]
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=load_with_shared_memory_of, args=arguments)
    process.start()
    process.join()
    if num_workers == 0:
        assert answer.read_text() == "8 batches"
    else:
        assert answer.read_text() == (
            "num_workers=2: expected 0, or more room in /dev/shm, through which loaders hand over "
            "images (docker run --shm-size=8g)"
        )


def test_a_process_ends_although_something_holds_its_workers():
    command = [sys.executable, "-c", HOLDS_ITS_WORKERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_a_bug_is_not_taken_for_an_unreadable_image():
    def broken_transform(image, epoch, index):
        raise AttributeError("a bug")

    with pytest.raises(AttributeError, match="a bug"):
        list(train_loader(transform=broken_transform).stream(0, 1))


# ---- Evaluation. ---------------------------------------------------------------------------------


def eval_loader(dataset, batch_size=4, rank=0, world_size=1, num_workers=0) -> EvalLoader:
    transform = EvalTransform(side=8)
    return EvalLoader(dataset, transform, batch_size, rank, world_size, num_workers, "cpu")


@pytest.mark.parametrize("size, world_size", [(50, 1), (50, 3), (8, 2), (2, 4)])
def test_evaluation_shares_the_images_without_loss_or_repeat(size, world_size):
    seen = []
    for rank in range(world_size):
        loader = eval_loader(Numbered(size), rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch.indices.tolist() == indices_of(batch)
            assert batch.labels.tolist() == [index + 1000 for index in indices_of(batch)]
            seen.extend(indices_of(batch))
    assert seen == list(range(size))


def test_evaluation_without_labels_says_so():
    assert next(iter(eval_loader(Numbered(labelled=False)))).labels is None


def test_evaluation_does_not_depend_on_workers_and_can_be_repeated():
    dataset = build_dataset("textures", "eval", options={"image_size": 24, "eval_images": 10})
    with_workers, without = (eval_loader(dataset, num_workers=workers) for workers in (2, 0))
    for loader in (with_workers, without, with_workers):
        images = torch.cat([batch.images for batch in loader])
        expected = torch.stack([EvalTransform(side=8)(dataset.load(i)) for i in range(10)])
        assert torch.equal(images, expected)


def test_evaluation_leaves_unreadable_images_out_up_to_max_bad_images(damaged_folder, caplog):
    dataset = build_dataset("folder", "eval", damaged_folder)
    dataset.labels = np.arange(12) + 1000
    loader = eval_loader(dataset, batch_size=2, num_workers=1)
    loader.max_bad_images = 0.25
    with caplog.at_level(logging.WARNING, logger="lmim.data"):
        batches = [*loader, *loader]
    kept = [0, 1, 2, 3, 6, 7, 8, 9, 10]  # 4 and 5 were a batch
    assert [index for batch in batches for index in batch.indices.tolist()] == 2 * kept
    assert [label - 1000 for batch in batches for label in batch.labels.tolist()] == 2 * kept
    brightness = [float(image[0, 4, 4]) for batch in batches for image in batch.images]
    assert np.allclose(brightness, [20 * index for index in 2 * kept], atol=3)
    names = {str(damaged_folder / name) for name in ("04.jpg", "05.jpg", "11.jpg")}
    assert loader.bad_images == names and len(caplog.records) == 3
    loader = eval_loader(dataset, batch_size=2)
    loader.max_bad_images = 0.24
    with pytest.raises(DataError, match=r"^3 of 12 .* max_bad_images=0.24 allows: .*/04.jpg, .*11"):
        list(loader)
