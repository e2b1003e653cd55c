"""Segmentation as a whole, each method against the same written by hand from images, masks and the
encoder's parts. Every key is away from its default, but for these: pretrained_weights (timm's
models only), random_init (there would be no checkpoint), precision (another one has no exact
numbers), num_workers and data_timeout (loader processes), cache_dir (nothing is kept)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from eval import segmentation
from eval.common import run_joined
from tests.evaluations import config
from tests.maps_by_hand import (
    blurred_noise,
    central_mask,
    central_picture,
    enlarged,
    patches_of,
    regions,
)
from tests.test_masks import save
from tests.test_probe_by_hand import (
    DATASET,
    OF_DATASET,
    ON_CPU,
    TRAINED,
    all_tokens,
    learning_rate,
    load_encoder,
    normalised,
    optimiser_steps,
    pretrained,
)
from util.distributed import Ranks

pytestmark = ON_CPU

SIDE, SHORTER, GRID, PATCH = 20, 25, 5, 4  # of a crop, of what it is cut from; patches, their side
# Width, height. Odd, so that no pixel of a smaller mask lies between two.
SIZES = [(41, 31), (31, 45), (33, 33), (53, 33), (27, 27), (31, 41), (47, 29)]
PLACES = np.arange(GRID**2).reshape(GRID, GRID)
PATCH_OF_PIXEL = np.kron(PLACES, np.ones((PATCH, PATCH), int)).ravel()
SPLITS = {"train": range(7), "val": range(2, 7)}
IMAGES = ["image_side=20", "dataset.crop_ratio=0.8", "batch_size=3", *DATASET]
PART = ["which=target", "layer=1", "final_norm=False", "seed=6"]


def write_images(folder: Path, numbers: list[int], bare: tuple = ()) -> dict[str, list]:
    """Of both splits; the masks of the images `bare` name no class. -> (image, mask)s as stored"""
    stored = {}
    for split, chosen in SPLITS.items():
        stored[split] = []
        for index in chosen:
            width, height = SIZES[index]
            seed = 10 * index + len(split)
            own = numbers[: 1 if index == 2 else None]  # one has one class only
            mask = regions(seed, width, height, own)
            mask[:3, 5:18] = 255
            mask[...] = 255 if index in bare else mask
            image = blurred_noise(seed, width, height)
            tint = (mask[..., None] * np.array([2, 7, 5])).astype(np.uint8)  # tells classes apart
            image = Image.blend(image, Image.fromarray(tint), 0.3)
            for part, array in (("images", np.array(image)), ("masks", mask)):
                save(folder / part / split / f"{index}.png", array)
            stored[split].append((image, mask))
    return stored


def cropped(stored: list, colours: tuple) -> tuple[Tensor, np.ndarray]:
    """-> normalised images [N, 3, SIDE, SIDE], masks [N, SIDE, SIDE]"""
    images = [normalised(central_picture(image, SIDE, SHORTER), colours) for image, _ in stored]
    return torch.stack(images), np.stack([central_mask(mask, SIDE, SHORTER) for _, mask in stored])


@torch.no_grad()
def target_tokens(path: Path, images: Tensor) -> Tensor:
    return all_tokens(load_encoder(path, "target_encoder.", 2, norm=False), images)[:, 1:]


def run(tmp_path: Path, path: Path, *overrides: str) -> dict:
    """What the command does, without the processes around it. -> its report"""
    places = [f"data_path={tmp_path / 'data'}", "job_name=hand", "dataset=masks"]
    cfg = config("segmentation", path, tmp_path, *places, *IMAGES, *PART, *overrides)
    alone = Ranks(0, 1, torch.device("cpu"))
    return run_joined(cfg, alone, segmentation.evaluate).report


# ---- Clusters of each image. ---------------------------------------------------------------------


def manhattan_complete_connected(vectors: np.ndarray, count: int) -> np.ndarray:
    """Patches that touch each other at a side are merged."""
    from sklearn.cluster import AgglomerativeClustering

    y, x = np.divmod(np.arange(GRID**2), GRID)
    touch = abs(y[:, None] - y) + abs(x[:, None] - x) == 1
    options = {"connectivity": touch, "metric": "manhattan", "linkage": "complete"}
    return AgglomerativeClustering(count, **options).fit_predict(vectors)


def ward_anywhere(vectors: np.ndarray, count: int) -> np.ndarray:
    from scipy.cluster.hierarchy import fcluster, linkage

    return fcluster(linkage(vectors, "ward"), count, "maxclust")


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def score(mask: np.ndarray, patches: np.ndarray) -> list[float]:
    """Of the segments of an image's patches: mIoU of the best assignment, ARI."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score

    segments = patches[PATCH_OF_PIXEL].reshape(SIDE, SIDE)
    truth, found = mask[mask != 255], segments[mask != 255]
    segments = set(found.tolist())
    overlaps = [[iou(truth == n, found == m) for m in segments] for n in set(truth.tolist())]
    overlaps = np.array(overlaps)
    best = overlaps[linear_sum_assignment(-overlaps)].sum() / len(overlaps)
    return [best, adjusted_rand_score(truth, found)]


