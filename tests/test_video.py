"""Label propagation: the measures of DAVIS and the propagation against slow independent ones, a
generated set of moving objects in the benchmark's layout, and one process against two."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from data.base import DataError
from data.masks import IGNORE
from eval import video
from eval.backbone import Backbone, Tokens
from eval.common import EvalRun, run_joined
from eval.video import (
    boundary_accuracy,
    frame_size,
    pixel_objects,
    propagate_labels,
    region_similarity,
    score_object,
    score_sequence,
    summarise,
)
from launch.config import compose_config
from models.views import extract_patches
from tests.backbones import digits_checkpoint
from tests.evaluations import config
from tests.maps_by_hand import blurred_noise, enlarged, nearest
from tests.runs import run_together
from tests.test_masks import PALETTE
from tests.test_probe_by_hand import (
    DATASET,
    OF_DATASET,
    ON_CPU,
    all_tokens,
    load_encoder,
    normalised,
    pretrained,
)
from util.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))

# ---- The measures. -------------------------------------------------------------------------------


def pixels(mask: np.ndarray) -> set[tuple[int, int]]:
    return {(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]}


def slow_boundary(mask: np.ndarray) -> set[tuple[int, int]]:
    """Pixel by pixel: does a neighbour to the right, below, or both, belong elsewhere?"""
    height, width = mask.shape
    found = set()
    for y, x in itertools.product(range(height), range(width)):
        for other in ((y, x + 1), (y + 1, x), (y + 1, x + 1)):
            if other[0] < height and other[1] < width and mask[other] != mask[y, x]:
                found.add((y, x))
    return found


def slow_f(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Every boundary pixel against every other one."""
    height, width = truth.shape
    radius = math.ceil(0.008 * math.sqrt(height**2 + width**2))
    ours, theirs = slow_boundary(predicted), slow_boundary(truth)

    def share(some: set, others: set) -> float:
        if not some:
            return 1.0
        near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in some]
        return sum(near) / len(near)

    precision, recall = share(ours, theirs), share(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def ellipse(size: tuple[int, int], y: float, x: float, a: float, b: float) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return ((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 <= 1


MASKS = {
    "shifted": (ellipse((50, 70), 25, 30, 12, 9), ellipse((50, 70), 26, 31, 12, 9)),
    "radius of 2 pixels": (ellipse((99, 120), 40, 50, 15, 20), ellipse((99, 120), 42, 52, 16, 19)),
    "at the border": (ellipse((40, 50), 39, 49, 12, 9), ellipse((40, 50), 36, 47, 12, 12)),
    "far apart": (ellipse((50, 70), 9, 9, 5, 5), ellipse((50, 70), 40, 60, 5, 5)),
    "nothing found": (ellipse((50, 70), 9, 9, 5, 5), np.zeros((50, 70), bool)),
    "nothing there": (np.zeros((50, 70), bool), ellipse((50, 70), 9, 9, 5, 5)),
    "neither": (np.zeros((50, 70), bool), np.zeros((50, 70), bool)),
    "noise": tuple(np.random.default_rng(0).random((2, 30, 40)) < 0.3),
}


@pytest.mark.parametrize("name", MASKS)
def test_region_and_boundary_equal_slow_ones(name):
    truth, predicted = MASKS[name]
    first, second = pixels(truth), pixels(predicted)
    expected = len(first & second) / len(first | second) if first | second else 1.0
    assert region_similarity(truth, predicted) == expected
    assert boundary_accuracy(truth, predicted) == pytest.approx(slow_f(truth, predicted), abs=1e-12)


def test_only_the_frames_between_first_and_last_count():
    rng = np.random.default_rng(0)
    truth, predicted = (rng.integers(0, 3, (5, 20, 30)).astype(np.uint8) for _ in range(2))
    truth[2, :4] = IGNORE
    scores = score_sequence(truth, predicted, IGNORE)
    assert set(scores) == {1, 2}
    for number, score in scores.items():
        kept = [
            (t != IGNORE, t == number, p == number) for t, p in zip(truth, predicted, strict=True)
        ]
        kept = [(t & valid, p & valid) for valid, t, p in kept[1:-1]]
        regions = [region_similarity(*pair) for pair in kept]
        assert score["J"] == pytest.approx(np.mean(regions))
        assert score["J_recall"] == np.mean(np.array(regions) > 0.5)
        assert score["F"] == pytest.approx(np.mean([slow_f(*pair) for pair in kept]))


def test_a_sequence_with_more_objects_weighs_more():
    """The benchmark's means are over objects."""
    one = {"J": 0.2, "J_recall": 0.0, "F": 0.4, "F_recall": 0.0}
    two = {"J": 0.8, "J_recall": 1.0, "F": 1.0, "F_recall": 1.0}
    summary = summarise({"a": {1: one}, "b": {1: two, 2: two}})
    assert summary["J"] == pytest.approx(0.6) and summary["F"] == pytest.approx(0.8)
    assert summary["J&F"] == pytest.approx(0.7) and summary["J_recall"] == pytest.approx(2 / 3)


def test_a_perfect_prediction_scores_one():
    masks = np.stack([ellipse((50, 70), 20 + t, 30, 9, 7) for t in range(4)])
    nothing = np.zeros_like(masks)
    assert set(score_object(masks, masks, nothing).values()) == {1.0}


# ---- The propagation. ----------------------------------------------------------------------------


def slow_propagation(tokens, contexts, labels, neighbourhood, top_k, temperature):
    rows, columns = tokens.shape[:2]
    result = np.zeros((rows, columns, labels.shape[-1]))
    for y, x in itertools.product(range(rows), range(columns)):
        candidates = []
        for frame, v, u in itertools.product(range(len(contexts)), range(rows), range(columns)):
            if abs(v - y) <= neighbourhood and abs(u - x) <= neighbourhood:
                candidates.append((float(tokens[y, x] @ contexts[frame, v, u]), (frame, v, u)))
        best = sorted(candidates, reverse=True)[:top_k]
        total = sum(math.exp(cosine / temperature) for cosine, _ in best)
        for cosine, place in best:
            result[y, x] += math.exp(cosine / temperature) / total * labels[place]
    return result


@pytest.mark.parametrize("neighbourhood, top_k", [(2, 5), (12, 5), (0, 2), (1, 100)])
def test_propagation_equals_a_slow_one(neighbourhood, top_k):
    rng = np.random.default_rng(0)
    contexts = rng.standard_normal((3, 6, 9, 8)).astype(np.float32)
    contexts /= np.linalg.norm(contexts, axis=-1, keepdims=True)
    tokens = contexts[0, ::-1] * 0.7 + contexts[2] * 0.3
    labels = rng.random((3, 6, 9, 4)).astype(np.float32)
    settings = {"neighbourhood": neighbourhood, "top_k": top_k, "temperature": 0.1}
    arrays = map(torch.from_numpy, (np.ascontiguousarray(tokens), contexts, labels))
    ours = propagate_labels(*arrays, OmegaConf.create(settings))
    assert np.allclose(ours, slow_propagation(tokens, contexts, labels, **settings), atol=1e-5)


def test_patches_that_are_alike_all_count():
    """Of equal similarity none is preferred: the order of the patches decides nothing."""
    tokens = torch.ones(1, 4, 2) / math.sqrt(2)
    labels = torch.eye(4)[None, None]
    settings = OmegaConf.create({"neighbourhood": 3, "top_k": 2, "temperature": 0.1})
    ours = propagate_labels(tokens, tokens[None], labels, settings)
    assert torch.allclose(ours, torch.full((1, 4, 4), 0.25))


def test_frames_become_multiples_of_the_patch_size():
    assert frame_size((854, 480), 480, 16) == (848, 480)
    assert frame_size((480, 854), 480, 8) == (480, 856)
    assert frame_size((1920, 1080), 480, 14) == (854, 476)
    assert frame_size((100, 20), 4, 16) == (16, 16)


def test_a_small_map_is_stretched_before_objects_compete():
    labels = torch.zeros(2, 4, 2)
    labels[..., 0] = 0.7
    labels[:, 2:, 0], labels[:, 2:, 1] = 0.6, 0.4  # less than the background, yet its own best
    objects = pixel_objects(labels, [0, 7], patch_size=2, size=(4, 8))
    assert np.array_equal(objects, np.array([[0] * 4 + [7] * 4] * 4))


# ---- A set of moving objects in the benchmark's layout. ------------------------------------------

HEIGHT, WIDTH, CELL = 32, 48, 2


COLOURS = ((40, 60, 190), (200, 40, 40), (40, 190, 60))  # of the background, then of objects


def texture(rng: np.random.Generator, number: int, rows: int, columns: int) -> np.ndarray:
    """Cells around one colour: [rows * CELL, columns * CELL, 3]."""
    cells = rng.integers(-20, 21, (rows, columns, 3)) + COLOURS[number]
    return cells.astype(np.uint8).repeat(CELL, axis=0).repeat(CELL, axis=1)


def write_video(root: Path, name: str, velocities: list[tuple[int, int]], frames: int = 6) -> None:
    """One textured square per velocity (pixels per frame, down and right) on a texture."""
    rng = np.random.default_rng(sum(map(ord, name)))
    background = texture(rng, 0, HEIGHT // CELL, WIDTH // CELL)
    squares = [texture(rng, number, 5, 5) for number in range(1, len(velocities) + 1)]
    for frame in range(frames):
        image, objects = background.copy(), np.zeros((HEIGHT, WIDTH), np.uint8)
        for number, (down, right) in enumerate(velocities, start=1):
            y, x = 4 + 8 * (number - 1) + down * frame, 4 + 16 * (number - 1) + right * frame
            window = np.s_[y : y + 10, x : x + 10]
            image[window], objects[window] = squares[number - 1], number
        if frame:
            objects[8:12, 8:12] = IGNORE  # inside an object, where nobody asks
        folder, annotated = (root / part / "480p" / name for part in ("JPEGImages", "Annotations"))
        for path in (folder, annotated):
            path.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image)
        picture.save(folder / f"{frame:05d}.jpg", quality=95, subsampling=0)
        annotation = Image.fromarray(objects)
        annotation.putpalette(PALETTE)
        annotation.save(annotated / f"{frame:05d}.png")


def write_names(root: Path, *names: str) -> None:
    (root / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def moving(tmp_path) -> Path:
    root = tmp_path / "davis"
    write_video(root, "static", [(0, 0), (0, 0)])
    write_video(root, "slow", [(0, CELL)])
    write_video(root, "fast", [(CELL, 2 * CELL), (0, CELL + 1)])
    write_names(root, "static", "slow", "fast")
    return root


class PixelBackbone(Backbone):
    """The tokens are the patches' own pixels: what looks the same is the same."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.family, self.name, self.fingerprint = "test", "pixels", "none"
        self.patch_size, self.embed_dim, self.depth, self.layer = patch_size, 12, 0, -1
        self.image_side, self.final_norm, self.mean, self.std = 24, False, (0.5,) * 3, (0.3,) * 3

    def forward(self, images: torch.Tensor) -> Tokens:
        return Tokens(None, extract_patches(images, self.patch_size), self.grid_of(images))


def settings_for(root: Path, output: Path, *overrides: str) -> list[str]:
    place = [f"data_path={root}", f"output_dir={output}", "job_name=v"]
    return [*place, f"frame_side={HEIGHT}", *overrides]


def evaluate_pixels(root: Path, output: Path, *overrides: str) -> dict:
    cfg = compose_config("video", settings_for(root, output, *overrides))
    run = EvalRun(cfg, ALONE, PixelBackbone(CELL))
    run.prepare()
    video.evaluate(run)
    return report_of(output / "v")


def test_what_is_found_in_generated_videos(moving, tmp_path):
    found = evaluate_pixels(moving, tmp_path, "save_masks=True")
    sequences = {name: scores["J&F"] for name, scores in found["sequences"].items()}
    assert sequences["static"] == 1.0
    assert sequences["slow"] == 1.0  # one patch per frame
    assert found["images"] == 18 and found["dataset"] == "DAVIS-2017 val"
    objects = [scores for name in found["objects"].values() for scores in name.values()]
    assert len(objects) == 5
    j, f = (np.mean([scores[name] for scores in objects]) for name in ("J", "F"))
    assert found["results"]["J&F"] == pytest.approx(100 * (j + f) / 2)
    check_saved_masks(moving, tmp_path / "v" / "results" / "masks", found)


def check_saved_masks(root: Path, folder: Path, found: dict) -> None:
    """They are palette images like the annotations, and score what was reported."""
    for name, objects in found["objects"].items():
        arrays = []
        for place in (root / "Annotations" / "480p" / name, folder / name):
            images = [Image.open(path) for path in sorted(place.iterdir())]
            assert all(image.mode == "P" for image in images) and len(images) == 6
            arrays.append(np.stack([np.asarray(image) for image in images]))
            assert images[0].convert("RGB").getpixel((5, 5)) == (128, 0, 0)
        scores = score_sequence(*arrays, IGNORE)
        assert {str(number): score for number, score in scores.items()} == objects


def evaluate(root: Path, output: Path, *overrides: str) -> dict:
    """With a network that was never trained."""
    checkpoint = digits_checkpoint(output, f"patch_size={CELL}", "grid_size=12")
    pretrained = f"pretrained={checkpoint}"
    video.main(compose_config("video", settings_for(root, output, pretrained, *overrides)))
    return report_of(output / "v")


def report_of(job: Path) -> dict:
    (file,) = (job / "results").glob("*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(moving, tmp_path):
    alone = evaluate(moving, tmp_path)
    overrides = [f"pretrained={tmp_path}/digits.pth", "job_name=two"]
    run_together(2, *settings_for(moving, tmp_path, *overrides), program="eval/video.py")
    two = report_of(tmp_path / "two")
    assert two["processes"] == 2
    for key in ("results", "objects", "sequences", "images"):
        assert two[key] == alone[key]


# ---- A whole run by hand. ------------------------------------------------------------------------


def write_noisy_video(root: Path, numbers: list[int]) -> tuple[list[Image.Image], np.ndarray]:
    """41 x 26 pixels, 7 frames: objects of these numbers move, none along the patches.
    -> frames, annotations"""
    frames, annotations = [], np.zeros((7, 26, 41), np.uint8)
    background = np.asarray(blurred_noise(1, 41, 26)).astype(int) // 2 + 64
    for frame in range(7):
        pixels = background + np.random.default_rng(frame).integers(-9, 10, background.shape)
        for place, number in enumerate(numbers):
            top, left = 3 + 9 * place + frame, 2 + 14 * place + 2 * frame
            window = np.s_[top : top + 10, left : left + 11]
            annotations[frame][window] = number
            pixels[window] += np.array([[120, -60, 0], [-120, 0, 60]])[place]
        annotations[frame, 8:12, 6:14] = IGNORE
        frames.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        for part, image in (("JPEGImages", frames[-1]), ("Annotations", annotations[frame])):
            folder = root / part / "480p" / "noisy"
            folder.mkdir(parents=True, exist_ok=True)
            image = image if part == "JPEGImages" else Image.fromarray(image)
            image.save(folder / f"{frame:05d}.png")
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "own.txt").write_text("noisy\n")
    return frames, annotations


def slow_prediction(tokens: np.ndarray, given: np.ndarray, numbers: list[int]) -> np.ndarray:
    """tokens [T, rows, columns, D] of length 1 -> objects, uint8 [T, H, W], from those of the first
    frame: the last two frames, patches one or two away, the three nearest ones."""
    rows, columns = tokens.shape[1:3]
    of_patch = nearest(np.where(given == IGNORE, 0, given), rows, columns)
    labels = [(of_patch[..., None] == [0, *numbers]).astype(float)]
    predicted = [given]
    for frame in range(1, len(tokens)):
        context = [0, *range(max(1, frame - 2), frame)]
        known = np.stack([labels[number] for number in context])
        own = slow_propagation(tokens[frame], tokens[context], known, 2, 3, temperature=0.25)
        labels.append(own)
        maps = enlarged(own, 4)
        low, high = maps.min(axis=(0, 1)), maps.max(axis=(0, 1))
        stretched = (maps - low) / np.where(high > low, high - low, 1)
        winners = np.array([0, *numbers])[stretched.argmax(axis=2)]
        predicted.append(nearest(winners, *given.shape))
    return np.stack(predicted).astype(np.uint8)


def slow_scores(truth: np.ndarray, predicted: np.ndarray, number: int) -> dict[str, float]:
    scores = {"J": [], "F": []}
    for ours, theirs in zip(predicted[1:-1], truth[1:-1], strict=True):
        ours, theirs = ((part == number) & (theirs != IGNORE) for part in (ours, theirs))
        first, second = pixels(ours), pixels(theirs)
        scores["J"].append(len(first & second) / len(first | second))
        scores["F"].append(slow_f(theirs, ours))
    recalls = {f"{name}_recall": np.mean(np.array(own) > 0.5) for name, own in scores.items()}
    return {name: np.mean(own) for name, own in scores.items()} | recalls


@ON_CPU
def test_a_run_equals_one_by_hand(tmp_path):
    """Every key is away from its default, but for image_side and the crop's ratio, which frames do
    not have, what test_segmentation_by_hand.py names, and seed: nothing is drawn."""
    path = pretrained(tmp_path, colours=None)
    frames, truth = write_noisy_video(tmp_path / "davis", numbers=[2, 9])
    choice = "video_split=own frame_side=20 previous_frames=2 neighbourhood=2 top_k=3"
    part = "temperature=0.25 which=target layer=1 final_norm=False batch_size=3 save_masks=True"
    options = [*choice.split(), *part.split(), f"data_path={tmp_path / 'davis'}", *DATASET]
    run = run_joined(
        config("video", path, tmp_path, "dataset=folder", *options), ALONE, video.evaluate
    )

    # 20 x 31.5 pixels, of which the nearest multiples of 4: 5 x 8 patches.
    images = [image.resize((32, 20), Image.Resampling.BICUBIC) for image in frames]
    images = torch.stack([normalised(image, OF_DATASET) for image in images])
    with torch.no_grad():
        encoder = load_encoder(path, "target_encoder.", blocks=2, norm=False)
        tokens = all_tokens(encoder, images)[:, 1:]
    tokens = torch.nn.functional.normalize(tokens, dim=2).unflatten(1, (5, 8)).numpy()
    predicted = slow_prediction(tokens, truth[0], [2, 9])
    saved = sorted((tmp_path / "video" / "results" / "masks" / "noisy").iterdir())
    assert np.array_equal(np.stack([np.asarray(Image.open(own)) for own in saved]), predicted)
    scores = {number: slow_scores(truth, predicted, number) for number in (2, 9)}
    for number, expected in scores.items():
        assert run.report["objects"]["noisy"][number] == pytest.approx(expected)
        assert 0.2 < expected["J"] < 0.95
    means = {name: 100 * (scores[2][name] + scores[9][name]) / 2 for name in scores[2]}
    means["J&F"] = (means["J"] + means["F"]) / 2
    assert run.report["results"] == pytest.approx(means) and run.report["images"] == 7


# ---- Bad input. ----------------------------------------------------------------------------------


def annotation_of(root: Path, frame: int) -> Path:
    return root / "Annotations" / "480p" / "slow" / f"{frame:05d}.png"


def remove_later_annotation(root: Path) -> None:
    annotation_of(root, 3).unlink()


def shrink_annotation(root: Path) -> None:
    Image.fromarray(np.ones((HEIGHT, WIDTH - 1), np.uint8)).save(annotation_of(root, 2))


def empty_annotation(root: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(annotation_of(root, 0))


def empty_split(root: Path) -> None:
    write_names(root)


def no_split(root: Path) -> None:
    (root / "ImageSets" / "2017" / "val.txt").unlink()


def unknown_sequence(root: Path) -> None:
    write_names(root, "slow", "nowhere")


def too_short(root: Path) -> None:
    for path in sorted((root / "JPEGImages" / "480p" / "slow").iterdir())[2:]:
        path.unlink()


def damaged_frame(root: Path) -> None:
    path = root / "JPEGImages" / "480p" / "slow" / "00001.jpg"
    path.write_bytes(path.read_bytes()[:300])


DAMAGES = {
    remove_later_annotation: "these annotations are missing: .*slow/00003.png$",
    shrink_annotation: "the mask of .*slow/00002.jpg has 47 x 32 pixels: expected 48 x 32, as the",
    empty_annotation: "slow/00000.png marks no object",
    empty_split: "2017/val.txt: expected the names of what belongs",
    no_split: "2017/val.txt: expected the names of what belongs",
    unknown_sequence: "cannot list the folder .*JPEGImages/480p/nowhere: No such file",
    too_short: "slow holds 2 frames: expected 3 or more",
    damaged_frame: "cannot read .*slow/00001.jpg",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_videos_are_named(tmp_path, damage):
    root = tmp_path / "davis"
    write_video(root, "slow", [(0, CELL)])
    write_names(root, "slow")
    damage(root)
    with pytest.raises(DataError, match=DAMAGES[damage]) as caught:
        evaluate_pixels(root, tmp_path)
    assert "\n" not in str(caught.value)
