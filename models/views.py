"""Views: how an image becomes patches, and which of them are visible.

An image of grid_size x grid_size cells is cut into one patch per cell. A cell is patch_size +
patch_gap pixels wide and the patch sits at a random integer offset inside it, so that neighbouring
patches never touch and a masked patch cannot be read off the border of a visible one.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# random: any patches (published). Others: a rectangle of masked (block) or of visible ones
# (inverse), _roll: moved over the borders of the grid, so that each cell is visible equally often.
MASKS = ("random", "block", "block_roll", "inverse", "inverse_roll")
LARGEST_ASPECT = 2  # height by width of a rectangle; the smallest is its inverse


class Geometry(NamedTuple):
    """How images are cut, and how many of their patches are visible."""

    grid_size: int  # cells along a side
    patch_size: int  # pixels along a side
    patch_gap: int  # 0: patches touch, as they do in evaluations
    num_vis: int

    @property
    def side(self) -> int:
        """Of a training image, in pixels."""
        return self.grid_size * (self.patch_size + self.patch_gap)

    @property
    def side_without_gaps(self) -> int:
        return self.grid_size * self.patch_size


class Views(NamedTuple):
    """What is random about one forward pass. N images, L = V + M patches each."""

    visible_ids: Tensor  # [N, V], the patches that the online encoder sees
    masked_ids: Tensor  # [N, M], the patches whose latents are predicted
    row_offsets: Tensor | None  # [N, grid, grid], inside the cell; None where patch_gap is 0
    column_offsets: Tensor | None  # [N, grid, grid]


def sample_views(
    images: int,
    grid_size: int,
    num_vis: int,
    patch_gap: int,
    generator: torch.Generator,
    own: slice = slice(None),
    masks: str = "random",
) -> Views:
    """The views of the images `own` of so many, on the generator's device, so that nothing is
    copied to a GPU. The random numbers of all images are drawn: which of them are one's own does
    not change their views."""
    device = generator.device
    numbers = grid_size**2 if masks == "random" else 5
    noise = torch.rand(images, numbers, generator=generator, device=device)[own]
    if masks == "random":
        # The order of uniform numbers is a uniform permutation: one sort for the whole batch.
        permutation = noise.argsort(dim=1)
    elif masks.startswith("inverse"):
        permutation = rectangle_first(noise, grid_size, num_vis, masks.endswith("roll"))
    else:
        num_masked = grid_size**2 - num_vis
        permutation = rectangle_first(noise, grid_size, num_masked, masks.endswith("roll"))
        permutation = permutation.roll(num_vis, dims=1)
    offsets = (None, None)
    if patch_gap > 0:
        # 0 .. gap-1, never `gap`: neighbours are at least one pixel apart.
        shape = (2, images, grid_size, grid_size)
        offsets = torch.randint(patch_gap, shape, generator=generator, device=device)
        offsets = offsets[:, own].unbind(0)
    return Views(permutation[:, :num_vis], permutation[:, num_vis:], *offsets)


def rectangle_first(uniform: Tensor, grid_size: int, cells: int, roll: bool) -> Tensor:
    """The ids of all cells, those of a random rectangle first: its first `cells` ones in the order
    of ids, because few numbers are a product of two sides. uniform [N, 5]: from 0 to 1, one each
    for the aspect, its place, and how far it is rolled. -> [N, L]"""
    aspect, top, left, down, right = uniform.unbind(dim=1)
    least = max(-math.log(LARGEST_ASPECT), math.log(cells / grid_size**2))
    most = min(math.log(LARGEST_ASPECT), math.log(grid_size**2 / (cells + 1e-5)))
    aspect = torch.exp(least + (most - least) * aspect)
    # Rounding may give one more than the side.
    height, width = (
        (cells * ratio).sqrt().ceil().clamp(max=grid_size) for ratio in (aspect, 1 / aspect)
    )
    place = torch.arange(grid_size, device=uniform.device)
    inside = []  # of the rows, of the columns
    for start, length in ((top, height), (left, width)):
        start = (start * (grid_size - length + 1)).floor()
        from_start = place - start[:, None]
        inside.append((from_start >= 0) & (from_start < length[:, None]))
    outside = ~(inside[0][:, :, None] & inside[1][:, None, :])
    ids = outside.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    if roll:
        rows, columns = (
            (along + (shift * grid_size).floor().long()[:, None]) % grid_size
            for along, shift in ((ids // grid_size, down), (ids % grid_size, right))
        )
        ids = rows * grid_size + columns
    return ids


def extract_patches(
    images: Tensor,
    patch_size: int,
    patch_gap: int = 0,
    row_offsets: Tensor | None = None,
    column_offsets: Tensor | None = None,
) -> Tensor:
    """images [N, C, H, W] -> patches [N, L, patch_size * patch_size * C].

    Patches run row by row over the grid; inside a patch the order is row, column, channel (channel
    fastest). With a gap images are square."""
    batch_size, channels, height, width = images.shape
    cell = patch_size + patch_gap
    if height % cell or width % cell:
        raise ValueError(f"images of {height} x {width} pixels do not divide into cells of {cell}")
    if patch_gap and height != width:
        raise ValueError(f"images of {height} x {width} pixels are not square")
    grid_rows, grid_columns = height // cell, width // cell
    if patch_gap == 0:
        patches = images.reshape(batch_size, channels, grid_rows, cell, grid_columns, cell)
        patches = patches.permute(0, 2, 4, 3, 5, 1)
    else:
        cell_start = torch.arange(grid_rows, device=images.device) * cell
        within = torch.arange(patch_size, device=images.device)
        rows = (cell_start[:, None] + row_offsets)[..., None] + within  # [N, grid, grid, patch]
        columns = (cell_start + column_offsets)[..., None] + within
        sample = torch.arange(batch_size, device=images.device)[:, None, None, None, None]
        channels_last = images.permute(0, 2, 3, 1)
        patches = channels_last[sample, rows[..., :, None], columns[..., None, :]]
    return patches.reshape(batch_size, grid_rows * grid_columns, -1)


def take_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens [N, L, D] ([1, L, D]: a table that all images share), ids [N, K] -> [N, K, D]."""
    if tokens.shape[0] == 1:
        return tokens[0][ids]
    sample = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    return tokens[sample, ids]  # copies whole rows; gather() would index each channel
