"""Figures of pictures and maps side by side, colours for clusters that divide, and what TensorBoard
shows of a few fixed images while an encoder is trained."""

import io
import textwrap
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from models.views import Geometry, Views, extract_patches, take_tokens
from util.files import write_whole

# Of Okabe and Ito: blue, orange, green, purple, vermilion and yellow that colour-blind readers tell
# apart. Tints and shades of them (mixed with so much white, or black) differ in lightness.
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442")
MIXED = (0, 0.6, -0.5, 0.3, -0.25, 0.8, -0.7, 0.45, -0.12, 0.15, -0.37, 0.7)
PALETTE = np.array(
    [
        [np.array(ImageColor.getrgb(hue)) / 255 * (1 - abs(part)) + max(part, 0) for part in MIXED]
        for hue in HUES
    ]
)

# Inches, and points for letters.
PANEL, GAP, LINE, MARGIN = 2.0, 0.08, 0.2, 0.1
TEXT, SMALL = 8, 6.5
WIDTH = 0.62  # of a monospaced letter, as a share of its size
DOTS = 130  # per inch

# In TensorBoard: the colours of the last level; the parts of a cluster of the first share a hue.
CLUSTERS, GREY, FRAME = [3, 5], 128, 1


class Panel(NamedTuple):
    content: np.ndarray  # [H, W, 3] colours; [rows, columns] values; [L, 3] colours of the places
    places: np.ndarray | None = None  # [L, 2]
    mark: list[float] | None = None  # shares of width and height
    note: str = ""


Rows = dict[str, dict[str, Panel]]  # panels by label and title; a row's first has the shape of all


def nested_clusters(tokens: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    """Find the cluster of each token for each of the counts, int [L]: one tree, cut at several
    heights."""
    from scipy.cluster.hierarchy import cut_tree, ward  # not needed by most trainings

    return list(cut_tree(ward(tokens), counts).T)


def nested_colours(levels: list[np.ndarray]) -> list[np.ndarray]:
    """Give clusters, coarse to fine, each level dividing the one before, their colours: of all
    places, [L, 3] from 0 to 1. The largest part of a cluster keeps its colour, the others its hue.
    """
    coarser, hues, tints = np.zeros((3, len(levels[0])), int)
    used, found = [0] * len(HUES), []
    for level, labels in enumerate(levels):
        for parent in np.unique(coarser):
            parts, sizes = np.unique(labels[coarser == parent], return_counts=True)
            for rank, part in enumerate(parts[np.argsort(-sizes, kind="stable")]):
                places = labels == part
                if level == 0:
                    hues[places] = rank % len(HUES)
                elif rank == 0:
                    continue
                hue = hues[places][0]
                tints[places] = used[hue]
                used[hue] += 1
        coarser = labels
        found.append(PALETTE[hues, tints])
    return found


def draw(path: Path, rows: Rows, caption: list[str]) -> None:
    """Write path.png and path.pdf, the same bytes each time."""
    figure = compose(rows, caption)
    for ending, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        save = partial(figure.savefig, format=ending, metadata=metadata)
        write_whole(path.with_name(f"{path.name}.{ending}"), save)


def compose(rows: Rows, caption: list[str]):
    """Make the figure. All panels are as wide as each other, and as high as their image is in
    proportion, so that no pixel is stretched."""
    from matplotlib.figure import Figure  # takes a second, which training does without

    inside = max(map(len, rows.values())) * (PANEL + GAP) - GAP
    letters = int(inside * 72 / (WIDTH * SMALL))
    wrapped = ["\n  ".join(textwrap.wrap(text, letters - 2)) for text in caption]
    lines = "\n".join(wrapped).split("\n")
    shapes = [next(iter(panels.values())).content.shape for panels in rows.values()]
    heights = [PANEL * shape[0] / shape[1] for shape in shapes]
    width = inside + 2 * MARGIN
    height = 2 * MARGIN + LINE + sum(heights) + len(rows) * (LINE + GAP)
    height += len(lines) * SMALL * 1.4 / 72
    figure = Figure(figsize=(width, height), dpi=DOTS)

    def write(left: float, top: float, text: str, size: float, weight: str = "normal") -> None:
        font = {"family": "monospace", "weight": weight, "size": size}
        figure.text(left / width, 1 - top / height, text, font, va="top", parse_math=False)

    top = MARGIN
    for place, title in enumerate(next(iter(rows.values()))):
        write(MARGIN + place * (PANEL + GAP), top, title, TEXT)
    top += LINE
    most = int(inside * 72 / (WIDTH * TEXT))
    for (label, panels), high in zip(rows.items(), heights, strict=True):
        shown = label if len(label) <= most else f"...{label[3 - most :]}"
        write(MARGIN, top, shown, TEXT, "bold")
        top += LINE
        for place, panel in enumerate(panels.values()):
            left = MARGIN + place * (PANEL + GAP)
            box = (left / width, 1 - (top + high) / height, PANEL / width, high / height)
            fill(figure.add_axes(box), panel)
        top += high + GAP
    write(MARGIN, top, "\n".join(lines), SMALL)
    return figure


def fill(axes, panel: Panel) -> None:
    axes.set(xticks=[], yticks=[])
    if panel.places is not None:
        size = np.clip(2000 / len(panel.places), 1, 30)
        axes.scatter(*panel.places.T, c=panel.content, s=size, linewidths=0)
        return
    axes.imshow(panel.content, aspect="auto", cmap="viridis")
    if panel.mark is not None:
        x, y = panel.mark[0], 1 - panel.mark[1]
        for colour, thickness in (("white", 3), ("black", 1.2)):
            look = {"color": colour, "markeredgewidth": thickness, "markersize": 9}
            axes.plot(x, y, "+", transform=axes.transAxes, **look)
    if panel.note:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        font = {"family": "monospace", "size": SMALL}
        axes.text(0.03, 0.04, panel.note, font, transform=axes.transAxes, bbox=box)


# --- in TensorBoard -------------------------------------------------------------------------------


def picture(images: Tensor, views: Views, geometry: Geometry, tokens: Tensor) -> bytes:
    """Draw a PNG with a row per image: the image, its visible patches, its masked ones, the
    clusters of its tokens. images: uint8 [N, 3, H, W]; tokens [N, L, D], of the whole grid."""
    side = geometry.side
    resized = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True).byte()
    parts = [resized, *only_patches(resized, views, geometry), cluster_maps(tokens, side)]
    framed = [F.pad(part.cpu(), [FRAME] * 4, value=255) for part in parts]
    rows = torch.cat(framed, dim=3)  # [N, 3, side, 4 x side], with margins
    whole = rows.permute(0, 2, 3, 1).flatten(0, 1)
    file = io.BytesIO()
    Image.fromarray(whole.numpy()).save(file, "PNG")
    return file.getvalue()


def only_patches(images: Tensor, views: Views, geometry: Geometry) -> list[Tensor]:
    """Show the visible patches on grey, and the masked ones. The networks' own function cuts them,
    here out of an image of pixel numbers."""
    count, side = len(images), geometry.side
    numbers = torch.arange(side**2, device=images.device).reshape(1, 1, side, side)
    numbers, offsets = numbers.expand(count, -1, -1, -1), (views.row_offsets, views.column_offsets)
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
