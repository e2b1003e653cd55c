"""Batches on the device: which images, in which order, decoded by which process.

Everything here follows from (seed, step): a run that resumes at any step goes on with the very
batches it would have seen, and neither the number of workers nor the split into processes and
accumulation steps changes the images of a step.
"""

import atexit
import logging
import mmap
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from data.base import UNREADABLE, DataError, DataTimeout, ImageDataset, UnusableImages, first_few
from data.picture import Picture
from util.signals import STOP_SIGNALS
from util.streams import Stream, generator

logger = logging.getLogger("lmim.data")

# More unreadable images in a row mean that the file server is gone, or that the code is wrong.
MOST_NEIGHBOURS = 20
FOREVER = 1e8  # seconds
NO_LABEL = -1
SHARED_MEMORY = "/dev/shm"
QUEUE_BYTES = 2**16  # more than a worker's queue takes in it, without any image
Augmentation = Callable[[Picture, int, int], Tensor]  # of a picture, its epoch and its index
Loaded = tuple[Tensor, Tensor, tuple]  # images, labels, and for each the unreadable ones before it


class TrainBatch(NamedTuple):
    """One micro-step of one process."""

    images: Tensor  # uint8 [B, 3, H, W], on the device
    labels: Tensor  # int64 [B], on the device; -1 where there is none
    unreadable: list[str]  # images that could not be read; others took their places


class EvalBatch(NamedTuple):
    images: Tensor  # uint8 [B, 3, H, W], on the device
    labels: Tensor | None  # int64 [B], on the device; None if the data set has none
    indices: Tensor  # int64 [B], on the device


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in one epoch: int64 [size]."""
    return torch.from_numpy(generator(Stream.ORDER, seed, epoch).permutation(size))


def share_of(count: int, rank: int, world_size: int) -> slice:
    """This process's contiguous part of `count` pieces of work."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


class StepOrder:
    """Which images one process (`rank`) of `world_size` sees in each step.

    A step is one update of the optimiser: accum_iter micro-steps of all processes. Steps are always
    whole: the images that are left over at the end of an epoch are not run."""

    def __init__(
        self, images: int, seed: int, batch_size: int, accum_iter: int, rank: int, world_size: int
    ) -> None:
        self.images, self.seed = images, seed
        self.batch_size, self.accum_iter = batch_size, accum_iter
        self.rank, self.world_size = rank, world_size
        self.bad_images: set[str] = set()
        self.images_per_step = batch_size * accum_iter * world_size
        self.steps_per_epoch = images // self.images_per_step
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the dataset has {images} images, but one step needs {self.images_per_step}: "
                f"batch_size={batch_size} x accum_iter={accum_iter} x {world_size} processes"
            )

    def micro_steps(self, first_step: int, last_step: int) -> Iterator[tuple[int, list[int]]]:
        """For each micro-step of the steps first_step .. last_step - 1 the epoch, and which images
        are this process's. Steps are counted from the start of training."""
        order_epoch, order = None, None
        for step in range(first_step, last_step):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(self.images, self.seed, epoch)
            for micro_step in range(place * self.accum_iter, (place + 1) * self.accum_iter):
                start = (micro_step * self.world_size + self.rank) * self.batch_size
                yield epoch, order[start : start + self.batch_size].tolist()

    def stream(self, first_step: int, last_step: int) -> Iterator:
        """For each micro-step what is trained on: here the indices alone."""
        return (indices for _, indices in self.micro_steps(first_step, last_step))


class _Samples(Dataset):
    """What the workers read. A key is the index of an image, then what else the transform takes.

    A DataError is handed over as a value: raised here, it would reach the user wrapped in the
    worker's traceback."""

    def __init__(self, dataset: ImageDataset, transform: Callable, num_workers: int) -> None:
        self.dataset, self.transform = dataset, transform
        # By each worker the index of an image, or -1; workers are forked and share it.
        self.being_read = np.frombuffer(mmap.mmap(-1, 8 * max(num_workers, 1)), dtype=np.int64)
        self.being_read[:] = -1

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Tensor, int, list[str]] | DataError:
        """(image, label, unreadable): in place of images that cannot be read, which are named, the
        next one. It is cropped with the numbers of the image asked for: it may have its own turn in
        this epoch, with another crop."""
        index, *place = key
        unreadable, worker = [], getattr(get_worker_info(), "id", 0)
        for neighbour in range(index, index + MOST_NEIGHBOURS):
            position = neighbour % len(self.dataset)
            try:
                self.being_read[worker] = position
                picture = self.dataset.load(position)
                self.being_read[worker] = -1
                labels = self.dataset.labels
                label = NO_LABEL if labels is None else int(labels[position])
                return self.transform(picture, *place), label, unreadable
            except DataError as error:
                return error  # it says itself what is wrong
            except UNREADABLE as error:
                unreadable.append(self.dataset.describe(position))
                reason = error
        last = f"the last one being {unreadable[-1]}: {type(reason).__name__}: {reason}"
        return DataError(f"{MOST_NEIGHBOURS} images in a row could not be read, {last}")


