"""What TensorBoard shows of a few fixed images while an encoder is trained."""

import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval.pictures import nested_clusters, nested_colours
from models.views import Geometry, Views, extract_patches, take_tokens

GREY, MARGIN = 128, 1
CLUSTERS = [3, 5]  # the colours of the last; the parts of one of the first share a hue


def picture(images: Tensor, views: Views, geometry: Geometry, tokens: Tensor) -> bytes:
    """Draw a PNG with a row per image: the image, its visible patches, its masked ones, the
    clusters of its tokens. images: uint8 [N, 3, H, W]; tokens [N, L, D], of the whole grid."""
    side = geometry.side
    resized = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True).byte()
    parts = [resized, *only_patches(resized, views, geometry), cluster_maps(tokens, side)]
    framed = [F.pad(part.cpu(), [MARGIN] * 4, value=255) for part in parts]
    rows = torch.cat(framed, dim=3)  # [N, 3, side, 4 x side], with margins
    whole = rows.permute(0, 2, 3, 1).flatten(0, 1)
    file = io.BytesIO()
    Image.fromarray(whole.numpy()).save(file, "PNG")
    return file.getvalue()


def only_patches(images: Tensor, views: Views, geometry: Geometry) -> list[Tensor]:
    """Show the visible patches on grey, and the masked ones. The networks' own function cuts them,
    here out of an image of pixel numbers."""
    count, side = len(images), geometry.side
    numbers = torch.arange(side**2, device=images.device).expand(count, -1)
    numbers, offsets = (
        numbers.reshape(count, 1, side, side),
        (views.row_offsets, views.column_offsets),
    )
    places = extract_patches(numbers, geometry.patch_size, geometry.patch_gap, *offsets)
    found = []
    for ids in (views.visible_ids, views.masked_ids):
        shown = torch.zeros(count, side**2, dtype=torch.bool, device=images.device)
        shown.scatter_(1, take_tokens(places, ids).flatten(1), True)
        found.append(torch.where(shown.reshape(count, 1, side, side), images, GREY))
    return found


def cluster_maps(tokens: Tensor, side: int) -> Tensor:
    """Draw the clusters of the tokens of each image: uint8 [N, 3, side, side]."""
    grid, maps = round(tokens.shape[1] ** 0.5), []
    for own in tokens.float().cpu().numpy():
        colours = torch.from_numpy(nested_colours(nested_clusters(own, CLUSTERS))[-1])
        maps.append((255 * colours).byte().T.reshape(3, grid, grid))
    return F.interpolate(torch.stack(maps), (side, side), mode="nearest")
