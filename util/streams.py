"""The random numbers of data and steps, by stream (initial weights take the seed itself).

Each is a function of the seed and a counter (a step, an epoch and an image, ...): nothing has to be
remembered, and nothing that happens elsewhere changes it. The stream keeps those apart that have
the same seed and counter.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, unique

import numpy as np
import torch


@unique
class Stream(IntEnum):
    """A number that is used once stays for ever: results depend on it."""

    CROPS = 1  # (seed, epoch, image)
    ORDER = 2  # (seed, epoch)
    VIEWS = 3  # (seed, step)
    FINETUNE_AUGMENTATION = 4  # (seed, epoch, image)
    MIXUP = 5  # (seed, step, place of the batch in the step)
    DROP_PATH = 6  # (seed, step, place of the batch in the step)
    CLASSIFIER = 7  # (seed)
    SHOTS = 8  # (seed, draw)
    BANK = 9  # (seed)
    DIRECTIONS = 10  # (seed, step)


def generator(stream: Stream, *counter: int) -> np.random.Generator:
    return np.random.default_rng([stream, *counter])


def seed_of(stream: Stream, *counter: int) -> int:
    """For a generator of torch."""
    sequence = np.random.SeedSequence([stream, *counter])
    return int(sequence.generate_state(1, np.uint64)[0])


@contextmanager
def seeded(stream: Stream, *counter: int) -> Iterator[None]:
    """Inside, the CPU generators of python, numpy and torch start from the counter; afterwards they
    are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    sequence = np.random.SeedSequence([stream, *counter])
    for_python, for_numpy, for_torch = sequence.generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)
    # Not torch.manual_seed, which would seed the GPU as well.
    torch.default_generator.manual_seed(for_torch)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