def _collate(samples: list) -> Loaded | DataError:
    """Or the first error."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, labels, unreadable = zip(*samples, strict=True)
    # torch's own collation puts the images where the main process can read them, without a copy.
    return default_collate(list(images)), torch.tensor(labels), unreadable


def _start_worker(worker_id: int) -> None:
    """The main process alone decides when to stop: a signal to the whole job must not kill workers.
    They cannot outlive it: torch's workers end when their parent is gone."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Those still there when the process ends, after an error: multiprocessing would send a
    SIGTERM and wait for them forever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class Loader:
    """Images of a data set, read by this process or by workers of its own, and brought to the
    device. Those that cannot be read are named, each once."""

    unreadable_are = ""

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[..., Tensor],  # of what the data set loads
        num_workers: int,
        device: torch.device | str,
        data_timeout: float = 0,
        max_bad_images: float = 1,
    ) -> None:
        self.dataset, self.samples = dataset, _Samples(dataset, transform, num_workers)
        self.num_workers, self.device = num_workers, torch.device(device)
        self.data_timeout, self.max_bad_images = data_timeout, max_bad_images
        self.bad_images: set[str] = set()  # those of this process, until others are added

    def note_unreadable(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.bad_images:
                self.bad_images.add(name)
                logger.warning("unreadable image, %s: %s", self.unreadable_are, name)

    def check_bad_images(self) -> None:
        """Raise if too many different images could not be read, or none could be."""
        bad, images = len(self.bad_images), len(self.dataset)
        if bad > self.max_bad_images * images or bad == images:
            names = first_few(sorted(self.bad_images), 20)
            allowed = f"max_bad_images={self.max_bad_images} allows: {names}"
            found = f"{bad} of {images} images could not be read"
            raise UnusableImages(f"{found}, more than {allowed}")

    def load(self, batches: Iterable) -> Iterator[Loaded]:
        """Decode `batches` (each a list of keys of the samples) and bring them to the device."""
        loader = DataLoader(
            self.samples,
            batch_sampler=batches,
            collate_fn=_collate,
            num_workers=self.num_workers,
            worker_init_fn=_start_worker,
            # The launcher's processes would otherwise spawn theirs, with five seconds of imports.
            multiprocessing_context="fork" if self.num_workers > 0 else None,
            pin_memory=self.device.type == "cuda",
            # torch draws a seed for each set of workers: not from the generator that others use.
            generator=torch.Generator(),
        )
        has_folder = os.path.isdir(SHARED_MEMORY)  # other systems have it elsewhere
        least = (self.num_workers + 1) * QUEUE_BYTES
        try:
            if self.num_workers and has_folder and shutil.disk_usage(SHARED_MEMORY).free < least:
                raise RuntimeError("too little shared memory")
            # Closed, it ends the workers, also while something holds the traceback of an error.
            with closing(self.in_time(loader)) as in_time:
                is_cpu = self.device.type == "cpu"
                yield from in_time if is_cpu else _one_ahead(in_time, self.device)
        except RuntimeError as error:
            if self.num_workers == 0 or "shared memory" not in str(error):
                raise  # the words are torch's, also of a bus error
            valid = f"0, or more room in {SHARED_MEMORY}, through which loaders hand over images"
            problem = f"num_workers={self.num_workers}: expected {valid}"
            raise DataError(f"{problem} (docker run --shm-size=8g)") from error

    def in_time(self, loader: DataLoader) -> Generator[Loaded]:
        """Raises a DataTimeout where a batch takes longer, also inside a read that does not return.
        A signal that asks a run to stop shortens the wait (util/preemption.py)."""

        def give_up(number: int, frame: FrameType | None) -> None:
            indices = sorted(set(self.samples.being_read.tolist()) - {-1})
            names = first_few([self.dataset.describe(index) for index in indices], 5)
            raise DataTimeout(f"waited in vain for {names or 'the next batch'} (data_timeout)")

        batches = iter(loader)
        # With torch's own handler a lost worker would be an error wherever the program is just
        # then; without it is one where its batch is waited for, at most five seconds later.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            handler = signal.signal(signal.SIGALRM, give_up)
            timer = signal.setitimer(signal.ITIMER_REAL, self.data_timeout or FOREVER)
            try:
                batch = next(batches, None)
            except DataTimeout:
                _kill_workers()  # one that waits for a file does not hear that it is to end
                raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, *timer)
                signal.signal(signal.SIGALRM, handler)
            if batch is None:
                return
            if isinstance(batch, DataError):
                del batches  # else the traceback would keep the workers
                raise batch
            yield batch


