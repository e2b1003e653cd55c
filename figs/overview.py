"""Draw the overview figure of Latent Masked Image Modeling.

    python figs/overview.py

The patches are cut from the example image the way the method cuts them: one window per cell at a
random offset, so that no two windows touch. The grid is coarser than the real one (7 x 7, not
14 x 14) and the gap a little wider, to be seen at this size. Latents and similarities are an
illustration, not a measurement.
"""

from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from sklearn.datasets import load_sample_image

GRID, PATCH, GAP, UNIT = 7, 60, 20, 5  # windows move in steps of UNIT
CELL = PATCH + GAP
VISIBLE, SHOWN, STEP = 5, 8, 38  # patches; those with a latent, and how far these are apart
SEED = 9309  # its visible patches are well spread and show the tower
TOP, BOTTOM = 222, 608  # pixels, y points down: the middle of the upper and the lower lane
INK, MUTED, BLUE, GREEN = "#1f2937", "#5b6573", "#2563eb", "#0f8a5f"
PURPLE, AMBER = "#7c3aed", "#f59e0b"
PALE = {MUTED: "#edf0f5", BLUE: "#dbe8fe", GREEN: "#d6f3e5", PURPLE: "#ebe3fe", AMBER: "#fff8e8"}


def text(axes, x, y, words, size=16, colour=INK, **options):
    options = {"ha": "center", "va": "center", "linespacing": 1.25} | options
    axes.text(x, y, words, fontsize=size, color=colour, **options)


def picture(axes, pixels, x, y, side, **options):
    axes.imshow(pixels, extent=(x, x + side, y + side, y), zorder=3, **options)


def box(axes, x, y, width, height, colour, title="", note="", radius=14):
    style = {"facecolor": PALE[colour], "edgecolor": colour, "linewidth": 2.2}
    rounded = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=rounded, **style))
    text(axes, x + width / 2, y + 0.38 * height, title, 20, colour, weight="bold")
    text(axes, x + width / 2, y + 0.82 * height, note, colour=MUTED)


def arrow(axes, colour, *points, line="-", head=16):
    """A line through the points (each leg horizontal or vertical), a head at the last one."""
    end = np.array(points[-1])
    tip = head * np.sign(end - points[-2])
    x, y = zip(*points[:-1], end - tip, strict=True)
    axes.plot(x, y, line, color=colour, linewidth=2.6, solid_capstyle="butt", zorder=2)
    size = {"head_width": 15, "head_length": head, "length_includes_head": True}
    axes.arrow(*(end - tip), *tip, color=colour, linewidth=0, **size)


def grid(axes, image, corners, x, y, side, colour):
    """The cells, and in them the windows with these corners."""
    shown = np.full_like(image, 0.95)
    shown[::CELL] = shown[:, ::CELL] = 0.6
    for row, column in corners:
        window = np.s_[row : row + PATCH, column : column + PATCH]
        shown[window] = image[window]
    box(axes, x - 9, y - 9, side + 18, side + 18, colour, radius=12)
    picture(axes, shown, x, y, side)


def tokens(axes, x, y, count, step, colour, down=False):
    """(x, y): the corner of the first."""
    for at in range(0, count * step, step):
        box(axes, x + at * (not down), y + at * down, 24, 24, colour, radius=6)


def draw_method(axes, image, corners, visible, masked):
    headings = ["Cut with gaps", "Split", "Predict latents, not pixels", "Match by similarity"]
    for number, (x, words) in enumerate(zip([46, 418, 672, 1418], headings, strict=True), start=1):
        axes.plot(x, 48, "o", color=INK, markersize=28)
        text(axes, x, 55, number, 17.5, "white", weight="bold", va="baseline")
        text(axes, x + 34, 56, words, 20, weight="bold", ha="left", va="baseline")
    picture(axes, image, 60, TOP - 115, 230)
    text(axes, 175, TOP + 138, "image", 17.5)
    arrow(axes, INK, (175, TOP + 162), (175, BOTTOM - 146))
    grid(axes, image, corners, 41, BOTTOM - 134, 268, MUTED)
    text(axes, 175, BOTTOM + 184, "one window per cell,\nat a random offset", 17.5)
    arrow(axes, INK, (319, BOTTOM), (350, BOTTOM), head=0)
    for ids, lane, colour, name, coder in [
        (visible, TOP, BLUE, "visible, 10%", "Online\nencoder"),
        (masked, BOTTOM, GREEN, "masked, 90%", "Target\nencoder"),
    ]:
        arrow(axes, colour, (350, BOTTOM), (350, lane), (390, lane))
        grid(axes, image, corners[ids], 398, lane - 95, 190, colour)
        text(axes, 493, lane + 130, name, 17.5, colour, weight="bold")
        arrow(axes, colour, (599, lane), (650, lane))
        box(axes, 650, lane - 68, 186, 136, colour, coder, "ViT")
    arrow(axes, MUTED, (743, TOP + 70), (743, BOTTOM - 68), line="--")
    text(axes, 728, 415, "EMA", 17.5, MUTED, weight="bold", ha="right")
    arrow(axes, BLUE, (838, TOP), (893, TOP))
    text(axes, 910, TOP - 100, "visible latents", colour=BLUE)
    tokens(axes, 898, TOP - 72, VISIBLE, 30, BLUE, down=True)
    arrow(axes, BLUE, (930, TOP), (1026, TOP))
    box(axes, 1026, TOP - 68, 220, 136, PURPLE, "Decoder", "cross-attention")
    arrow(axes, BLUE, (910, TOP + 80), (910, 423), (1022, 423), line="--")
    text(axes, 922, 381, "visual\ncue", colour=BLUE, ha="left")
    tokens(axes, 1026, 411, SHOWN, 28, PURPLE)
    arrow(axes, PURPLE, (1136, 405), (1136, TOP + 68))
    text(axes, 1136, 475, "mask tokens at the\nmasked positions", colour=PURPLE)


