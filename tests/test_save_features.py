"""Features as files against those by hand, from any number of processes."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data.base import ArrayDataset
from data.datasets import build_digits
from eval.backbone import load_backbone
from eval.common import EvalRun
from eval.features import cache_path, main
from tests import eval_by_hand as by_hand
from tests.backbones import digits_checkpoint, run_command
from tests.evaluations import arguments, config
from tests.runs import run_together
from util.distributed import Ranks

FILES = ("features.npy", "paths.txt", "labels.npy")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return digits_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def saved(folder) -> tuple[np.ndarray, list[str], np.ndarray, dict]:
    results = folder / "features" / "results"
    features, labels = (np.load(results / name, mmap_mode="r") for name in (FILES[0], FILES[2]))
    paths = (results / "paths.txt").read_text().splitlines()
    return features, paths, labels, json.loads((results / "meta.json").read_text())


def test_pooled_features_by_hand(tmp_path, monkeypatch):
    """Every key is away from its default, but for random_init, or here or in the next test. Some
    images have no label."""
    by_hand.lose_labels(monkeypatch)
    path = by_hand.write_checkpoint(tmp_path, by_hand.TRAINED)
    root = by_hand.write_images(tmp_path / "images")
    own = ["split=train", "pooling=cls+mean", "final_norm=False", f"data_path={root}", "seed=3"]
    main(config("features", path, tmp_path, *by_hand.MOVED, *own))

    files, labels = by_hand.list_images(root, "train")
    weights, choice = by_hand.stored_weights(path, "target"), {"norm": False, "pooling": "cls+mean"}
    expected = by_hand.features(files, weights, **choice, colours=by_hand.TRAINED)
    labels[3::4] = -1
    features, paths, found_labels, meta = saved(tmp_path)
    assert features.dtype == np.float32 and features.shape == (50, 32)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
    assert paths == [str(file) for file in files]
    assert found_labels.dtype == np.int64 and np.array_equal(found_labels, labels)
    parameters = sum(v.numel() for k, v in weights.items() if k.startswith(USED))
    expected_meta = {
        "shape": [50, 32],
        "grid": [5, 5],
        "backbone": {
            **{"family": "lmim", "name": "vit_pico-target", "image_side": 20, "patch_size": 4},
            **{"embed_dim": 16, "layer": 1, "final_norm": False, "parameters": parameters},
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
        "precision": "fp32",
        "mean": list(by_hand.TRAINED[0]),
        "std": list(by_hand.TRAINED[1]),
        "classes": by_hand.CLASSES,
    }
    assert {name: meta[name] for name in expected_meta} == expected_meta
    chosen = {"split": "train", "data_path": str(root), "batch_size": 7, "seed": 3}
    assert chosen.items() <= meta["config"].items()
    assert meta["packages"]["numpy"] == np.__version__


# Not the final norm, the blocks behind layer=1 and the projection head.
USED = ("cls_token", "embed.", "pos_embed.", "blocks.0.", "blocks.1.")


def test_tokens_of_given_images_by_hand(tmp_path):
    """In bfloat16, written as float16. They are sorted by their whole names."""
    path = by_hand.write_checkpoint(tmp_path)
    root = by_hand.write_images(tmp_path / "images")
    for place in ("a.png", "b/a\nc.png", "b.png"):
        (root / place).parent.mkdir(exist_ok=True)
        shutil.copy(root / "val" / "cow" / f"{2 * len(place) % 4}.png", root / place)
    own = ["tokens=True", "dtype=float16", f"images={root}/**/*.png", "precision=bf16"]
    main(config("features", path, tmp_path, *by_hand.MOVED, *own))

    files = sorted(root.rglob("*.png"), key=str)
    images = by_hand.normalised(files, 20, 0.8, by_hand.OF_DATASET)
    weights = by_hand.stored_weights(path, "target")
    expected = by_hand.encode(weights, images, 2, norm=True)[:, 1:].numpy()
    features, paths, labels, meta = saved(tmp_path)
    assert features.dtype == np.float16 and features.shape == (len(files), 25, 16)
    errors = np.abs(features - expected)
    assert errors.max() < 0.1 and 1e-3 < errors.mean() < 1e-2
    assert paths == [str(file).replace("\n", "\\n") for file in files]
    assert labels.tolist() == [-1] * len(files) and meta["classes"] is None
    assert meta["shape"] == list(features.shape) and meta["grid"] == [5, 5]
    assert (meta["precision"], meta["mean"]) == ("bf16", list(by_hand.OF_DATASET[0]))
    assert meta["std"] == list(by_hand.OF_DATASET[1])


def test_whatever_features_depend_on_names_their_file_in_the_cache(tmp_path):
    first = by_hand.write_checkpoint(tmp_path)
    (tmp_path / "other").mkdir()
    second = by_hand.write_checkpoint(tmp_path / "other", by_hand.TRAINED)
    settings = ["dataset=imagefolder", f"cache_dir={tmp_path / 'cache'}", f"data_path={tmp_path}"]
    cfg = config("nn", first, tmp_path, *settings)
    numbers, backbones = np.arange(4), {}
    keys = "pretrained random_init seed which layer final_norm image_side".split()

    def path_of(split="eval", pooling="mean", labels=numbers, **changes) -> Path:
        own = OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{k}={v}" for k, v in changes.items()]))
        key = tuple(own[key] for key in keys)
        backbones[key] = backbones.get(key) or load_backbone(own)
        run = EvalRun(own, Ranks(0, 1, torch.device("cpu")), backbones[key])
        images = np.zeros((len(labels), 4, 4, 3), np.uint8)
        return cache_path(run, ArrayDataset("some", images, labels, []), split, pooling)

    changes = [
        {"pretrained": second},
        *({"random_init": True, "seed": seed} for seed in (0, 1)),
        {"which": "target"},
        *({"layer": layer} for layer in (0, 1)),
        {"final_norm": True},
        {"image_side": 20},
        {"precision": "bf16"},
        {"dataset.name": "imagenet"},
        {"dataset.options.decoder": "pil"},
        {"dataset.crop_ratio": 0.8},
        {"dataset.mean": [0.485, 0.456, 0.4]},
        {"dataset.std": [0.229, 0.224, 0.2]},
        {"data_path": tmp_path / "other"},
        {"data_path": "null"},
        {"split": "train"},
        *({"pooling": pooling} for pooling in ("cls", "cls+mean")),
        {"labels": numbers[:3]},
        {"labels": numbers[[0, 1, 3, 2]]},
    ]
    found = [path_of(), *(path_of(**change) for change in changes)]
    assert len(set(found)) == len(changes) + 1
    assert {path.parent for path in found} == {tmp_path / "cache"}
    # What changes no feature.
    for change in [{"batch_size": 7}, {"num_workers": 1}, {"data_path": f"{tmp_path}/other/.."}]:
        assert path_of(**change) == found[0]


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


def test_a_second_start_replaces_all(checkpoint, photos, capsys):
    results = photos.parent / "features" / "results"
    assert features_of(photos, checkpoint, "tokens=True") == 0
    (results / "features.npy.host-1.writing").write_bytes(b"of a process that was killed")
    assert features_of(photos / "deep", checkpoint, f"output_dir={photos.parent}") == 0
    assert "features: replacing those of lmim vit_nano (sha256 " in capsys.readouterr().out
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
    assert sentence == (
        "error: 1 of 7 images could not be read, more than max_bad_images=0.001 allows: "
        f"{photos}/deep/c.png"
    )
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
    for number, (processes, workers) in enumerate([(1, 0), (2, 2)]):
        folder = photos.parent / str(number)
        own = [*settings, f"images={photos}", f"num_workers={workers}"]
        run_together(processes, *arguments("features", Path("timm:test_resnet"), folder, *own))
        found.append([(folder / "features" / "results" / name).read_bytes() for name in FILES])
    assert all(files == found[0] for files in found)
    assert np.load(photos.parent / "0" / "features" / "results" / "features.npy").std(0).max() > 0
