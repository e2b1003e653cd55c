"""What reaches `draw` in a whole run of visualize, for two images of different shapes and three
methods, against the same by hand. Every key is away from its default, but for those that
test_segmentation_by_hand.py names and images=, whose default is installed photographs."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval import visualize
from eval.pictures import Panel
from models.vit import Encoder
from tests.evaluations import config
from tests.maps_by_hand import blurred_noise, central_picture, patches_of, resized_size
from tests.test_probe_by_hand import (
    DATASET,
    ON_CPU,
    TRAINED,
    all_tokens,
    load_encoder,
    normalised,
    pretrained,
)
from tests.test_visualize import assert_nested, same_partition

pytestmark = ON_CPU

SIDE, PATCH, SEED = 20, 4, 3
SIZES = {"deep/high.png": (27, 45), "wide.png": (53, 31)}  # width, height
COUNTS, POINT, MOST_STEPS = [2, 6], [0.8, 0.3], 260
PART = "which=target layer=1 final_norm=False image_side=20 dataset.crop_ratio=0.8 seed=3"


def write_photographs(folder: Path) -> dict[str, Image.Image]:
    """By path, sorted."""
    images = {}
    for seed, (name, size) in enumerate(SIZES.items()):
        images[str(folder / name)] = blurred_noise(seed, *size)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        images[str(folder / name)].save(folder / name)
    return images


# ---- From an image to tokens. --------------------------------------------------------------------


def whole(image: Image.Image) -> np.ndarray:
    """Less what is no whole patch, half of it on either side. -> uint8 [H, W, 3]"""
    left, top = (length % PATCH // 2 for length in image.size)
    width, height = (length // PATCH * PATCH for length in image.size)
    return np.array(image)[top : top + height, left : left + width]


def enlarged(image: Image.Image) -> np.ndarray:
    """1.4 times what the network was trained on."""
    return whole(image.resize(resized_size(*image.size, 28), Image.Resampling.BICUBIC))


def at_once(encode: Callable, pixels: Tensor) -> Tensor:
    return encode(pixels[None])[0]


def by_windows(encode: Callable, pixels: Tensor) -> Tensor:
    """Every 8 pixels, the last ones at the edge: the mean over those that a patch lies in."""
    height, width = pixels.shape[1:]
    found = [[[] for _ in range(width // PATCH)] for _ in range(height // PATCH)]
    corners = [sorted({*range(0, length - SIDE, 8), length - SIDE}) for length in (height, width)]
    for top, left in itertools.product(*corners):
        tokens = encode(pixels[None, :, top : top + SIDE, left : left + SIDE])[0]
        for place, token in enumerate(tokens):
            row, column = divmod(place, SIDE // PATCH)
            found[top // PATCH + row][left // PATCH + column].append(token)
    return torch.stack([torch.stack(tokens).mean(dim=0) for row in found for tokens in row])


# What is asked for: how an image is cut and encoded, what the captions say of it, no other panels.
WAYS = {
    "point=[0.8,0.3]": (
        lambda image: central_picture(image, SIDE, 25),
        at_once,
        "central crop of 20 x 20 pixels (crop_ratio 0.8)",
        "",
    ),
    "stride=8 point=null max_iter=null": (
        whole,
        by_windows,
        "whole image (as stored)",
        ", mean of windows of 20 x 20 pixels every 8",
    ),
    "upsample=1.4 point=[0.8,0.3] max_iter=null": (
        enlarged,
        at_once,
        "whole image (shorter side 28)",
        ", positions resampled",
    ),
}


def fresh_encoder() -> Encoder:
    """Without its third block and its norm."""
    shape = {"grid_size": 6, "patch_size": PATCH, "embed_dim": 24, "depth": 3, "num_heads": 3}
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        encoder = Encoder(**shape, freeze_pe=True, mlp_dim=0, mlp_depth=0, recompute=False)
    encoder.blocks, encoder.norm = encoder.blocks[:2], torch.nn.Identity()
    return encoder


# ---- What the panels hold. -----------------------------------------------------------------------


def components(tokens: list[np.ndarray]) -> tuple[list[np.ndarray], str]:
    """Of all images: red, green and blue of each token, the percent that they explain."""
    everything = np.concatenate(tokens)
    mean = everything.mean(axis=0)
    _, deviations, directions = np.linalg.svd(everything - mean, full_matrices=False)
    directions = directions[:3]
    directions *= np.sign(directions[range(3), abs(directions).argmax(axis=1)])[:, None]
    scores = [(own - mean) @ directions.T for own in tokens]
    low, high = np.quantile(np.concatenate(scores), [0.01, 0.99], axis=0)
    shares = 100 * deviations[:3] ** 2 / (deviations**2).sum()
    words = ", ".join(f"{round(share, 1)}" for share in shares.tolist())
    return [((own - low) / (high - low)).clip(0, 1) for own in scores], words


def check_clusters(panels: dict[str, Panel], tokens: np.ndarray, grid: tuple[int, int]) -> None:
    from scipy.cluster.hierarchy import fcluster, linkage

    tree, found = linkage(tokens, "ward"), {}
    for count in COUNTS:
        content = panels[f"{count} clusters"].content
        assert content.shape == (*grid, 3)
        colours = content.reshape(-1, 3)
        clusters = fcluster(tree, count, "maxclust")
        assert same_partition(clusters, np.unique(colours, axis=0, return_inverse=True)[1])
        found[count] = clusters, colours
    (coarse, old), (fine, new) = found.values()
    assert_nested(coarse, fine, old, new)


def check_places(panels: dict[str, Panel], tokens: np.ndarray) -> None:
    """The tokens bit for bit: t-SNE makes much of the smallest difference."""
    from sklearn.manifold import TSNE

    options = {"max_iter": MOST_STEPS, "init": "pca", "random_state": SEED}
    tsne = TSNE(perplexity=min(30, (len(tokens) - 1) / 3), **options)
    assert np.array_equal(panels["t-SNE"].places, tsne.fit_transform(tokens))
    assert np.array_equal(panels["t-SNE"].content, panels["6 clusters"].content.reshape(-1, 3))


def check_similarity(panel: Panel, tokens: np.ndarray, grid: tuple[int, int]) -> None:
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    there = int(POINT[1] * grid[0]) * grid[1] + int(POINT[0] * grid[1])
    cosines = (unit @ unit[there]).reshape(grid)
    assert np.allclose(panel.content, cosines, atol=1e-5) and panel.mark == POINT
    assert panel.note == f"{cosines.min():.2f} to {cosines.max():.2f}"


@pytest.mark.parametrize("way", WAYS)
def test_panels(tmp_path, monkeypatch, way):
    prepare, encode, seen, how = WAYS[way]
    path, images = pretrained(tmp_path, colours=TRAINED), write_photographs(tmp_path / "photos")
    controls = ["controls=[random,pixels]", "clusters=[2,6]", "batch_size=2", "max_iter=260"]
    options = [f"images={tmp_path / 'photos'}", *controls, *way.split(), *PART.split(), *DATASET]
    drawn, views, see = [], [], visualize.see
    monkeypatch.setattr(visualize, "draw", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr(visualize, "see", lambda *own: views.append(see(*own)) or views[-1])
    visualize.main(config("visualize", path, tmp_path, *options))

    trained = load_encoder(path, "target_encoder.", blocks=2, norm=False)
    encoders = [trained, fresh_encoder()]
    encoders = [lambda images, own=own: all_tokens(own, images)[:, 1:] for own in encoders]
    pixels = [prepare(image) for image in images.values()]
    grids = [(len(own) // PATCH, own.shape[1] // PATCH) for own in pixels]
    inputs = [normalised(own, TRAINED) for own in pixels]
    with torch.no_grad():
        tokens = [[encode(own, image).numpy() for image in inputs] for own in encoders]
    tokens.append([patches_of(image[None], PATCH)[0].numpy() for image in inputs])
    names = [f"lmim vit_nano-target ({path}{words})" for words in ("", ", random weights")]
    labels = [f"A: {names[0]}", f"B: {names[1]}", "C: raw pixels of 4 x 4 patches"]
    colours, shares = zip(*[components(own) for own in tokens], strict=True)
    described = [f"layer 1, without final norm, {seen}{how}"] * 2 + [seen]
    lines = [
        f"{label}, {condition}; PCA explains {share} %"
        for label, condition, share in zip(labels, described, shares, strict=True)
    ]

    titles = ["input", "2 clusters", "6 clusters", "t-SNE", "PCA", "similarity to +"]
    mark = None if "point=null" in way else POINT
    absent = {"t-SNE"} if "max_iter=null" in way else set()
    absent |= {"similarity to +"} if mark is None else set()
    sheet_path, sheet, sheet_caption = drawn.pop()
    assert [drawing[0].name for drawing in drawn] == ["000-high", "001-wide"]
    for index, (name, (_, rows, caption)) in enumerate(zip(images, drawn, strict=True)):
        assert list(rows) == labels
        assert caption == [name, *sheet_caption]
        overview = {"input": rows[labels[0]]["input"]._replace(mark=None)}
        for method, panels in enumerate(rows.values()):
            own = tokens[method][index]
            assert list(panels) == [title for title in titles if title not in absent]
            assert np.array_equal(panels["input"].content, pixels[index])
            assert panels["input"].mark == mark
            (same,) = [
                view.tokens
                for view in views
                if view.tokens.shape == own.shape and np.allclose(view.tokens, own, atol=1e-4)
            ]
            check_clusters(panels, own, grids[index])
            expected = colours[method][index].reshape(*grids[index], 3)
            assert np.allclose(panels["PCA"].content, expected, atol=1e-3)
            if "t-SNE" in panels:
                check_places(panels, same)
            if mark is not None:
                check_similarity(panels["similarity to +"], own, grids[index])
            for title in ("6 clusters", "PCA"):
                overview[f"{'ABC'[method]}: {title}"] = panels[title]
        assert list(sheet[name]) == list(overview)
        for title, panel in overview.items():
            assert np.array_equal(sheet[name][title].content, panel.content)
            assert sheet[name][title].mark is None
    assert sheet_path.name == "all" and list(sheet) == list(images)

    steps = "None" if "t-SNE" in absent else "260"
    assert sheet_caption[:3] == lines
    assert sheet_caption[3] == (
        "Clusters: Ward, of one image's patch tokens. PCA: of those of all 2 images. t-SNE: "
        f"perplexity 30, max_iter {steps}, seed 3. Similarity: cosine to the token at point {mark},"
        " as shares of width and height."
    )
    (file,) = (tmp_path / "visualize" / "results").glob("*.json")
    report = json.loads(file.read_text())
    assert report["command"] == sheet_caption[4] and report["caption"] == sheet_caption
    assert report["images"] == list(images) and report["pictures"] == ["000-high", "001-wide"]
    percents = [", ".join(map(str, own["pca_percent"])) for own in report["methods"]]
    assert percents == list(shares)