def draw_matching(axes, cosines, patches):
    left, upper, side = 1434, 280, STEP * SHOWN
    colours = LinearSegmentedColormap.from_list("similarity", ["#ffffff", "#c9bdf3", "#4c1d95"])
    picture(axes, cosines, left, upper, side, cmap=colours, vmin=-0.35, vmax=1.0)
    middles = STEP * (np.arange(SHOWN) + 0.5)
    outline = {"markersize": 25, "markeredgewidth": 3.2, "fillstyle": "none", "zorder": 4}
    axes.plot(left + middles, upper + middles, "s", color=AMBER, **outline)
    for x, pixels in zip(left + middles, patches, strict=True):
        picture(axes, pixels, x - 15, BOTTOM + 20, 30)
    tokens(axes, left - 36, upper + 7, SHOWN, STEP, PURPLE, down=True)
    arrow(axes, PURPLE, (1248, TOP), (left - 24, TOP), (left - 24, upper))
    text(axes, left - 4, TOP + 2, "predicted latents", colour=PURPLE, ha="left")
    tokens(axes, left + 7, BOTTOM - 12, SHOWN, STEP, GREEN)
    text(axes, left + side / 2, BOTTOM + 76, "target latents", colour=GREEN)
    arrow(axes, GREEN, (838, BOTTOM), (left, BOTTOM))
    text(axes, 1136, BOTTOM, "//", 26, weight="bold")
    text(axes, 1136, BOTTOM + 38, "no gradient", colour=MUTED)
    arrow(axes, AMBER, (1586, 700), (1586, 722), (1016, 722), (1016, 757))
    box(axes, 650, 758, 1124, 124, AMBER)
    choice = "each prediction picks its own patch\namong all masked ones of the image"
    spread = "mean cosine within an image,\nkept near a scheduled value"
    terms = [(1016, "patch InfoNCE", choice), (1520, "similarity constraint", spread)]
    for x, title, note in [(738, "loss  =", ""), (1272, "+", ""), *terms]:
        text(axes, x, 800, title, 20, weight="bold", va="baseline")
        text(axes, x, 842, note, colour=MUTED)


def main():
    photograph = Image.fromarray(load_sample_image("china.jpg"))  # NOTICE names its author
    square = photograph.crop((0, 0, photograph.height, photograph.height))
    image = np.asarray(square.resize((GRID * CELL, GRID * CELL))) / 255
    rng = np.random.default_rng(SEED)
    cells = np.indices((GRID, GRID)).reshape(2, -1).T * CELL
    corners = cells + UNIT * rng.integers(0, GAP // UNIT, cells.shape)
    visible, masked = np.split(rng.permutation(len(cells)), [VISIBLE])
    windows = [image[y : y + PATCH, x : x + PATCH] for y, x in corners]
    detailed = sorted(masked, key=lambda number: -windows[number].std((0, 1)).sum())[:SHOWN]
    # Made-up cosines between predictions (rows) and targets, as of a half-trained model.
    cosines = rng.uniform(-0.2, 0.3, (SHOWN, SHOWN)) + 0.7 * np.eye(SHOWN)
    figure = Figure(figsize=(18, 9), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    draw_method(axes, image, corners, visible, masked)
    draw_matching(axes, cosines, [windows[number] for number in sorted(detailed)])
    axes.set(xlim=(0, 1800), ylim=(900, 0), aspect="equal")
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("overview.png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