def _one_ahead(batches: Iterator[Loaded], device: torch.device) -> Iterator[Loaded]:
    """The next batch is copied to the GPU, from pinned memory and on a stream of its own, while the
    current one is being computed with."""
    copying = torch.cuda.Stream(device)
    copies = deque()
    for images, labels, rest in batches:
        with torch.cuda.stream(copying):
            moved = [part.to(device, non_blocking=True) for part in (images, labels)]
        copies.append((moved, rest, copying.record_event()))
        if len(copies) == 2:
            yield _copied(*copies.popleft())
    if copies:
        yield _copied(*copies.popleft())


def _copied(moved: list[Tensor], rest: tuple, there: torch.cuda.Event) -> Loaded:
    """The device waits for the copy, not the host."""
    current = torch.cuda.current_stream(moved[0].device)
    current.wait_event(there)
    for part in moved:  # the next copies must not reuse its memory before this stream is done
        part.record_stream(current)
    return moved[0], moved[1], rest


class TrainLoader(Loader, StepOrder):
    """An endless shuffled stream of batches for one process."""

    unreadable_are = "replaced by its neighbour"

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Augmentation,
        *,
        seed: int,
        batch_size: int,
        accum_iter: int,
        rank: int,
        world_size: int,
        **reading,
    ) -> None:
        """reading: the other arguments of Loader."""
        StepOrder.__init__(self, len(dataset), seed, batch_size, accum_iter, rank, world_size)
        Loader.__init__(self, dataset, transform, **reading)

    def stream(self, first_step: int, last_step: int) -> Iterator[TrainBatch]:
        """One batch for each micro-step. The workers stay busy across epochs."""
        steps = self.micro_steps(first_step, last_step)
        keys = ([(index, epoch, index) for index in indices] for epoch, indices in steps)
        for images, labels, unreadable in self.load(keys):
            batch = TrainBatch(images, labels, list(chain.from_iterable(unreadable)))
            self.note_unreadable(batch.unreadable)
            yield batch


class EvalLoader(Loader):
    """This process's part of all images, or of those with these indices, in order and each exactly
    once, but for those that cannot be read: they are named and left out, up to max_bad_images.

    It is a contiguous part, of whole batches: a batch holds the same images however many processes
    there are, so that its arithmetic is the same to the last bit."""

    unreadable_are = "left out"

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[..., Tensor],
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        device: torch.device | str,
        indices: Sequence[int] | None = None,
        **reading: float,
    ) -> None:
        """reading: the other arguments of Loader."""
        super().__init__(dataset, transform, num_workers, device, **reading)
        self.batch_size = batch_size
        indices = range(len(dataset)) if indices is None else indices
        starts = range(0, len(indices), batch_size)
        own = starts[share_of(len(starts), rank, world_size)]
        self.batches = [indices[start : start + batch_size] for start in own]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[EvalBatch]:
        batches = self.load([(index,) for index in own] for own in self.batches)
        for own, (images, labels, unreadable) in zip(self.batches, batches, strict=True):
            indices = torch.tensor(list(own)).to(self.device)
            if any(unreadable):
                self.leave_out(names[0] for names in unreadable if names)
                is_read = torch.tensor([not names for names in unreadable]).to(self.device)
                images, labels, indices = images[is_read], labels[is_read], indices[is_read]
            if len(indices):
                yield EvalBatch(images, None if self.dataset.labels is None else labels, indices)

    def leave_out(self, names: Iterable[str]) -> None:
        self.note_unreadable(names)
        self.check_bad_images()
