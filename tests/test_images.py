"""Photographs from anywhere, trained on at one's desk: --config-name=images."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import build_dataset
from data.images import is_kept
from data.picture import decode, to_image
from launch import local
from launch.config import ConfigError, compose_config
from launch.validate import check_config
from tests.runs import LAUNCHER, finish, records, run_together, start_process
from util.build import build_model, train_loader
from util.distributed import Ranks

ORIENTATION = 0x0112  # the EXIF tag
COUNT = 300
NAMES = [f"{'red' if n % 2 else 'blue'}/photo_{n:03}.jpg" for n in range(COUNT)]
KEPT = {name for name in NAMES if is_kept(tuple(name.split("/")))}
# One that is trained on and one that is kept for the check.
TRUNCATED, NO_IMAGE = min(set(NAMES) - KEPT), min(KEPT)
GREY, CMYK, TURNED = NAMES[-3:]


def save_photo(path: Path, number: int, mode: str = "RGB", **options) -> None:
    rng = np.random.default_rng(number)
    width, height = rng.integers(60, 160, 2)
    pixels = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
    pixels[..., 0 if number % 2 else 2] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, quality=90, **options)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # a quarter turn
    return exif


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """In two class folders."""
    root = tmp_path_factory.mktemp("photos")
    odd = {GREY: {"mode": "L"}, CMYK: {"mode": "CMYK"}, TURNED: {"exif": turned()}}
    for number, name in enumerate(NAMES):
        save_photo(root / name, number, **odd.get(name, {}))
    contents = (root / TRUNCATED).read_bytes()
    (root / TRUNCATED).write_bytes(contents[: len(contents) // 2])
    (root / NO_IMAGE).write_bytes(b"<html>404</html>")
    return root


def as_tar(photos: Path, folder: Path) -> Path:
    with tarfile.open(folder / "photos.tar", "w") as tar:
        tar.add(photos, "photos")
    return folder / "photos.tar"


def as_folder(photos: Path, folder: Path) -> Path:
    """Some deeper than others."""
    for number, name in enumerate(NAMES):
        place = folder / "photos" / ("2023" if number % 3 else "2024/05") / Path(name).name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / name, place)
    return folder / "photos"


SMALL = (
    "encoder.embed_dim=48 encoder.depth=1 encoder.num_heads=3 encoder.grid_size=4 num_vis=4 "
    "decoder_depth=1 proj.mlp_depth=1 epochs=2 num_workers=0"
).split()


def settings(data_path: Path, output_dir: Path) -> list[str]:
    return ["--config-name=images", f"data_path={data_path}", f"output_dir={output_dir}", *SMALL]


def train(data_path: Path, output_dir: Path, *overrides: str) -> tuple[int, str]:
    return finish(start_process([*LAUNCHER, *settings(data_path, output_dir), *overrides]))


# ---- Whole runs. ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_classes_are_checked_on_images_that_are_not_trained_on(photos, tmp_path):
    code, output = train(as_tar(photos, tmp_path), tmp_path / "jobs")
    assert code == 0, output
    trained = COUNT - len(KEPT)
    assert f"{trained} images and {len(KEPT)} for the check, " in output
    assert "128 images per step, 4 steps, from the beginning" in output
    answers = {TRUNCATED: "replaced by its neighbour", NO_IMAGE: "left out"}
    for name, answer in answers.items():
        said = [line for line in output.splitlines() if name.split("/")[1] in line]
        assert len(said) == 1 and said[0].startswith(f"unreadable image, {answer}: ")
    assert f"leave-one-out inside the {len(KEPT) - 1} evaluation images" in output
    log = records(tmp_path / "jobs" / "images-vit_small")
    accuracies = [record["nn_accuracy"] for record in log if "nn_accuracy" in record]
    assert accuracies == [100, 100]  # red and blue


@pytest.mark.slow
def test_processes_leave_the_same_images_out(photos, tmp_path):
    output = run_together(2, *settings(photos, tmp_path), "batch_size=8")
    accuracy = f"100.00 % (leave-one-out inside the {len(KEPT) - 1} evaluation images)"
    assert output.count(accuracy) == 2
    assert output.count("unreadable image, left out: ") == 1


@pytest.mark.slow
def test_a_folder_without_classes_is_trained_on_as_a_whole(photos, tmp_path):
    code, output = train(as_folder(photos, tmp_path), tmp_path / "jobs")
    assert code == 0, output
    assert f"{COUNT} images, " in output and "nearest neighbour" not in output
    assert output.count("unreadable image, replaced by its neighbour") == 2


@pytest.mark.slow
def test_too_many_unreadable_images_stop_the_run(photos, tmp_path):
    """Two of the 300 are more than this share of those that are trained on."""
    code, output = train(photos, tmp_path, "max_bad_images=0.005")
    assert code == 2, output
    total = COUNT - len(KEPT)
    assert f"error: 2 of {total} images could not be read, more than max_bad_images=0.005" in output
    assert TRUNCATED in output and NO_IMAGE in output


# ---- What is trained on and what is kept. --------------------------------------------------------


def names_of(dataset) -> list[str]:
    return ["/".join(Path(dataset.describe(i)).parts[-2:]) for i in range(len(dataset))]


def splits_of(data_path: Path) -> list[list[str]]:
    return [names_of(build_dataset("images", split, data_path)) for split in ("train", "eval")]


def test_every_tenth_image_is_kept_by_its_name_alone(photos, tmp_path):
    train, kept = splits_of(photos)
    assert train == sorted(set(NAMES) - KEPT) and kept == sorted(KEPT)
    assert 0.05 < len(kept) / COUNT < 0.15
    assert splits_of(as_tar(photos, tmp_path)) == [train, kept]
    # Elsewhere, written in another order, below a folder more, and with fewer and other images.
    there = tmp_path / "there" / "photos" / "mine"
    for name in [*reversed(NAMES[50:]), "green/more.jpg"]:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).touch()
    fewer, fewer_kept = splits_of(tmp_path / "there")
    assert set(fewer_kept) - {"green/more.jpg"} == KEPT & set(NAMES[50:])
    assert not set(fewer) & set(fewer_kept)


LAYOUTS = {  # files, and the classes of those that are trained on
    "one folder": ("a/1 a/2 a/3", None),
    "beside folders": ("a/1 b/2 3", None),
    "deeper": ("a/x/1 b/x/2 b/3", None),
    "train and val": ("train/a/1 train/b/2 val/b/3 val/a/4 test/a/5 other/6", "a b"),
    "train and test": ("train/a/1 train/b/2 test/a/3 test/b/4", "a b"),
    "train and val without classes": ("train/1 train/2 val/3", None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_layouts(layout, packed, tmp_path):
    files, classes = LAYOUTS[layout]
    for number, name in enumerate(files.split()):
        save_photo(tmp_path / "photos" / f"{name}.jpg", number)
    path = as_tar(tmp_path / "photos", tmp_path) if packed else tmp_path / "photos"
    train, kept = (build_dataset("images", split, path) for split in ("train", "eval"))
    classes = classes and classes.split()
    assert train.classes == kept.classes == classes
    stems = [[int(Path(name).stem) for name in names_of(dataset)] for dataset in (train, kept)]
    given = "train" in layout
    assert stems[0] == ([1, 2] if given else stems[1])
    for dataset in (train, kept):
        assert (dataset.labels is None) == (classes is None)
        for index, name in enumerate(names_of(dataset)):
            assert classes is None or classes[dataset.labels[index]] == name.split("/")[0]
            pixels = np.asarray(to_image(dataset.load(index)))
            assert pixels[..., 2 if int(Path(name).stem) % 2 else 0].mean() > 150


def test_a_tar_that_is_compressed_is_refused(tmp_path):
    path = tmp_path / "photos.tar.gz"
    path.touch()
    with pytest.raises(ValueError, match=r"photos.tar.gz is compressed; expected plain .tar files"):
        build_dataset("images", "train", path)


def test_a_tar_does_not_mind_the_others_next_to_it(photos, tmp_path):
    path = as_tar(photos, tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"x")
    (tmp_path / "other.tar.gz").touch()
    before = splits_of(path)
    shutil.copy(tmp_path / "photos.tar", tmp_path / "again.tar")
    assert splits_of(tmp_path / "again.tar") == splits_of(path) == before
    assert (tmp_path / "photos.tar-index-latent-mim.npz").is_file()


@pytest.mark.parametrize("decoder", ["fast", "pil"])
def test_exif_rotation_is_not_applied_as_in_torchvision(decoder, photos):
    from torchvision.datasets.folder import pil_loader

    path = photos / TURNED
    with Image.open(path) as image:
        assert image.getexif()[ORIENTATION] == 6
    found = to_image(decode(bytearray(path.read_bytes()), decoder))
    expected = pil_loader(str(path))
    assert found.size == expected.size and found.size[0] != found.size[1]
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 2


# ---- The config. ---------------------------------------------------------------------------------


def composed(*overrides: str):
    return compose_config("images", list(overrides))


@pytest.mark.parametrize(
    ("encoder", "width", "heads", "mlp_dim"),
    [
        ("vit_nano", 64, 2, 512),
        ("vit_small", 256, 8, 2048),
        ("vit_large", 512, 16, 4096),
    ],
)
def test_decoder_and_head_go_with_the_encoder(encoder, width, heads, mlp_dim):
    cfg = composed(f"encoder={encoder}", f"num_vis={4 if encoder == 'vit_nano' else 20}")
    assert (cfg.decoder_embed_dim, cfg.decoder_num_heads, cfg.proj.mlp_dim) == (
        width,
        heads,
        mlp_dim,
    )
    check_config(cfg)


def test_vit_tiny_is_small():
    """It had 36.7 million parameters with the decoder and the head of ViT-B."""
    with torch.device("meta"):
        model = build_model(composed("encoder=vit_tiny"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < 10e6


@pytest.mark.parametrize("epochs, warmup", [(1, 0.05), (800, 40), (801, 40)])
def test_warmup_is_a_share_of_the_epochs(epochs, warmup):
    assert composed(f"epochs={epochs}").warmup_epochs == warmup


@pytest.mark.parametrize("mistake", ["epochs=abc", "encoder.embed_dim=abc", "encoder.embed_dim=0"])
def test_mistakes_in_what_others_follow_from_are_named(mistake):
    with pytest.raises(ConfigError, match=f"^{mistake}: expected a whole number"):
        check_config(composed(mistake))


@pytest.mark.parametrize("processes, accum_iter", [(1, 1), (3, 2), (8, 1)])
def test_the_batch_never_exceeds_the_data_set(processes, accum_iter):
    cfg = composed(
        "dataset=textures", f"accum_iter={accum_iter}", "dataset.options.train_images=50"
    )
    dataset = build_dataset("textures", "train", options=dict(cfg.dataset.options))
    ranks = Ranks(0, processes, torch.device("cpu"))
    loader = train_loader(cfg, ranks, dataset, transform=lambda *_: None)
    assert 0 < loader.batch_size * accum_iter * processes <= 50
    assert loader.steps_per_epoch == 1 and cfg.batch_size == 128, "the config was changed"


@pytest.mark.parametrize("distributed, processes", [(True, 3), (False, 1)])
def test_all_gpus_that_are_there(distributed, processes, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(local, "run_processes", lambda cfg, count: started.append(count))
    monkeypatch.setattr(local, "run_configured_worker", lambda config: started.append(1))
    cfg = composed(f"env.distributed={distributed}", f"output_dir={tmp_path}")
    check_config(cfg)
    local.run_here(cfg)
    assert started == [processes] and cfg.env.ngpu == processes


def test_slurm_only_when_asked():
    assert composed().env.slurm is False
    cfg = composed("env=slurm")
    assert (cfg.env.slurm, cfg.env.ngpu) == (True, 8)
    with pytest.raises(ConfigError, match="^env.ngpu=null: expected a number where env.slurm=True"):
        check_config(composed("env.slurm=True"))
