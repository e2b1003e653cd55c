"""Random numbers by name: no two of them coincide, and nobody else's are touched."""

import random
from itertools import product

import numpy as np
import torch

from util.streams import Stream, generator, seed_of, seeded


def test_no_two_coincide():
    """Of any streams, at counters of the length that each has: numpy takes a zero at the end of one
    for nothing."""
    keys = list(product(Stream, product(range(4), repeat=3)))
    numbers = {float(generator(stream, *counter).random()) for stream, counter in keys}
    seeds = {seed_of(stream, *counter) % 2**32 for stream, counter in keys}  # what a CPU takes
    assert len(numbers) == len(seeds) == len(keys) == len(Stream) * 64


def test_the_numbers_stay():
    """Results depend on them: whoever changes one changes what a seed means."""
    first = [float(generator(stream, 1, 2, 3).random()) for stream in Stream]
    expected = [np.random.default_rng([number, 1, 2, 3]).random() for number in range(1, 11)]
    assert first == expected
    assert seed_of(Stream.VIEWS, 1, 2) == np.random.SeedSequence([3, 1, 2]).generate_state(1, "u8")


def draws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_inside_the_counter_counts_and_outside_all_is_as_before():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    inside = []
    for counter in ((1, 2), (1, 2), (1, 3)):
        with seeded(Stream.MIXUP, *counter):
            inside.append(draws())
    assert inside[0] == inside[1]
    assert all(one != other for one, other in zip(inside[0], inside[2], strict=True))
    after = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert draws() == after