def compare_clusters(
    found: dict, vectors: Tensor, masks: np.ndarray, counts: list, cluster
) -> None:
    """Those of the same vectors by hand. Without a class nothing is counted, and of one class not
    where the masks say how many segments there are."""
    least, scores = 2 if "truth" in counts else 1, []
    for own, mask in zip(F.normalize(vectors, dim=2).numpy(), masks, strict=True):
        classes = len(set(mask.ravel().tolist()) - {255})
        if classes >= least:
            numbers = [classes if count == "truth" else count for count in counts]
            scores.append([part for n in numbers for part in score(mask, cluster(own, n))])
    names = [f"{measure}_{count}" for count in counts for measure in ("miou", "ari")]
    expected = dict(zip(names, 100 * np.mean(scores, axis=0), strict=True))
    assert found["results"] == pytest.approx(expected)
    assert found["images"] == len(scores) == 5 - least  # of five, one without a class


def test_clusters_of_tokens(tmp_path):
    path = pretrained(tmp_path, colours=TRAINED)
    stored = write_images(tmp_path / "data", [2, 7, 90], bare=(4,))["val"]
    how = "metric=manhattan linkage=complete connected=True".split()
    choice = ["segments=[4,truth]", "centre=True", *[f"clustering.{option}" for option in how]]
    found = run(tmp_path, path, *choice)
    images, masks = cropped(stored, TRAINED)
    vectors = target_tokens(path, images)
    vectors = vectors - vectors.mean(dim=1, keepdim=True)
    compare_clusters(found, vectors, masks, [4, "truth"], manhattan_complete_connected)


def test_clusters_of_pixels(tmp_path):
    """The checkpoint does not say its colours: those of the data set."""
    path = pretrained(tmp_path, colours=None)
    stored = write_images(tmp_path / "data", [2, 7, 90], bare=(4,))["val"]
    how = ["clustering.metric=euclidean", "clustering.linkage=ward"]
    found = run(tmp_path, path, "features=pixels", "segments=[6,3]", *how)
    images, masks = cropped(stored, OF_DATASET)
    compare_clusters(found, patches_of(images, PATCH), masks, [6, 3], ward_anywhere)


# ---- A linear head. ------------------------------------------------------------------------------


