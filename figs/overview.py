"""Draw the overview figure of Latent Masked Image Modeling.

    python figs/overview.py

The patches are cut from the example image the way the method cuts them: one window per cell at a
random offset, so that no two windows touch. The grid is coarser than the real one (7 x 7, not
14 x 14) and the gap a little wider, to be seen at this size. Latents and similarities are an
illustration, not a measurement.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle
from PIL import Image
from sklearn.datasets import load_sample_image

WIDTH, HEIGHT = 1800, 900  # pixels; all coordinates below are pixels with y pointing down
GRID, PATCH, GAP, UNIT = 7, 60, 20, 5  # windows move in steps of UNIT
CELL = PATCH + GAP
NUM_VISIBLE, NUM_SHOWN = 5, 8
SEED = 9309  # its visible patches are well spread and show the tower
TOP_LANE, BOTTOM_LANE, MATRIX_TOP = 222, 608, 280

INK, MUTED, FAINT = "#1f2937", "#5b6573", "#cfd5de"
BLUE, BLUE_LIGHT = "#2563eb", "#dbe8fe"
GREEN, GREEN_LIGHT = "#0f8a5f", "#d6f3e5"
PURPLE, PURPLE_LIGHT = "#7c3aed", "#ebe3fe"
AMBER = "#f59e0b"
LARGE, MEDIUM, SMALL = 20, 17.5, 16  # points at 100 dpi


def read_photograph():
    """A square of scikit-learn's sample (NOTICE names its author): side x side x 3 in [0, 1]."""
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    square = photograph.crop((0, 0, photograph.height, photograph.height))
    return np.asarray(square.resize((GRID * CELL, GRID * CELL))) / 255


