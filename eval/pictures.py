"""Figures of pictures and maps side by side, and colours for clusters that divide."""

import textwrap
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageColor

from util.files import write_whole

# Of Okabe and Ito: blue, orange, green, purple, vermilion and yellow that colour-blind readers tell
# apart. Tints and shades of them (mixed with so much white, or black) differ in lightness.
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442")
MIXED = (0, 0.6, -0.5, 0.3, -0.25, 0.8, -0.7, 0.45, -0.12, 0.15, -0.37, 0.7)

# Inches, and points for letters.
PANEL, GAP, LINE, MARGIN = 2.0, 0.08, 0.2, 0.1
TEXT, SMALL = 8, 6.5
WIDTH = 0.62  # of a monospaced letter, as a share of its size
DOTS = 130  # per inch


class Panel(NamedTuple):
    content: np.ndarray  # [H, W, 3] colours; [rows, columns] values; [L, 3] colours of the places
    places: np.ndarray | None = None  # [L, 2]
    mark: list[float] | None = None  # shares of width and height
    note: str = ""


class Row(NamedTuple):
    label: str
    panels: dict[str, Panel]  # by title; the first one has the shape of all


def nested_clusters(tokens: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    """For each count the cluster of each token, int [L]: one tree, cut at several heights."""
    from scipy.cluster.hierarchy import ward  # not needed by most of the trainings that load this

    merges = ward(tokens)[:, :2].astype(int)
    levels, leaves = [], len(tokens)
    for count in counts:
        # Merge i makes the node leaves + i. The last count - 1 are undone; below, each node takes
        # the name of the one that it is merged into.
        names = np.arange(leaves + len(merges))
        for merge in reversed(range(leaves - count)):
            names[merges[merge]] = names[leaves + merge]
        levels.append(np.unique(names[:leaves], return_inverse=True)[1])
    return levels


def nested_colours(levels: list[np.ndarray]) -> list[np.ndarray]:
    """Of clusters, coarse to fine, each level dividing the one before: the colours of all places,
    [L, 3] from 0 to 1. The largest part of a cluster keeps its colour, the others its hue."""
    parents: dict[int, tuple[int, int]] = {}
    used = [0] * len(HUES)
    found, coarser = [], np.zeros_like(levels[0])
    for level, labels in enumerate(levels):
        own = {}
        for parent in range(coarser.max() + 1):
            parts, sizes = np.unique(labels[coarser == parent], return_counts=True)
            for rank, part in enumerate(parts[np.argsort(-sizes, kind="stable")]):
                hue = rank % len(HUES) if level == 0 else parents[parent][0]
                if level > 0 and rank == 0:
                    own[part] = parents[parent]
                else:
                    own[part] = hue, used[hue]
                    used[hue] += 1
        parents, coarser, colours = own, labels, []
        for hue, number in (own[part] for part in range(len(own))):
            share = MIXED[number]
            colours.append(
                np.array(ImageColor.getrgb(HUES[hue])) / 255 * (1 - abs(share)) + max(share, 0)
            )
        found.append(np.array(colours)[labels])
    return found


def draw(path: Path, rows: list[Row], caption: list[str]) -> None:
    """path.png and path.pdf, the same bytes each time."""
    figure = compose(rows, caption)
    for ending, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        save = partial(figure.savefig, format=ending, metadata=metadata)
        write_whole(path.with_name(f"{path.name}.{ending}"), save)


def compose(rows: list[Row], caption: list[str]):
    """All panels are as wide as each other, and as high as their image is in
    proportion, so that no pixel is stretched."""
    columns = max(len(row.panels) for row in rows)
    width = 2 * MARGIN + columns * (PANEL + GAP) - GAP
    letters = int((width - 2 * MARGIN) * 72 / (WIDTH * SMALL))
    wrapped = (textwrap.wrap(text, letters, subsequent_indent="  ") for text in caption)
    lines = list(chain.from_iterable(wrapped))
    shapes = [next(iter(row.panels.values())).content.shape for row in rows]
    heights = [PANEL * shape[0] / shape[1] for shape in shapes]
    line = SMALL * 1.4 / 72
    height = 2 * MARGIN + LINE + sum(heights) + len(rows) * (LINE + GAP) + len(lines) * line
    from matplotlib.figure import Figure  # takes a second, which training does without

    figure = Figure(figsize=(width, height), dpi=DOTS)

    def write(left: float, top: float, text: str, size: float, weight: str = "normal") -> None:
        place, font = (left / width, 1 - top / height), {"family": "monospace", "weight": weight}
        figure.text(*place, text, font, fontsize=size, va="top", parse_math=False)

    top = MARGIN
    for place, title in enumerate(rows[0].panels):
        write(MARGIN + place * (PANEL + GAP), top, title, TEXT)
    top += LINE
    for row, high in zip(rows, heights, strict=True):
        most = int((width - 2 * MARGIN) * 72 / (WIDTH * TEXT))
        label = row.label if len(row.label) <= most else f"...{row.label[3 - most :]}"
        write(MARGIN, top, label, TEXT, "bold")
        top += LINE
        for place, panel in enumerate(row.panels.values()):
            left = MARGIN + place * (PANEL + GAP)
            box = (left / width, 1 - (top + high) / height, PANEL / width, high / height)
            fill(figure.add_axes(box), panel)
        top += high + GAP
    for text in lines:
        write(MARGIN, top, text, SMALL)
        top += line
    return figure


def fill(axes, panel: Panel) -> None:
    axes.set(xticks=[], yticks=[])
    if panel.places is not None:
        size = np.clip(2000 / len(panel.places), 1, 30)
        axes.scatter(*panel.places.T, c=panel.content, s=size, linewidths=0)
        return
    # Photographs have more pixels than there are dots, and would lose some of them.
    is_fine = panel.content.shape[1] > PANEL * DOTS
    smooth = "antialiased" if is_fine else "nearest"
    axes.imshow(panel.content, interpolation=smooth, aspect="auto", cmap="viridis")
    if panel.mark is not None:
        for colour, thickness in (("white", 3), ("black", 1.2)):
            place = {"transform": axes.transAxes, "color": colour, "markeredgewidth": thickness}
            axes.plot(panel.mark[0], 1 - panel.mark[1], "+", markersize=9, **place)
    if panel.note:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        place = {"transform": axes.transAxes, "fontsize": SMALL, "bbox": box}
        axes.text(0.03, 0.04, panel.note, family="monospace", **place)