def train_head(vectors: Tensor, masks: Tensor, classes: int) -> tuple[nn.Linear, Callable]:
    """3 epochs of 3 steps, of which the last has one image. vectors [N, L, D]
    -> the trained layer; a function from vectors to logits"""
    mean = vectors.double().mean(dim=(0, 1)).float()
    deviation = vectors.double().flatten(0, 1).std(dim=0, correction=0).float()
    linear = nn.Linear(vectors.shape[2], classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimiser = torch.optim.AdamW(linear.parameters(), weight_decay=0.7)
    for step in range(9):
        order = np.random.default_rng([2, 6, step // 3]).permutation(7)
        rows = order[step % 3 * 3 :][:3]
        logits = linear((vectors[rows] - mean) / deviation)[:, PATCH_OF_PIXEL]
        loss = F.cross_entropy(logits.flatten(0, 1), masks[rows].flatten(), ignore_index=255)
        optimiser.param_groups[0]["lr"] = learning_rate(step, 0.2, 0, 0, 9)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return linear, lambda patches: linear((patches - mean) / deviation)


def test_a_linear_head(tmp_path):
    """One class is in the evaluation's masks alone, one in the training's."""
    path = pretrained(tmp_path, colours=TRAINED)
    stored = write_images(tmp_path / "data", [1, 4, 7])
    head = "epochs=3 lr=0.2 weight_decay=0.7 batch_images=3".split()
    for split, number, other in (("train", 1, 0), ("val", 7, 9)):
        for index, (_, mask) in zip(SPLITS[split], stored[split], strict=True):
            mask[mask == number] = other
            save(tmp_path / "data" / "masks" / split / f"{index}.png", mask)
    with optimiser_steps() as taken:
        found = run(tmp_path, path, "method=linear", *[f"patch_head.{option}" for option in head])

    images, masks = cropped(stored["train"], TRAINED)
    vectors, masks = target_tokens(path, images), torch.from_numpy(masks).long()
    linear, classify = train_head(vectors, masks, classes=8)
    assert len(taken) == 9
    for own, expected in zip(taken[-1][0]["params"], linear.parameters(), strict=True):
        assert torch.allclose(own, expected, rtol=1e-3, atol=1e-5)
    images, masks = cropped(stored["val"], TRAINED)
    with torch.no_grad():
        logits = classify(target_tokens(path, images)).unflatten(1, (GRID, GRID)).numpy()
    predicted = np.stack([enlarged(own, PATCH).argmax(axis=2) for own in logits])
    truth, predicted = masks[masks != 255], predicted[masks != 255]
    ious = {str(n): 100 * iou(truth == n, predicted == n) for n in set(truth.tolist())}
    assert found["iou_of_class"] == pytest.approx(ious)
    assert ious.keys() == {"1", "4", "9"} and ious["4"] > 0
    accuracy = 100 * (truth == predicted).mean()
    expected = {"miou": np.mean(list(ious.values())), "pixel_accuracy": accuracy}
    assert found["results"] == pytest.approx(expected)
    assert found["images"] == 5


# ---- Votes of patches. ---------------------------------------------------------------------------


def pure(vectors: Tensor, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patches with 90 % of their pixels of one class; that class."""
    kept, labels = [], []
    for own, mask in zip(vectors.double().numpy(), masks, strict=True):
        for place, vector in enumerate(own):
            top, left = (PATCH * part for part in divmod(place, GRID))
            cell = mask[top : top + PATCH, left : left + PATCH].ravel().tolist()
            most = max(set(cell) - {255}, key=cell.count, default=255)
            if most != 255 and cell.count(most) >= 0.9 * PATCH**2:
                kept.append(vector)
                labels.append(most)
    return np.array(kept), np.array(labels)


@pytest.mark.parametrize("features", ["tokens", "pixels"])
def test_votes_of_patches(tmp_path, features):
    path = pretrained(tmp_path, colours=TRAINED)
    stored = write_images(tmp_path / "data", [0, 3, 8])
    votes = "method=knn neighbours=[7,3] temperature=0.4 bank_patches=60".split()
    found = run(tmp_path, path, *votes, f"features={features}")

    patches = {}
    for split in ("train", "val"):
        images, masks = cropped(stored[split], TRAINED)
        vectors = target_tokens(path, images) if features == "tokens" else patches_of(images, PATCH)
        patches[split] = pure(vectors, masks)
    bank, labels = patches["train"]
    drawn = np.random.default_rng([9, 6]).permutation(len(labels))[:60]
    bank, labels = bank[drawn], labels[drawn]
    vectors, truth = patches["val"]
    vectors, bank = vectors - bank.mean(axis=0), bank - bank.mean(axis=0)
    cosines = vectors @ bank.T / np.outer(*[np.linalg.norm(v, axis=1) for v in (vectors, bank)])
    expected = {}
    for k in (7, 3):
        hits = 0
        for own, label in zip(cosines, truth, strict=True):
            nearest = own.argsort()[-k:]
            weights = [np.exp(own[nearest][labels[nearest] == n] / 0.4).sum() for n in range(9)]
            hits += np.argmax(weights) == label
        expected[f"accuracy_{k}"] = 100 * hits / len(truth)
    assert found["results"] == pytest.approx(expected)
    assert len(patches["train"][1]) > 60 and len(set(truth)) == 3
    assert (found["bank"], found["patches"], found["images"]) == (60, len(truth), 5)