def cut_patches(image, generator):
    """One window per cell, at an offset below GAP: (row, column, pixels)."""
    windows = []
    for cell in range(GRID * GRID):
        offset = UNIT * generator.integers(0, GAP // UNIT, 2)
        row, column = np.array(divmod(cell, GRID)) * CELL + offset
        windows.append((row, column, image[row : row + PATCH, column : column + PATCH]))
    return windows


def text(axes, x, y, string, size=SMALL, colour=INK, **options):
    options = {"ha": "center", "va": "center", "linespacing": 1.25} | options
    axes.text(x, y, string, fontsize=size, color=colour, **options)


def picture(axes, pixels, x, y, side):
    axes.imshow(pixels, extent=(x, x + side, y + side, y), interpolation="antialiased", zorder=3)


def box(axes, x, y, width, height, face, edge, radius=14, line_width=2.2, **options):
    style = f"round,pad=0,rounding_size={radius}"
    shape = FancyBboxPatch((x, y), width, height, boxstyle=style, **options)
    shape.set(facecolor=face, edgecolor=edge, linewidth=line_width)
    axes.add_patch(shape)


def arrow(axes, *points, colour=INK, dashed=False):
    """A line through the points (each leg horizontal or vertical), a head at the last one."""
    (x, y), (before_x, before_y) = points[-1], points[-2]
    along = np.sign([x - before_x, y - before_y])
    across = along[::-1]
    neck = np.array([x, y]) - 17 * along
    shaft_x, shaft_y = zip(*points[:-1], neck + along, strict=True)
    style = {"solid_capstyle": "butt", "solid_joinstyle": "round", "zorder": 2}
    dashes = (0, (3.2, 1.8)) if dashed else "-"
    axes.plot(shaft_x, shaft_y, color=colour, linewidth=2.6, linestyle=dashes, **style)
    corners = [(x, y), neck + 7.5 * across, neck - 7.5 * across]
    axes.add_patch(Polygon(corners, facecolor=colour, edgecolor="none", zorder=2))


def heading(axes, number, x, string):
    axes.add_patch(Circle((x, 48), 20, facecolor=INK, edgecolor="none"))
    text(axes, x, 55, str(number), MEDIUM, "white", weight="bold", va="baseline")
    text(axes, x + 34, 56, string, LARGE, weight="bold", ha="left", va="baseline")


def patch_grid(axes, windows, shown, x, y, side, frame):
    """The cells of the grid, and in them the windows whose ids are in shown."""
    scale = side / (GRID * CELL)
    box(axes, x - 9, y - 9, side + 18, side + 18, "#edf0f5", frame, radius=12)
    lines = np.linspace(0, side, GRID + 1)
    axes.hlines(y + lines, x, x + side, colors=FAINT, linewidth=1, zorder=1)
    axes.vlines(x + lines, y, y + side, colors=FAINT, linewidth=1, zorder=1)
    for number in shown:
        row, column, pixels = windows[number]
        picture(axes, pixels, x + column * scale, y + row * scale, PATCH * scale)


def tokens(axes, x, y, count, step, face, edge, vertical=False, size=24, mark=""):
    """A row or column of small rounded squares; (x, y) is the corner of the first."""
    for number in range(count):
        left, top = (x, y + number * step) if vertical else (x + number * step, y)
        box(axes, left, top, size, size, face, edge, radius=6, line_width=2)
        text(axes, left + size / 2, top + size / 2, mark, 13, edge, weight="bold")


def module(axes, x, lane, width, title, note, face, edge):
    box(axes, x, lane - 68, width, 136, face, edge)
    text(axes, x + width / 2, lane - 16, title, LARGE, edge, weight="bold")
    text(axes, x + width / 2, lane + 43, note, SMALL, MUTED)


def draw_input(axes, image, windows):
    heading(axes, 1, 46, "Cut with gaps")
    picture(axes, image, 60, TOP_LANE - 115, 230)
    text(axes, 175, TOP_LANE + 138, "image", MEDIUM)
    arrow(axes, (175, TOP_LANE + 162), (175, BOTTOM_LANE - 152))
    patch_grid(axes, windows, range(GRID * GRID), 41, BOTTOM_LANE - 134, 268, MUTED)
    text(axes, 175, BOTTOM_LANE + 184, "one window per cell,\nat a random offset", MEDIUM)


def draw_subsets(axes, windows, visible, masked):
    heading(axes, 2, 418, "Split")
    axes.plot([319, 350], [BOTTOM_LANE] * 2, color=INK, linewidth=2.6)
    for ids, lane, frame, name in [
        (visible, TOP_LANE, BLUE, "visible, 10%"),
        (masked, BOTTOM_LANE, GREEN, "masked, 90%"),
    ]:
        arrow(axes, (350, BOTTOM_LANE), (350, lane), (387, lane), colour=frame)
        patch_grid(axes, windows, ids, 398, lane - 95, 190, frame)
        text(axes, 493, lane + 130, name, MEDIUM, frame, weight="bold")
        arrow(axes, (599, lane), (648, lane), colour=frame)


def draw_networks(axes):
    heading(axes, 3, 672, "Predict latents, not pixels")
    module(axes, 650, TOP_LANE, 186, "Online\nencoder", "ViT", BLUE_LIGHT, BLUE)
    module(axes, 650, BOTTOM_LANE, 186, "Target\nencoder", "ViT", GREEN_LIGHT, GREEN)
    arrow(axes, (743, TOP_LANE + 70), (743, BOTTOM_LANE - 70), colour=MUTED, dashed=True)
    middle = (TOP_LANE + BOTTOM_LANE) / 2
    text(axes, 728, middle, "EMA", MEDIUM, MUTED, weight="bold", ha="right")

    tokens(axes, 898, TOP_LANE - 72, NUM_VISIBLE, 30, BLUE_LIGHT, BLUE, vertical=True)
    arrow(axes, (838, TOP_LANE), (890, TOP_LANE), colour=BLUE)
    text(axes, 910, TOP_LANE - 100, "visible latents", SMALL, BLUE)
    arrow(axes, (930, TOP_LANE), (1024, TOP_LANE), colour=BLUE)
    module(axes, 1026, TOP_LANE, 220, "Decoder", "cross-attention", PURPLE_LIGHT, PURPLE)

    row = middle - 4
    tokens(axes, 1026, row, NUM_SHOWN, 28, "white", PURPLE, mark="m")
    arrow(axes, (1136, row - 6), (1136, TOP_LANE + 70), colour=PURPLE)
    text(axes, 1136, row + 64, "mask tokens at the\nmasked positions", SMALL, PURPLE)
    cue = [(910, TOP_LANE + 80), (910, row + 12), (1020, row + 12)]
    arrow(axes, *cue, colour=BLUE, dashed=True)
    text(axes, 922, row - 30, "visual\ncue", SMALL, BLUE, ha="left")


def draw_matching(axes, windows, shown, similarities):
    heading(axes, 4, 1418, "Match by similarity")
    step, left, upper = 38, 1434, MATRIX_TOP
    side = step * NUM_SHOWN
    colours = LinearSegmentedColormap.from_list("similarity", ["#ffffff", "#c9bdf3", "#4c1d95"])
    extent = (left, left + side, upper + side, upper)
    axes.imshow(similarities, extent=extent, cmap=colours, vmin=-0.35, vmax=1.0)
    axes.add_patch(Rectangle((left, upper), side, side, facecolor="none", edgecolor=FAINT))
    for number in range(NUM_SHOWN):
        at = number * step
        style = {"facecolor": "none", "edgecolor": AMBER, "linewidth": 3.2, "zorder": 4}
        axes.add_patch(Rectangle((left + at + 2, upper + at + 2), step - 4, step - 4, **style))
        picture(axes, windows[shown[number]][2], left + at + 4, BOTTOM_LANE + 20, 30)

    tokens(axes, left - 36, upper + 7, NUM_SHOWN, step, PURPLE_LIGHT, PURPLE, vertical=True)
    arrow(axes, (1248, TOP_LANE), (left - 24, TOP_LANE), (left - 24, upper), colour=PURPLE)
    text(axes, left - 4, TOP_LANE + 2, "predicted latents", SMALL, PURPLE, ha="left")
    tokens(axes, left + 7, BOTTOM_LANE - 12, NUM_SHOWN, step, GREEN_LIGHT, GREEN)
    text(axes, left + side / 2, BOTTOM_LANE + 76, "target latents", SMALL, GREEN)
    arrow(axes, (838, BOTTOM_LANE), (left - 2, BOTTOM_LANE), colour=GREEN)
    slash = np.array([[1123, 1134], [1139, 1150]])
    axes.plot(slash, [BOTTOM_LANE + 15, BOTTOM_LANE - 15], color=INK, linewidth=3, zorder=5)
    text(axes, 1136, BOTTOM_LANE + 38, "no gradient", SMALL, MUTED)


def draw_loss(axes, y):
    arrow(axes, (1586, y - 58), (1586, y - 36), (1016, y - 36), (1016, y - 3), colour=AMBER)
    box(axes, 650, y, 1124, 124, "#fff8e8", AMBER)
    choice = "each prediction picks its own patch\namong all masked ones of the image"
    spread = "mean cosine within an image,\nkept near a scheduled value"
    terms = [(1016, "patch InfoNCE", choice), (1520, "similarity constraint", spread)]
    for x, title, note in [(738, "loss  =", ""), (1272, "+", ""), *terms]:
        text(axes, x, y + 42, title, LARGE, weight="bold", va="baseline")
        text(axes, x, y + 84, note, SMALL, MUTED)


def draw_overview(path):
    generator = np.random.default_rng(SEED)
    image = read_photograph()
    windows = cut_patches(image, generator)
    order = generator.permutation(GRID * GRID)
    visible, masked = order[:NUM_VISIBLE], order[NUM_VISIBLE:]
    detailed_first = sorted(masked, key=lambda number: -windows[number][2].std((0, 1)).sum())

    figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    draw_input(axes, image, windows)
    draw_subsets(axes, windows, visible, masked)
    draw_networks(axes)
    # Made-up cosines between predictions (rows) and targets, as of a half-trained model.
    cosines = generator.uniform(-0.2, 0.3, (NUM_SHOWN, NUM_SHOWN)) + 0.7 * np.eye(NUM_SHOWN)
    draw_matching(axes, windows, sorted(detailed_first[:NUM_SHOWN]), cosines)
    draw_loss(axes, 758)
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="equal")
    axes.axis("off")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw_overview(Path(__file__).with_name("overview.png"))
