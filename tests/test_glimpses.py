"""The picture in TensorBoard: patches where they are cut, clusters of the tokens."""

import io

import numpy as np
import torch
from PIL import Image

from eval.pictures import GREY, only_patches, picture
from models.views import Geometry, sample_views

GEOMETRY = Geometry(grid_size=4, patch_size=3, patch_gap=2, num_vis=5)


def some_images(side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 100, (2, 3, side, side), generator=generator).byte()


def test_patches_are_shown_where_they_are_cut():
    images, generator = some_images(20), torch.Generator().manual_seed(0)
    views = sample_views(2, 4, 5, 2, generator)
    expected = torch.full((2, 2, 3, 20, 20), GREY, dtype=torch.uint8)
    for kind, ids in enumerate((views.visible_ids, views.masked_ids)):
        for image in range(2):
            for place in ids[image].tolist():
                row, column = divmod(place, 4)
                top = 5 * row + int(views.row_offsets[image, row, column])
                left = 5 * column + int(views.column_offsets[image, row, column])
                part = slice(None), slice(top, top + 3), slice(left, left + 3)
                expected[(kind, image, *part)] = images[(image, *part)]
    assert torch.equal(torch.stack(only_patches(images, views, GEOMETRY)), expected)


def test_a_row_for_each_image():
    views = sample_views(2, 4, 5, 2, torch.Generator().manual_seed(0))
    tokens = torch.zeros(2, 16, 8)
    for place in range(16):  # five clusters: the rows, and the first patch
        tokens[:, place, place // 4] = 10
    tokens[:, 0] = 50
    shown = np.asarray(Image.open(io.BytesIO(picture(some_images(12), views, GEOMETRY, tokens))))
    assert shown.shape == (2 * 22, 4 * 22, 3)
    maps = shown[1:21, 67:87]
    assert (shown[:, 65:67] == 255).all() and (shown[21:23] == 255).all()
    assert len(np.unique(maps.reshape(-1, 3), axis=0)) == 5
    assert (maps[5:10] == maps[5, 0]).all() and (maps[:5, 5:] == maps[0, 5]).all()
    assert (maps[0, 0] != maps[0, 5]).any() and (maps[5, 0] != maps[10, 0]).any()
