"""Evaluations written out by hand: a checkpoint and images made on the spot, the crop, the forward
pass and the scores. Of the project only the initial weights of a fresh network are used."""

import json
from functools import cache, wraps
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.base import ImageDataset
from data.datasets import DATASETS
from models.vit import Encoder
from tests.runs import read_board

WIDTH, DEPTH, HEADS, PATCH, GRID = 16, 3, 2, 4, 4
CLASSES = ["ant", "bee", "cow", "dog", "eel", "fox", "gnu"]
# Mean and deviation: of pre-training, and of the data set's config.
TRAINED = (0.21, 0.34, 0.47), (0.52, 0.23, 0.41)
OF_DATASET = (0.43, 0.26, 0.12), (0.27, 0.58, 0.36)

# What all evaluations share, away from its default. These change no result: num_workers (0, for
# speed), data_timeout. Without a GPU there is one device.
MOVED = [
    *"which=target layer=1 image_side=20 batch_size=7 dataset=imagefolder".split(),
    *"dataset.crop_ratio=0.8 dataset.options.decoder=pil".split(),
    *(f"dataset.{key}={list(rgb)}" for key, rgb in zip(("mean", "std"), OF_DATASET, strict=True)),
]

# ---- What is evaluated. --------------------------------------------------------------------------


def write_checkpoint(folder: Path, colours: tuple | None = None) -> Path:
    """Encoder and target differ, no weight is zero. colours: what it says about its images."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for prefix in ("encoder.", "target_encoder."):
        for name, shape in shapes().items():
            values = torch.randn(shape, generator=generator)
            spread = 1.4 / shape[1] ** 0.5 if len(shape) == 2 else 0.3
            weights[prefix + name] = spread * values + ("norm" in name and "weight" in name)
    encoder = {"name": "vit_pico", "num_heads": HEADS}
    config = {"encoder": encoder, "freeze_pe": False, "target": {"name": "ema"}}
    if colours is not None:
        config["dataset"] = {"mean": list(colours[0]), "std": list(colours[1])}
    path = folder / "by-hand.pth"
    torch.save({"state_dict": weights, "config": config, "epoch": 1, "step": 10}, path)
    return path


def shapes() -> dict[str, tuple[int, ...]]:
    """Of an encoder with the first layer of its projection head, which evaluations leave out."""
    found = {
        "cls_token": (1, 1, WIDTH),
        "embed.proj.weight": (WIDTH, 3 * PATCH**2),
        "embed.proj.bias": (WIDTH,),
        "pos_embed.pos_embeds": (1 + GRID**2, WIDTH),
        "head.linear0.weight": (32, WIDTH),
    }
    layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in (f"blocks.{number}." for number in range(DEPTH)):
        for name, (rows, columns) in layers.items():
            found[f"{block}{name}.weight"] = (rows * WIDTH, columns * WIDTH)
            found[f"{block}{name}.bias"] = (rows * WIDTH,)
    for norm in ["norm", *(f"blocks.{n}.norm{m}" for n in range(DEPTH) for m in (1, 2))]:
        found |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    return found


def stored_weights(path: Path, which: str) -> dict[str, Tensor]:
    prefix = {"encoder": "encoder.", "target": "target_encoder."}[which]
    weights = torch.load(path, weights_only=True)["state_dict"].items()
    return {key.removeprefix(prefix): v for key, v in weights if key.startswith(prefix)}


def fresh_weights(seed: int) -> dict[str, Tensor]:
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    cut = {"grid_size": GRID, "patch_size": PATCH, "freeze_pe": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(**sizes, **cut, mlp_dim=0, mlp_depth=0, recompute=False)
    return encoder.state_dict()


def write_images(root: Path) -> Path:
    """train/CLASS/ and val/CLASS/, JPEG and PNG. No two of one size or brightness; a class has its
    own pattern, and much noise. The last class is in train/ alone."""
    rng = np.random.default_rng(0)
    patterns = rng.uniform(0, 255, (len(CLASSES), 4, 4, 3))
    for split, most in (("train", 8), ("val", 7)):
        for label, name in enumerate(CLASSES[: None if split == "train" else -1]):
            (root / split / name).mkdir(parents=True)
            for number in range(most - label % 3):  # classes are of different sizes
                small = patterns[label] + rng.normal(0, 45, (4, 4, 3))
                image = Image.fromarray(small.clip(0, 255).astype(np.uint8))
                pixels = np.array(image.resize(rng.integers(17, 41, 2), Image.Resampling.BILINEAR))
                pixels = pixels * rng.uniform(0.4, 1) + rng.normal(0, 12, pixels.shape)
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                ending = "jpg" if number % 2 else "png"
                image.save(root / split / name / f"{number}.{ending}")
    return root


def report_of(job: Path) -> dict:
    """The one results file of an evaluation."""
    (file,) = (job / "results").glob("*.json")
    return json.loads(file.read_text())


def scalars(job: Path) -> dict[str, float]:
    """What TensorBoard shows of the one evaluation of a job."""
    (folder,) = (job / "tensorboard").glob("*/")
    board = read_board(folder)
    events = {name: board.Scalars(name) for name in board.Tags()["scalars"]}
    assert all([event.step for event in own] == [0] for own in events.values())
    return {name: own[0].value for name, own in events.items()}


# ---- From images to features. --------------------------------------------------------------------


def list_images(root: Path, split: str) -> tuple[list[Path], np.ndarray]:
    """-> files, labels; class by class."""
    found = sorted((root / split).glob("*/*"), key=str)
    return found, np.array([CLASSES.index(path.parent.name) for path in found])


def lose_labels(monkeypatch) -> None:
    """Every fourth image of the data set imagefolder."""
    build = DATASETS["imagefolder"]

    @wraps(build)  # which says what its options are
    def build_with_gaps(split: str, data_path: str | None, **options) -> ImageDataset:
        dataset = build(split, data_path, **options)
        dataset.labels[3::4] = -1
        return dataset

    monkeypatch.setitem(DATASETS, "imagefolder", build_with_gaps)


def only_labelled(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of list_images(), after lose_labels()."""
    kept = np.arange(len(labels)) % 4 != 3
    return features[kept], labels[kept]


