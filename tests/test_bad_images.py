"""Images that cannot be read: an evaluation that leaves them out gives the numbers of one that
never had them, and says so."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.base import DataError, LabelledImages
from data.datasets import build_dataset
from data.files import given_images
from tests.backbones import run_command
from tests.eval_by_hand import report_of, write_checkpoint, write_images
from tests.runs import TINY, run_together

BROKEN = ["val/bee", "val/bee", "val/dog"]  # the first of their images
BROKEN_TRAINING = ["train/ant", "train/dog"]  # each class keeps five
MASKED = ["images/train/a4.png", "images/val/a0.png", "images/val/a5.png"]


def break_file(path: Path, number: int) -> None:
    contents = path.read_bytes()
    path.write_bytes([contents[: len(contents) // 2], b"", b"<html>404</html>"][number % 3])


def twice(root: Path, names: list[str], replaced: bool = False) -> tuple[Path, Path]:
    """The folder, in which these files are broken, and a copy without them, or (replaced) with the
    next one in their place. A folder stands for the first of its files that is left."""
    without = root.with_name("without")
    shutil.copytree(root, without)
    for number, name in enumerate(names):
        path = without / name
        path = min(path.iterdir()) if path.is_dir() else path
        break_file(root / path.relative_to(without), number)
        if replaced:
            following = sorted(path.parent.iterdir())[1]
            path.write_bytes(following.read_bytes())
        else:
            path.unlink()
    return root, without


@pytest.fixture
def photos(tmp_path) -> tuple[Path, Path]:
    return twice(write_images(tmp_path / "photos"), BROKEN + BROKEN_TRAINING)


@pytest.fixture
def masked(tmp_path) -> tuple[Path, Path]:
    """Two halves of each image, with noise."""
    rng, root = np.random.default_rng(0), tmp_path / "photos"
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for number in range(6):
            mask = np.zeros((32, 32), dtype=np.uint8)
            mask[:, 4 * number + 4 :] = 1
            pixels = rng.normal(40 + 150 * mask[..., None], 40, (32, 32, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"images/{split}/a{number}.png")
            Image.fromarray(mask).save(root / f"masks/{split}/a{number}.png")
    return twice(root, MASKED)


def evaluate(name: str, checkpoint: Path, root: Path, *overrides: str) -> dict:
    """-> what results/ has"""
    folder = root.with_name(f"jobs-{root.name}")
    settings = [f"pretrained={checkpoint}", f"data_path={root}", f"output_dir={folder}"]
    settings += ["num_workers=0", "batch_size=4", "max_bad_images=0.4"]
    assert run_command(name, *settings, *overrides) == 0
    return report_of(folder / name)


def assert_same_numbers(ours: dict, expected: dict, left_out: int, *names: str) -> None:
    for name in names or expected["results"]:
        found = ours["results"][name]
        assert found == pytest.approx(expected["results"][name], rel=1e-4, abs=1e-4), name
    assert ours["images"] == expected["images"]
    assert (ours["left_out"], expected["left_out"]) == (left_out, 0)


EVALUATIONS = {
    "nn": ("nn", [], 3),
    "few_shot": ("few_shot", ["shots=[2]", "draws=2"], 5),
}


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_numbers_are_of_the_images_that_are_left(evaluation, tmp_path, photos, capfd, caplog):
    name, overrides, left_out = EVALUATIONS[evaluation]
    overrides = ["dataset=imagefolder", f"cache_dir={tmp_path / 'cache'}", *overrides]
    checkpoint = write_checkpoint(tmp_path)
    expected = evaluate(name, checkpoint, photos[1], *overrides)
    for _ in range(2):  # the second finds the features in the cache
        caplog.clear()
        ours = evaluate(name, checkpoint, photos[0], *overrides)
        assert_same_numbers(ours, expected, left_out)
        assert f", left out: {left_out} unreadable, " in capfd.readouterr().out
        named = [record.getMessage() for record in caplog.records]
        assert len(named) == len(set(named)) == left_out


TRAININGS = {
    "linear_probe on stored features": (["poolings=[mean]", "cached=True"], 5),
    "finetune": ([], 3),
}


@pytest.mark.parametrize("training", TRAININGS)
def test_what_is_trained_is_measured_on_the_images_that_are_left(training, tmp_path):
    """Training images are replaced by the next."""
    root, (overrides, left_out) = write_images(tmp_path / "photos"), TRAININGS[training]
    overrides = [*overrides, "dataset=imagefolder", "epochs=2", "warmup_epochs=1", "eval_freq=1"]
    broken, without = twice(root, BROKEN_TRAINING, replaced=True)
    for number in range(3):
        path = min((without / BROKEN[number]).iterdir())
        break_file(broken / path.relative_to(without), number)
        path.unlink()
    name, checkpoint = training.split()[0], write_checkpoint(tmp_path)
    reports = [evaluate(name, checkpoint, root, *overrides) for root in (broken, without)]
    assert_same_numbers(*reports, left_out)


def test_collapse_is_measured_on_the_images_that_are_left(tmp_path, photos):
    checkpoint = write_checkpoint(tmp_path)
    reports = [evaluate("collapse", checkpoint, root, "dataset=imagefolder") for root in photos]
    assert_same_numbers(*reports, 3, "rankme", "mean_cosine", "channel_std")
    assert f"tokens of {reports[1]['images']} images" in reports[0]["protocol"]


@pytest.mark.parametrize("method", ["unsupervised", "linear", "knn"])
def test_segmentation_is_measured_on_the_images_that_are_left(method, tmp_path, masked):
    checkpoint = write_checkpoint(tmp_path)
    overrides = ["dataset=masks", f"method={method}", "neighbours=[3]", "patch_head.epochs=2"]
    overrides += ["patch_head.batch_images=9", "segments=[2]"]
    reports = [evaluate("segmentation", checkpoint, root, *overrides) for root in masked]
    assert_same_numbers(*reports, 2 if method == "unsupervised" else 3)
    assert reports[0]["protocol"] == reports[1]["protocol"]


OTHERS = ["a.heic", "B.HEIC", "deep/c.mov", "deep/README", ".DS_Store", ".deep/d.mov"]
IN_WORDS = "2 .heic, 1 .mov, 1 without ending"


def add_others(folder: Path) -> Path:
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("name", ["folder", "images", "imagefolder"])
def test_other_files_are_counted_by_ending(name, tmp_path):
    root = write_images(tmp_path / "photos")
    for split in ("train", "eval"):
        assert build_dataset(name, split, root).others == ""
    add_others(root / "train" / "ant")
    train, evaluation = (build_dataset(name, split, root) for split in ("train", "eval"))
    assert train.others == IN_WORDS
    assert train.labels is None or LabelledImages(train).others == IN_WORDS
    assert evaluation.others == ("" if name == "imagefolder" else IN_WORDS)
    assert "README" not in "".join(map(train.describe, range(len(train))))


def test_given_images_count_other_files_of_the_folder_or_the_glob(tmp_path):
    root = add_others(write_images(tmp_path / "photos") / "val" / "bee")
    assert given_images(str(root)).others == IN_WORDS
    assert given_images(f"{root}/*").others == "2 .heic"
    assert given_images(f"{root}/*g").others == given_images(str(min(root.glob("*g")))).others == ""


def test_a_folder_of_other_files_names_their_endings(tmp_path):
    add_others(tmp_path / "photos")
    for name in ("folder", "images"):
        with pytest.raises(DataError, match=rf"contains no images; .*\.gif, found {IN_WORDS}$"):
            build_dataset(name, "train", tmp_path / "photos")
    for pattern in (tmp_path / "photos", f"{tmp_path}/photos/**/*"):
        with pytest.raises(DataError, match=r"^images=.*: expected .*\.gif, found 2 \.heic"):
            given_images(str(pattern))


def test_the_count_of_images_says_what_was_left_out(tmp_path, capfd):
    root, checkpoint = write_images(tmp_path / "photos"), write_checkpoint(tmp_path)
    add_others(root / "train" / "ant")
    (root / "val" / "bee" / "a.avi").touch()
    train, kept = (len(list(root.glob(f"{split}/*/*g"))) for split in ("train", "val"))
    where = [f"data_path={root}", f"output_dir={tmp_path}", "dataset=imagefolder"]
    assert run_command("demo", *where, *TINY[1:], "epochs=1", "batch_size=8", "resume=False") == 0
    counts = f"{train} images (left out: {IN_WORDS}) and {kept} for the check (left out: 1 .avi), "
    assert counts in capfd.readouterr().out
    where.append(f"pretrained={checkpoint}")
    assert run_command("features", *where) == 0
    assert capfd.readouterr().out.endswith(", left out: 1 .avi\n")
    assert run_command("few_shot", *where, "shots=[1]") == 0
    assert f"{kept} images, left out: 1 .avi, {IN_WORDS}, " in capfd.readouterr().out


def saved(job: Path) -> tuple[np.ndarray, list[str], list[int], dict]:
    results = job / "results"
    features, labels = (np.load(results / f"{name}.npy") for name in ("features", "labels"))
    paths = (results / "paths.txt").read_text().splitlines()
    return features, paths, labels.tolist(), json.loads((results / "meta.json").read_text())


@pytest.mark.parametrize("processes, tokens", [(1, False), (2, True)])
def test_saved_features_have_no_rows_of_what_is_left_out(
    processes, tokens, tmp_path, photos, capfd
):
    found = []
    for root in photos:
        settings = [f"pretrained={write_checkpoint(tmp_path)}", f"data_path={root}"]
        settings += ["dataset=imagefolder", f"output_dir={root}-features", "num_workers=0"]
        settings += ["batch_size=4", "max_bad_images=0.4", f"tokens={tokens}"]
        if processes == 1:
            assert run_command("features", *settings) == 0
            output = capfd.readouterr().out
        else:
            output = run_together(processes, "--config-name=features", *settings)
        found.append(saved(Path(f"{root}-features/features")))
    (features, paths, labels, meta), (expected, *expected_names, expected_meta) = found
    assert "unreadable" not in output
    assert features.shape == expected.shape and np.allclose(features, expected, atol=1e-5)
    broken, without = photos
    moved = [path.replace(f"{without}/", f"{broken}/") for path in expected_names[0]]
    assert (paths, labels) == (moved, expected_names[1])
    assert meta["shape"] == expected_meta["shape"] == list(features.shape)
    ours, theirs = ({path.relative_to(r) for path in r.glob("val/*/*")} for r in photos)
    gone = [str(broken / path) for path in ours - theirs]
    assert len(gone) == 3 and meta["left_out"] == sorted(gone)
    assert expected_meta["left_out"] == []


def test_dark_images_of_all_processes_are_warned_of_once(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(8):
        values = np.full((20, 20), 4095, dtype=np.uint16)
        Image.fromarray(values).save(root / f"{number}.png")
    arguments = ["--config-name=features", f"pretrained={write_checkpoint(tmp_path)}"]
    arguments += [f"images={root}", f"output_dir={tmp_path}", "num_workers=0", "batch_size=2"]
    output = run_together(2, *arguments)
    assert output.count("its largest value is below an eighth of what its bits hold") == 1


def test_visualize_leaves_them_out(tmp_path, capfd, caplog):
    root = write_images(tmp_path / "photos") / "val" / "bee"
    broken = max(root.iterdir())
    break_file(broken, 0)
    images = [f"images={root}", "max_bad_images=0.4", "max_iter=null", "clusters=[2]"]
    places = [f"pretrained={write_checkpoint(tmp_path)}", f"output_dir={tmp_path}"]
    assert run_command("visualize", *places, *images) == 0
    kept = sorted(str(path) for path in root.iterdir() if path != broken)
    report = json.loads((tmp_path / "visualize" / "results" / "visualize.json").read_text())
    assert (report["images"], report["left_out"]) == (kept, 1)
    pictures = [f"{number:03}-{Path(path).stem}" for number, path in enumerate(kept)]
    assert report["pictures"] == pictures
    assert caplog.records[0].getMessage() == f"unreadable image, left out: {broken}"
    assert ", left out: 1 unreadable" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["nn", "visualize"])
def test_more_than_max_bad_images_end_with_one_sentence(name, tmp_path, photos, capfd):
    where = [f"images={photos[0]}/val"] if name == "visualize" else ["dataset=imagefolder"]
    where += [f"data_path={photos[0]}", f"output_dir={tmp_path}", "num_workers=0"]
    assert run_command(name, f"pretrained={write_checkpoint(tmp_path)}", *where) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "images could not be read, more than max_bad_images=0.001 allows: " in error
    assert f"{min((photos[0] / 'val' / 'bee').iterdir())}" in error
