"""Views: the pixels of each patch, and what is random about a forward pass."""

import pytest
import torch

from models.views import extract_patches, sample_views, take_tokens
from tests import reference


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=generator(side), dtype=torch.float64)


def coordinate_images(count: int, side: int) -> torch.Tensor:
    """Each pixel holds its own row and column, so that a patch tells where it was taken."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([row, column, torch.zeros_like(row)]).expand(count, -1, -1, -1)


@pytest.mark.parametrize("gap", [0, 1, 2, 4])
@pytest.mark.parametrize("grid, patch_size", [(2, 1), (3, 4), (5, 2)])
def test_patches_equal_the_slow_formulation(grid, patch_size, gap):
    images = random_images(3, grid * (patch_size + gap))
    views = sample_views(3, grid, 1, gap, generator(1))
    offsets = (views.row_offsets, views.column_offsets)
    patches = extract_patches(images, patch_size, gap, *offsets)
    assert torch.equal(patches, reference.extract_patches(images, patch_size, gap, *offsets))


def test_patch_vectors_run_by_row_then_column_then_channel():
    image = torch.arange(3 * 4 * 4).reshape(1, 3, 4, 4)  # channel * 16 + row * 4 + column
    patches = extract_patches(image, patch_size=2)
    assert patches[0, 1].tolist() == [2, 18, 34, 3, 19, 35, 6, 22, 38, 7, 23, 39]
    assert patches[0, 2, 0] == 8  # the third patch starts the second row of the grid


@pytest.mark.parametrize("shape", [(1, 3, 10, 10), (1, 3, 8, 10), (1, 3, 10, 8)])
@pytest.mark.parametrize("gap", [0, 2])
def test_images_that_do_not_divide_into_cells_are_refused(shape, gap):
    with pytest.raises(ValueError, match="do not divide into cells of 4"):
        extract_patches(torch.zeros(shape), 4 - gap, gap)


def test_patches_of_a_rectangle_run_row_by_row_too():
    images = coordinate_images(2, 12)[:, :, :8]
    patches = extract_patches(images, patch_size=4).unflatten(2, (4, 4, 3))
    assert torch.equal(patches[:, 5], images[:, :, 4:8, 8:12].permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="8 x 12 pixels are not square"):
        extract_patches(images, patch_size=2, patch_gap=2)


@pytest.mark.parametrize("gap", [0, 1, 2, 4])
@pytest.mark.parametrize("grid, num_vis", [(2, 1), (4, 5), (14, 20)])
def test_visible_and_masked_ids_are_a_permutation(grid, num_vis, gap):
    views = sample_views(6, grid, num_vis, gap, generator(2))
    assert views.visible_ids.shape == (6, num_vis)
    permutation = torch.cat([views.visible_ids, views.masked_ids], dim=1)
    assert torch.equal(permutation.sort(dim=1).values, torch.arange(grid**2).expand(6, -1))


def test_images_of_a_batch_have_different_views():
    views = sample_views(8, 14, 20, 4, generator(3))
    for per_image in (views.visible_ids, views.row_offsets, views.column_offsets):
        assert len({tuple(own.flatten().tolist()) for own in per_image}) == 8
    assert not torch.equal(views.row_offsets, views.column_offsets)


def test_all_permutations_are_equally_likely():
    from scipy.stats import chisquare

    # A grid of 2 has 24 orders: few enough to count every one of them.
    views = sample_views(24_000, 2, 1, 0, generator(4))
    permutations = torch.cat([views.visible_ids, views.masked_ids], dim=1)
    _, counts = permutations.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_every_patch_is_visible_equally_often():
    from scipy.stats import chisquare

    # 100 patches, 10 visible: the tails of a biased shuffle would show in some id or place.
    views = sample_views(20_000, 10, 10, 0, generator(5))
    for place in (0, 5, 9):
        counts = views.visible_ids[:, place].bincount(minlength=100)
        assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("gap", [1, 2, 4])
def test_offsets_are_uniform_below_the_gap(gap):
    from scipy.stats import chisquare

    views = sample_views(500, 6, 1, gap, generator(6))
    rows, columns = views.row_offsets, views.column_offsets
    assert rows.shape == columns.shape == (500, 6, 6)
    assert rows.min() == columns.min() == 0
    assert rows.max() == columns.max() == gap - 1  # the gap itself is never drawn
    # Rows and columns together: each pair of offsets is equally likely.
    counts = (rows * gap + columns).flatten().bincount(minlength=gap**2)
    if gap > 1:
        assert chisquare(counts.numpy()).pvalue > 1e-3


def test_without_a_gap_there_are_no_offsets():
    views = sample_views(2, 3, 4, 0, generator(7))
    assert views.row_offsets is None and views.column_offsets is None


@pytest.mark.parametrize("gap", [1, 2, 4])
def test_neighbouring_patches_never_touch(gap):
    grid, patch_size, count = 5, 3, 300
    views = sample_views(count, grid, 1, gap, generator(8))
    images = coordinate_images(count, grid * (patch_size + gap))
    patches = extract_patches(images, patch_size, gap, views.row_offsets, views.column_offsets)
    pixels = patches.reshape(count, grid, grid, patch_size**2, 3)
    rows, columns = pixels[..., 0], pixels[..., 1]
    between_rows = rows[:, 1:].amin(dim=-1) - rows[:, :-1].amax(dim=-1) - 1
    between_columns = columns[:, :, 1:].amin(dim=-1) - columns[:, :, :-1].amax(dim=-1) - 1
    # At least one pixel lies between two neighbours, and with so many draws exactly one somewhere.
    assert between_rows.min() == between_columns.min() == 1


@pytest.mark.parametrize("gap", [0, 3])
def test_views_are_a_function_of_the_seed(gap):
    first, again, other = (sample_views(4, 6, 9, gap, generator(seed)) for seed in (9, 9, 10))
    for index, drawn in enumerate(first):
        if drawn is not None:
            assert torch.equal(drawn, again[index])
            assert not torch.equal(drawn, other[index])


def test_views_leave_the_global_random_state_alone():
    state = torch.get_rng_state()
    sample_views(4, 6, 9, 2, generator(11))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_take_tokens_picks_the_rows_of_each_image(batch_size):
    tokens = torch.rand(batch_size, 9, 5, generator=generator(12))
    ids = sample_views(batch_size, 3, 6, 0, generator(13)).visible_ids
    assert torch.equal(take_tokens(tokens, ids), reference.pick(tokens, ids))


def test_take_tokens_of_a_table_that_all_images_share():
    table = torch.rand(1, 9, 5, generator=generator(14))
    ids = sample_views(4, 3, 6, 0, generator(15)).visible_ids
    assert torch.equal(take_tokens(table, ids), reference.pick(table.expand(4, -1, -1), ids))