@cache
def central_crop(path: Path, side: int, crop_ratio: float) -> np.ndarray:
    """Resized so that the shorter side is side / crop_ratio, of which the middle. -> [H, W, 3]"""
    image, shorter = Image.open(path).convert("RGB"), round(side / crop_ratio)
    size = [length * shorter // min(image.size) for length in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    return np.array(image.crop((left, top, left + side, top + side)))


def normalised(files: list[Path], side: int, crop_ratio: float, colours: tuple) -> Tensor:
    """-> [N, 3, side, side]"""
    pixels = np.stack([central_crop(path, side, crop_ratio) for path in files]) / 255
    pixels = (pixels - np.array(colours[0])) / np.array(colours[1])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


def encode(weights: dict[str, Tensor], images: Tensor, blocks: int, norm: bool) -> Tensor:
    """-> [N, 1 + L, WIDTH], class token first"""

    def linear(name: str, values: Tensor) -> Tensor:
        return F.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer_norm(name: str, values: Tensor) -> Tensor:
        own = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(values, (WIDTH,), *own, eps=1e-6)

    cells = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [N, 3, rows, columns, 4, 4]
    cells = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    table = weights["pos_embed.pos_embeds"]
    grid = table[1:].T.reshape(1, WIDTH, GRID, GRID)
    side = images.shape[-1] // PATCH
    if side != GRID:
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    patches = linear("embed.proj", cells) + grid.flatten(2).transpose(1, 2)
    cls = (weights["cls_token"] + table[0]).expand(len(images), -1, -1)
    tokens = torch.cat([cls, patches], dim=1)
    for block in (f"blocks.{number}." for number in range(blocks)):
        parts = linear(f"{block}attn.qkv", layer_norm(f"{block}norm1", tokens))
        # [N, tokens, 3 D] -> three of [N, heads, tokens, D / heads]
        queries, keys, values = parts.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        shares = (queries @ keys.transpose(2, 3) / (WIDTH / HEADS) ** 0.5).softmax(dim=3)
        tokens = tokens + linear(f"{block}attn.proj", (shares @ values).transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"{block}mlp.fc1", layer_norm(f"{block}norm2", tokens)))
        tokens = tokens + linear(f"{block}mlp.fc2", hidden)
    return layer_norm("norm", tokens) if norm else tokens


def features(
    files: list[Path], weights: dict, *, norm: bool, pooling: str, colours: tuple = OF_DATASET
) -> np.ndarray:
    """With the other keys as in MOVED. -> [N, WIDTH], or [N, 2 WIDTH]"""
    return pool(encode(weights, normalised(files, 20, 0.8, colours), 2, norm), pooling)


def pool(tokens: Tensor, pooling: str) -> np.ndarray:
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    parts = {"cls": [cls], "mean": [mean], "cls+mean": [cls, mean]}[pooling]
    return torch.cat(parts, dim=1).numpy()


# ---- Scores. -------------------------------------------------------------------------------------


def unit_length(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def leave_one_out(features: np.ndarray, labels: np.ndarray) -> float:
    """Percent of the images whose nearest other image has their label."""
    unit, right = unit_length(features), 0
    for row, label in enumerate(labels):
        others = [other for other in range(len(labels)) if other != row]
        right += labels[max(others, key=lambda other: unit[other] @ unit[row])] == label
    return 100 * int(right) / len(labels)


def nearest_neighbours(bank: tuple, queries: tuple, k: int, temperature: float) -> list[float]:
    """bank, queries: features, labels. Percent of the queries whose class has the most votes of the
    k nearest of the bank, and whose class is among the five with the most."""
    unit, first, five = unit_length(bank[0]), 0, 0
    for query, label in zip(unit_length(queries[0]), queries[1], strict=True):
        cosines, votes = unit @ query, dict.fromkeys(bank[1], 0.0)
        for voter in np.argsort(-cosines)[:k]:
            votes[bank[1][voter]] += np.exp(cosines[voter] / temperature)
        ranking = [c for c in sorted(votes, key=votes.get, reverse=True)[:5] if votes[c] > 0]
        first, five = first + (ranking[0] == label), five + (label in ranking)
    return [100 * int(right) / len(queries[1]) for right in (first, five)]
