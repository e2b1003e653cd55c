"""Features as files against a loop over the backbone, from any number of processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import build_digits
from eval.backbone import Tokens
from tests.backbones import digits_checkpoint, load_backbone, run_command
from tests.evaluations import arguments
from tests.runs import run_together

FILES = ("features.npy", "paths.txt", "labels.npy")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return digits_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def saved(folder) -> tuple[np.ndarray, list[str], np.ndarray, dict]:
    results = folder / "features" / "results"
    features, labels = (np.load(results / name, mmap_mode="r") for name in (FILES[0], FILES[2]))
    paths = (results / "paths.txt").read_text().splitlines()
    return features, paths, labels, json.loads((results / "meta.json").read_text())


@torch.no_grad()
def tokens_by_hand(
    checkpoint, pictures: list[Image.Image], mean: float, std: float, **options
) -> Tokens:
    small = [np.array(picture.resize((24, 24), Image.Resampling.BICUBIC)) for picture in pictures]
    images = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)
    return load_backbone(checkpoint, **options)((images / 255 - mean) / std)


def test_pooled_features_equal_a_loop_by_hand(checkpoint, tmp_path):
    overrides = [f"pretrained={checkpoint}", "pooling=cls+mean", "batch_size=50", "split=train"]
    assert run_command("features", f"output_dir={tmp_path}", *overrides) == 0
    digits = build_digits("train", None)
    pictures = [digits.load(index) for index in range(len(digits))]
    expected = tokens_by_hand(checkpoint, pictures, 0.306, 0.375)
    features, paths, labels, meta = saved(tmp_path)
    assert features.dtype == np.float32 and features.shape == (1400, 48)
    expected = torch.cat([expected.cls, expected.patches.mean(dim=1)], dim=1)
    assert np.abs(features - expected.numpy()).max() < 1e-5
    assert paths == [f"digits/train[{index}]" for index in range(1400)]
    assert labels.dtype == np.int64 and np.array_equal(labels, digits.labels)
    assert meta["shape"] == [1400, 48] and meta["classes"] == list("0123456789")
    assert len(meta["backbone"]["sha256"]) == 64 and meta["backbone"]["final_norm"] is True
    assert (meta["precision"], meta["mean"], meta["std"]) == ("fp32", [0.306] * 3, [0.375] * 3)
    assert meta["config"]["split"] == "train" and meta["packages"]["numpy"] == np.__version__


@pytest.fixture
def photos(tmp_path):
    """Seven, of which no two are alike, at two depths."""
    digits, folder = build_digits("eval", None), tmp_path / "photos"
    names = ["b.png", "a.png", "deep/c.png", "deep/er/a.png", "z.png", "deep/b.png", "n\n.png"]
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        digits.load(index).save(folder / name)
    return folder


def features_of(photos, checkpoint, *overrides: str) -> int:
    places = [f"output_dir={photos.parent}", f"pretrained={checkpoint}", f"images={photos}"]
    return run_command("features", *places, "batch_size=3", *overrides)


def test_tokens_of_given_images(checkpoint, photos):
    assert features_of(photos, checkpoint, "tokens=True", "dtype=float16") == 0
    features, paths, labels, meta = saved(photos.parent)
    files = sorted(photos.rglob("*.png"), key=str)
    assert paths == [str(file).replace("\n", "\\n") for file in files]
    expected = tokens_by_hand(checkpoint, [Image.open(file) for file in files], 0.306, 0.375)
    assert features.dtype == np.float16 and features.shape == (7, 36, 24)
    assert np.abs(features - expected.patches.numpy()).max() < 3e-3
    assert labels.tolist() == [-1] * 7 and meta["grid"] == [6, 6] and meta["classes"] is None


def test_a_second_start_replaces_all(checkpoint, photos):
    results = photos.parent / "features" / "results"
    assert features_of(photos, checkpoint, "tokens=True") == 0
    (results / "features.npy.host-1.writing").write_bytes(b"of a process that was killed")
    assert features_of(photos / "deep", checkpoint, f"output_dir={photos.parent}") == 0
    features, paths, labels, _ = saved(photos.parent)
    assert features.shape == (3, 24) and len(paths) == len(labels) == 3
    assert {path.name for path in results.iterdir()} == {*FILES, "meta.json"}


def test_an_unreadable_image_is_named(checkpoint, photos, capfd):
    results = photos.parent / "features" / "results"
    assert features_of(photos, checkpoint) == 0
    before = (results / "features.npy").read_bytes()
    (photos / "deep" / "c.png").write_bytes(b"\x89PNG no image")
    assert features_of(photos, checkpoint) == 2
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert sentence.startswith(f"error: cannot read {photos}/deep/c.png, and an evaluation leaves")
    assert (results / "features.npy").read_bytes() == before
    assert {path.name for path in results.iterdir()} == set(FILES)  # nothing vouches for them


def test_no_image_matches(checkpoint, photos, capfd):
    assert features_of(photos / "*.jpg", checkpoint, f"output_dir={photos.parent}") == 2
    (sentence,) = capfd.readouterr().err.splitlines()
    assert sentence.startswith(f"error: images={photos}/*.jpg: expected an image file, a folder ")
    assert not (photos.parent / "features" / "results" / "features.npy").exists()


def test_what_float16_cannot_hold(checkpoint, photos, capfd):
    contents = torch.load(checkpoint, weights_only=True)
    contents["state_dict"]["encoder.embed.proj.bias"][0] = 1e5
    path = photos.parent / "large.pth"
    torch.save(contents, path)
    assert features_of(photos, path, "final_norm=False") == 0
    assert saved(photos.parent)[0].max() > 65504
    assert features_of(photos, path, "final_norm=False", "dtype=float16") == 2
    assert "error: dtype=float16, precision=fp32: the backbone's " in capfd.readouterr().err


def test_a_full_disk_is_one_sentence(checkpoint, small_disk, capfd):
    """1,400 x 36 x 24 values are 4.8 MB."""
    overrides = [f"output_dir={small_disk}", f"pretrained={checkpoint}", "split=train"]
    assert run_command("features", *overrides, "tokens=True") == 2
    results = small_disk / "features" / "results"
    expected = f"error: {results}/features.npy cannot be written or read (No space left on device)"
    assert expected in capfd.readouterr().err
    assert list(results.iterdir()) == []


@pytest.mark.slow
def test_processes_and_workers_do_not_change_a_bit(photos):
    """Seven images in batches of two, the last one alone. Unlike those of a ViT, the last bits of
    convolutions on CPUs depend on what else is in a batch."""
    found, settings = [], "random_init=True image_side=32 batch_size=2".split()
    for number, (processes, workers) in enumerate([(1, 0), (1, 2), (2, 2)]):
        folder = photos.parent / str(number)
        own = [*settings, f"images={photos}", f"num_workers={workers}"]
        run_together(processes, *arguments("features", Path("timm:resnet10t"), folder, *own))
        found.append([(folder / "features" / "results" / name).read_bytes() for name in FILES])
    assert all(files == found[0] for files in found)
    assert np.load(photos.parent / "0" / "features" / "results" / "features.npy").std(0).max() > 0
