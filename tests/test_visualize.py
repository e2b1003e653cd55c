"""Pictures of patch tokens: clusters and windows against slow formulations, how figures are drawn,
and the whole command. What they show: tests/test_visualize_by_hand.py."""

import itertools
import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.base import DataError
from data.picture import to_tensor
from eval import visualize
from eval.backbone import BackboneError
from eval.pictures import Panel, compose, draw, nested_clusters, nested_colours
from eval.visualize import Method, View, average_windows, see
from launch.config import ConfigError, compose_config, parse_command_line
from launch.validate import check_config
from tests.backbones import digits_checkpoint
from tests.evaluations import assert_bad_input, config
from util.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
QUICK = ["dataset=images", "max_iter=250"]
SMALL = ["test_resnet", "test_vit"]  # of timm, for 160 x 160 pixels


def vectors(count: int = 60, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of a network for 24 x 24 pixels with patches of 4."""
    return digits_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def method(checkpoint: Path | None, *overrides: str) -> Method:
    cfg = config("visualize", checkpoint, Path("unused"), *QUICK, *overrides)
    (only,) = visualize.load_methods(cfg, ALONE)
    return only


# ---- Clusters and their colours. -----------------------------------------------------------------


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    return len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))


@pytest.mark.parametrize("seed", range(2))
def test_each_level_is_scikit_learns_clustering(seed):
    from sklearn.cluster import AgglomerativeClustering

    tokens, counts = vectors(seed=seed), [2, 3, 5, 12]
    for count, found in zip(counts, nested_clusters(tokens, counts), strict=True):
        assert same_partition(found, AgglomerativeClustering(count).fit_predict(tokens))


def test_as_many_clusters_as_are_asked_for():
    """Also of patches that are all alike."""
    assert sorted(nested_clusters(vectors(count=4), [4])[0]) == [0, 1, 2, 3]
    assert [len(set(own)) for own in nested_clusters(np.ones((9, 5)), [3, 5])] == [3, 5]


@pytest.mark.parametrize("counts", [[3, 4, 5], [2, 7, 12], [1, 12]])
def test_colours_follow_the_nesting(counts):
    levels = nested_clusters(vectors(), counts)
    colours = nested_colours(levels)
    for labels, own in zip(levels, colours, strict=True):
        assert same_partition(labels, np.unique(own, axis=0, return_inverse=True)[1])
    for (coarse, fine), (old, new) in zip(
        itertools.pairwise(levels), itertools.pairwise(colours), strict=True
    ):
        assert_nested(coarse, fine, old, new)


def assert_nested(coarse: np.ndarray, fine: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
    """Of the clusters of all places at two levels, and their colours."""
    for parent in set(coarse.tolist()):
        parts = [fine == part for part in set(fine[coarse == parent].tolist())]
        assert sum(part.sum() for part in parts) == (coarse == parent).sum()  # nested
        before = old[coarse == parent][0]
        largest = max(parts, key=np.sum)
        kept = [part for part in parts if np.allclose(new[part], before)]
        assert len(kept) == 1 and kept[0].sum() == largest.sum()
        assert all(hue(new[part][0]) == pytest.approx(hue(before), abs=1e-6) for part in parts)


def hue(colour: np.ndarray) -> float:
    import colorsys

    return colorsys.rgb_to_hsv(*colour)[0]


# Vienot, Brettel, Mollon 1999: what dichromats see, from linear light.
SEEN = {
    "all colours": np.eye(3),
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def lab(colour: np.ndarray, matrix) -> np.ndarray:
    """sRGB from 0 to 1 -> CIE L*a*b* of what is seen."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    linear = (np.array(matrix) @ linear).clip(0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SEEN)
def test_colour_blind_readers_tell_five_clusters_apart(sight):
    """However three clusters divide into four and five."""
    for first, second in itertools.product(range(3), range(4)):
        three = np.repeat(range(3), 64)
        four, five = three.copy(), three.copy()
        four[np.flatnonzero(three == first)[:16]] = 3
        five = four.copy()
        members = np.flatnonzero(four == second)
        five[members[: len(members) // 4]] = 4
        colours = np.unique(nested_colours([three, four, five])[-1], axis=0)
        assert len(colours) == 5
        for a, b in itertools.combinations(colours, 2):
            assert np.linalg.norm(lab(a, SEEN[sight]) - lab(b, SEEN[sight])) > 20


# ---- Similarity. ---------------------------------------------------------------------------------


def test_similarity_is_the_cosine_to_the_patch_at_the_point():
    tokens, grid = vectors(count=12), (3, 4)
    view = View(torch.zeros(3, 6, 8), tokens, grid)
    for point, place in [((0, 0), 0), ((1, 1), 11), ((0.6, 0.4), 6), ((0.25, 0.99), 9)]:
        found = visualize.similarity(view, point)
        for row, column in itertools.product(range(3), range(4)):
            a, b = tokens[place], tokens[4 * row + column]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found[row, column] == pytest.approx(cosine, abs=1e-6)


# ---- Images of any shape. ------------------------------------------------------------------------


def slow_windows(own: Method, image: torch.Tensor, stride: int) -> np.ndarray:
    """Patch by patch: the mean over the windows that it lies in."""
    height, width = image.shape[1:]
    tops, lefts = ({*range(0, n - 24, stride), n - 24} for n in (height, width))
    maps = {}
    for top, left in itertools.product(tops, lefts):
        with torch.inference_mode():
            tokens = own.run.tokens(image[None, :, top : top + 24, left : left + 24]).patches[0]
        maps[top, left] = tokens.reshape(6, 6, -1).numpy()
    found = []
    for y, x in itertools.product(range(0, height, 4), range(0, width, 4)):
        inside = [
            tokens[(y - top) // 4, (x - left) // 4]
            for (top, left), tokens in maps.items()
            if 0 <= y - top < 24 and 0 <= x - left < 24
        ]
        found.append(np.mean(inside, axis=0))
    return np.stack(found)


@pytest.mark.parametrize("stride, batch", [(4, 256), (24, 1)])
def test_windows_are_averaged_where_they_overlap(checkpoint, stride, batch):
    own = method(checkpoint, f"stride={stride}", f"batch_size={batch}")
    image = to_tensor(picture(44, 32))
    with torch.inference_mode():
        found = average_windows(own, image)
    assert found.shape == (8, 11, 24)
    expected = slow_windows(own, image, stride)
    assert np.allclose(found.flatten(0, 1).numpy(), expected, atol=1e-5)


def test_images_that_are_smaller_than_a_window_are_enlarged(checkpoint):
    assert see(method(checkpoint, "stride=12"), picture(15, 10), "image").image.shape == (3, 24, 36)


# ---- Methods. ------------------------------------------------------------------------------------


def test_controls_follow_each_network(checkpoint, tmp_path):
    controls = ["controls=[random,pixels]", "dataset.crop_ratio=1"]
    cfg = config("visualize", None, tmp_path, *QUICK, f"pretrained=[{checkpoint}]", *controls)
    network, fresh, pixels = visualize.load_methods(cfg, ALONE)
    weights = [own.run.backbone.encoder.blocks[0].mlp.fc1.weight for own in (network, fresh)]
    assert weights[0].shape == weights[1].shape and not torch.equal(*weights)
    image = picture(24, 24)
    seen = see(pixels, image, "image").tokens
    values = pixels.run.normalised(to_tensor(image))
    assert np.allclose(seen[7], values[:, 4:8, 4:8].permute(1, 2, 0).flatten(), atol=1e-6)
    assert pixels.run is fresh.run and "random weights" in fresh.name
    same = shutil.copy(checkpoint, tmp_path)
    three = f"pretrained=[{checkpoint},timm:{SMALL[0]},{same}]"
    cfg = config("visualize", None, tmp_path, *QUICK, three, "random_init=True", *controls)
    names = [own.name for own in visualize.load_methods(cfg, ALONE)]
    assert len(names) == 5, "the pixels of equal patches, and equal weights, are there once"
    assert SMALL[0] in names[2] and "32 x 32" in names[3] and "vit_nano" in names[4]


@pytest.mark.parametrize("name", SMALL)
def test_any_backbone(name):
    """Whole images by windows and at once, and the crop."""
    own = method(None, f"pretrained=timm:{name}", "random_init=True")
    for key, value, width in (("crop", None, 160), ("stride", 32, 192), ("upsample", 1, 192)):
        if value is not None:
            own.run.cfg.stride, own.run.cfg.upsample = None, None
            own.run.cfg[key] = value
        view = see(own, picture(192, 160), "image")
        assert view.tokens.shape == (math.prod(view.grid), own.run.backbone.embed_dim)
        assert view.image.shape[2] == width


# ---- Figures. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(20, 40), (60, 20)])
def test_nothing_overlaps_and_no_pixel_is_stretched(height, width):
    maps = {f"similarity to + {n}": Panel(vectors(height, width)) for n in range(4)}
    label = "A: " + "/a/long/folder" * 20 + "/checkpoint.pth"
    rows = {label: maps, "B": maps, "C": maps}
    figure = compose(rows, ["words " * 100, "x" * 400, "$a$ b_c"])
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert len(boxes) == 12
    for box in boxes:
        assert box.height / box.width == pytest.approx(height / width, rel=1e-6)
    figure.canvas.draw()
    boxes += [item.get_window_extent() for item in figure.texts]
    for first, second in itertools.combinations(boxes, 2):
        assert not first.padded(-0.01).overlaps(second.padded(-0.01))
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_a_drawing_shows_each_panel_where_it_belongs(tmp_path):
    red, green, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    quarters = np.array([[red, green], [blue, white]], np.uint8).repeat(10, axis=0)
    panels = {
        "input": Panel(quarters.repeat(20, axis=1), mark=[0.75, 0.25]),
        "map": Panel(np.array([[0.2, 0.9]])),
        "places": Panel(np.array([red, blue]) / 255, places=np.array([[0, 1], [2, 0]])),
        "fine": Panel(np.indices((270, 540)).sum(axis=0)[..., None] % 2 * np.ones(3)),
    }
    for name in ("first", "second"):
        draw(tmp_path / name, {"label": panels}, ["caption"])
    drawn = np.asarray(Image.open(tmp_path / "first.png").convert("RGB"))

    def at(panel: int, x: float, y: float) -> tuple[int, ...]:
        """130 dots an inch: panels of 260 x 130 dots, with 10.4 dots between them."""
        return tuple(drawn[int(65 + 130 * y), int(13 + 270.4 * panel + 260 * x)].tolist())

    assert [at(0, x, y) for y in (0.1, 0.9) for x in (0.1, 0.9)] == [red, green, blue, white]
    assert at(0, 0.75, 0.25) == (0, 0, 0) and at(0, 0.25, 0.75) == blue  # the mark
    assert [at(1, x, 0.5) for x in (0.25, 0.75)] == [(68, 1, 84), (253, 231, 36)]  # of viridis
    assert at(2, 0.045, 0.045) == red and at(2, 0.955, 0.955) == blue  # upwards
    assert all(100 < value < 155 for value in at(3, 0.5, 0.5))  # black and white, blended
    for ending in ("png", "pdf"):
        first, second = (tmp_path / f"{name}.{ending}" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
    assert b"CreationDate" not in first.read_bytes()


# ---- The command. --------------------------------------------------------------------------------


def test_a_real_run(checkpoint, tmp_path, capsys):
    """It replaces the pictures of an earlier run."""
    results = tmp_path / "visualize" / "results"
    (results / "pictures").mkdir(parents=True)
    for ending in ("png", "pdf"):
        (results / "pictures" / f"000-old.{ending}").touch()
    picture(24, 24).save(tmp_path / "small.png")
    options = ["dataset=images", f"images={tmp_path}/small.png", "max_iter=null", "point=[0.1,0.9]"]
    visualize.main(config("visualize", checkpoint, tmp_path, *options))
    output = capsys.readouterr().out
    names = ["000-small", "all"]
    found = sorted(path.name for path in (results / "pictures").iterdir())
    assert found == sorted(f"{name}.{ending}" for name in names for ending in ("pdf", "png"))
    for name in names:
        assert (results / "pictures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(results / "pictures" / f"{name}.png") as image:
            assert np.asarray(image.convert("RGB")).std() > 20
    report = json.loads((results / "visualize.json").read_text())
    assert len(report["methods"]) == 1 and report["images"] == [f"{tmp_path}/small.png"]
    assert "PCA explains" in output and "1 pictures, and all on one sheet" in output
    assert "point=[0.1,0.9]" in report["command"]


def test_without_images_the_two_photographs(checkpoint):
    own = method(checkpoint)
    paths, views = visualize.see_all(own.run.cfg, own.run, [own])
    assert paths == ["china.jpg", "flower.jpg"]
    assert [view.grid for (view,) in views] == [(6, 6)] * 2


BAD = {
    "images=nowhere/*.jpg": (DataError, "images=nowhere/.*: expected an image file"),
    "clusters=[5,12]": (ConfigError, "2 x 2 patches: expected 12 to .*clusters="),
    "stride=6": (ConfigError, "stride=6 .*: expected a multiple of 4, at most 24"),
    "stride=28": (ConfigError, "stride=28 .*: expected .* at most 24"),
    "upsample=30": (ConfigError, "to 16384"),
    "pretrained=null": (BackboneError, "pretrained=null: expected a file or folder"),
    f"pretrained=[timm:{SMALL[0]},timm:nope]": (BackboneError, "expected a name of timm"),
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input(checkpoint, tmp_path, override):
    picture(24, 24).save(tmp_path / "a.png")
    small = ["image_side=8"] if override.startswith("clusters") else []
    options = [f"images={tmp_path / 'a.png'}", *QUICK, *small, "random_init=True", override]
    cfg = config("visualize", checkpoint, tmp_path, *options)
    assert_bad_input(visualize.main, cfg, *BAD[override])


def test_an_unreadable_image_is_named(checkpoint, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff nothing")
    cfg = config("visualize", checkpoint, tmp_path, f"images={tmp_path}/a.jpg")
    assert_bad_input(
        visualize.main, cfg, DataError, "1 of 1 images could not be read, more .*a.jpg$"
    )


def test_a_network_that_takes_one_size_only_says_so():
    own = method(
        None, "pretrained=timm:vit_relpos_small_patch16_224", "random_init=True", "upsample=2"
    )
    with pytest.raises(BackboneError, match="upsample=2: .*vit_relpos_small"):
        see(own, picture(224, 224), "image")


@pytest.mark.parametrize(
    "override",
    ["point=[1.2,0.5]", "point=[0.5]", "clusters=[5,4]", "clusters=[1,2]", "controls=[noise]"]
    + ["stride=0", "upsample=0.5", "max_iter=10", "pretrained=[]", "images=''"],
)
def test_wrong_values_are_named(tmp_path, override):
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}=.*: expected "):
        check_config(config("visualize", None, tmp_path, override))


def test_folders_of_several_backbones_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = config("visualize", None, tmp_path, "pretrained=['~/a','mae:~/b.pth']")
    assert cfg.pretrained == [f"{tmp_path}/a", f"mae:{tmp_path}/b.pth"]


def test_other_evaluations_take_one_backbone(tmp_path):
    with pytest.raises(ConfigError, match="pretrained=.*: expected a text that is not empty"):
        config("nn", None, tmp_path, "pretrained=[a,b]")


@pytest.mark.parametrize(
    "overrides",
    [
        ["pretrained=['a b','s-seed=0/x']", "images=my photos/**/*.jpg", "point=null"],
        ["pretrained=timm:a", "dataset=digits", "dataset.crop_ratio=0.5", "controls=[pixels]"],
    ],
)
def test_the_command_composes_the_same_config(tmp_path, overrides):
    cfg = config("visualize", None, tmp_path, "dataset=images", *overrides)
    program, launcher, *arguments = shlex.split(visualize.command_of(cfg))
    command = parse_command_line(arguments, "")
    assert (program, launcher) == ("python", "launcher.py")
    assert compose_config(command.config_name, command.overrides) == cfg
