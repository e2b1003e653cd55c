"""Data sets: every layout on real files, every kind of bad input, and what the drawings promise.
ImageNet: test_imagenet.py."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data.base import UNREADABLE, DataError
from data.datasets import DATASETS, build_dataset
from data.files import PathList, given_images
from data.picture import Picture, to_image
from tests.forked import ROOT

WITHOUT_FILES = {"digits", "textures", "photographs"}
CONFIGS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in (Path(__file__).parents[1] / "configs" / "dataset").glob("*.yaml")
}


def save_image(path: Path, red: int = 128, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 40, 40)).save(path)
    return path


def red_of(picture: Picture) -> int:
    return int(np.asarray(to_image(picture))[..., 0].mean().round())


def paths_of(dataset) -> list[Path]:
    return [Path(dataset.describe(index)) for index in range(len(dataset))]


# ---- Folders of files. ---------------------------------------------------------------------------


@pytest.fixture
def image_tree(tmp_path):
    """Two training classes, one of them with a nested folder; the brightness tells the class."""
    for name in ("b.jpg", "a.PNG", "deep/er/c.jpeg"):
        save_image(tmp_path / "train" / "cat" / name, red=10)
    save_image(tmp_path / "train" / "ant" / "x.bmp", red=200)
    save_image(tmp_path / "val" / "cat" / "y.webp", red=10)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    save_image(tmp_path / "train" / "cat" / ".hidden.jpg")
    save_image(tmp_path / "train" / ".cache" / "thumbnail.jpg")
    return tmp_path


def test_imagefolder_finds_each_image_once_with_its_class(image_tree):
    train = build_dataset("imagefolder", "train", image_tree)
    assert train.classes == ["ant", "cat"]
    assert train.labels.dtype == np.int64
    expected = ["ant/x.bmp", "cat/a.PNG", "cat/b.jpg", "cat/deep/er/c.jpeg"]
    assert paths_of(train) == [image_tree / "train" / path for path in expected]
    assert train.labels.tolist() == [0, 1, 1, 1]
    for index, label in enumerate(train.labels):
        assert abs(red_of(train.load(index)) - (200, 10)[label]) < 5


def test_imagefolder_labels_evaluation_images_by_the_training_classes(image_tree):
    evaluation = build_dataset("imagefolder", "eval", image_tree)
    assert evaluation.classes == ["ant", "cat"]
    assert evaluation.labels.tolist() == [1]


@pytest.mark.parametrize("name", ["validation", "test"])
def test_imagefolder_accepts_other_names_for_val(image_tree, name):
    (image_tree / "val").rename(image_tree / name)
    evaluation = build_dataset("imagefolder", "eval", image_tree)
    assert f"/{name}/cat/y.webp" in evaluation.describe(0)


def test_imagefolder_rejects_evaluation_classes_unknown_in_training(image_tree):
    save_image(image_tree / "val" / "zebra" / "z.jpg")
    with pytest.raises(DataError, match="val has classes that .*train lacks: zebra$"):
        build_dataset("imagefolder", "eval", image_tree)


def test_imagefolder_names_what_is_missing(image_tree, tmp_path):
    (image_tree / "train" / "dog").mkdir()
    for name in ("imagefolder", "imagenet"):
        with pytest.raises(DataError, match="contain no images: dog; expected files ending in"):
            build_dataset(name, "train", image_tree)
    (image_tree / "val").rename(image_tree / "elsewhere")
    with pytest.raises(DataError, match="evaluation images in .*: val or validation or test$"):
        build_dataset("imagefolder", "eval", image_tree)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="contains no class folders; expected .*/CLASS"):
        build_dataset("imagefolder", "train", tmp_path / "empty")
    with pytest.raises(DataError, match="elsewhere/train is not a folder"):
        build_dataset("imagefolder", "train", image_tree / "elsewhere")


def test_folder_has_no_labels_and_one_set_of_images(image_tree):
    train, evaluation = (build_dataset("folder", split, image_tree) for split in ("train", "eval"))
    assert train.labels is None and train.classes is None and evaluation.labels is None
    assert len(train) == 5 and paths_of(train) == paths_of(evaluation)


def test_a_folder_that_is_named_like_an_image_is_a_folder(image_tree):
    (image_tree / "train/cat").rename(image_tree / "train/cat.jpg")
    (image_tree / "val/cat").rename(image_tree / "val/cat.jpg")
    train = build_dataset("imagefolder", "train", image_tree)
    assert train.classes == ["ant", "cat.jpg"] and train.labels.tolist() == [0, 1, 1, 1]
    expected = ["ant/x.bmp", "cat.jpg/a.PNG", "cat.jpg/b.jpg", "cat.jpg/deep/er/c.jpeg"]
    assert paths_of(train) == [image_tree / "train" / path for path in expected]
    assert len(build_dataset("folder", "train", image_tree)) == 5
    (image_tree / "train/cat.jpg/link.png").symlink_to("b.jpg")
    assert len(build_dataset("folder", "train", image_tree)) == 6
    globbed = given_images(f"{image_tree}/train/**/*.jpg")
    assert paths_of(globbed) == [image_tree / "train/cat.jpg/b.jpg"]


def test_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "readme.txt").touch()
    with pytest.raises(DataError, match="contains no images; expected files ending in .jpg"):
        build_dataset("folder", "train", tmp_path)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train", "ant/x.bmp cat/a.PNG cat/b.jpg cat/deep/er/c.jpeg"),
        ("train/cat/b.jpg", "cat/b.jpg"),
        ("train/cat/*", "cat/a.PNG cat/b.jpg"),  # neither notes nor folders
        ("train/**/*.jp*g", "cat/b.jpg cat/deep/er/c.jpeg"),
        ("train/[ab]*/x.bmp", "ant/x.bmp"),
    ],
)
def test_images_are_given_as_a_file_a_folder_or_a_glob(image_tree, pattern, expected):
    found = given_images(str(image_tree / pattern))
    assert paths_of(found) == [image_tree / "train" / path for path in expected.split()]
    assert found.labels is None and isinstance(found.load(0), Picture)


@pytest.mark.parametrize("pattern", ["nowhere", "train/*.jpg", "train/cat/*.txt", ""])
def test_given_images_that_are_none(image_tree, pattern):
    (image_tree / "empty").mkdir()
    pattern = str(image_tree / (pattern or "empty"))
    with pytest.raises(DataError) as caught:
        given_images(pattern)
    assert str(caught.value).startswith(f"images={pattern}: expected an image file, a folder with ")


def test_path_list_returns_every_path_unchanged():
    paths = ["/a/b.jpg", "", "/tmp/übung 1.png", "/tmp/bad\udcff.jpg", "/z"]
    stored = PathList(paths)
    assert [stored[i] for i in range(len(stored))] == paths


# ---- Image formats. ------------------------------------------------------------------------------


def save_16_bit(path: Path) -> None:
    Image.fromarray(np.full((16, 20), 100 * 256, dtype=np.uint16)).save(path)


def save_palette(path: Path) -> None:
    image = Image.new("P", (20, 16), 1)
    image.putpalette([0, 0, 0, 100, 100, 100])
    image.save(path, transparency=b"\x00\x80")


FORMATS = {
    "grey.jpg": lambda path: Image.new("L", (20, 16), 100).save(path),
    "cmyk.jpg": lambda path: Image.new("CMYK", (20, 16), (0, 0, 0, 155)).save(path),
    "alpha.png": lambda path: Image.new("RGBA", (20, 16), (100, 100, 100, 0)).save(path),
    "grey_alpha.png": lambda path: Image.new("LA", (20, 16), (100, 7)).save(path),
    "palette.png": save_palette,
    "sixteen_bit.png": save_16_bit,
    "sixteen_bit.tif": save_16_bit,
    "picture.gif": lambda path: Image.new("L", (20, 16), 100).save(path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_the_same_rgb(tmp_path, name):
    FORMATS[name](tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's, of its decoder
        image = to_image(build_dataset("folder", "train", tmp_path).load(0))
    assert image.mode == "RGB" and image.size == (20, 16)
    assert np.abs(np.asarray(image).astype(int) - 100).max() <= 2


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"<html>404</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_raise_a_known_error(tmp_path, damage):
    path = tmp_path / "broken.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UNREADABLE):
        build_dataset("folder", "train", tmp_path).load(0)


# ---- Bad settings, for every data set. -----------------------------------------------------------


BAD_SETTINGS = [
    (("digits", "train", None, {"seed": 3}), "digits has no such option; expected one of none"),
    (
        ("textures", "train", None, {"size": 3}),
        "no such option; expected one of image_size, train_images",
    ),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS)
def test_bad_settings_are_answered_with_the_valid_ones(settings, message):
    with pytest.raises(DataError, match=message):
        build_dataset(*settings)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - WITHOUT_FILES))
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_bad_data_path_is_named(name, split, tmp_path):
    with pytest.raises(DataError, match=f"dataset {name} needs data_path: "):
        build_dataset(name, split, None)
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere is not a folder; .*needs"):
        build_dataset(name, split, f"{tmp_path}/nowhere")
    save_image(tmp_path / "file.jpg")
    with pytest.raises(DataError, match="file.jpg is not a folder"):
        build_dataset(name, split, tmp_path / "file.jpg")


@pytest.mark.parametrize(
    "name, folder",
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("stl10", "stl10_binary"),
    ],
)
def test_torchvision_files_are_asked_for_and_checked(name, folder, tmp_path):
    with pytest.raises(DataError, match=f"{folder} is not a folder; .*tar.gz"):
        build_dataset(name, "train", tmp_path)
    (tmp_path / folder).mkdir()
    with pytest.raises(DataError, match="incomplete or damaged"):
        build_dataset(name, "train", tmp_path)


# ---- Data sets without files. --------------------------------------------------------------------


def test_digits_are_scikit_learns_in_their_order():
    from sklearn.datasets import load_digits

    train, evaluation = build_dataset("digits", "train"), build_dataset("digits", "eval")
    assert (len(train), len(evaluation)) == (1400, 397)
    source = load_digits()
    assert np.concatenate([train.labels, evaluation.labels]).tolist() == source.target.tolist()
    for dataset, index, original in ((train, 0, 0), (evaluation, 0, 1400), (evaluation, 396, 1796)):
        pixels = np.asarray(dataset.load(index))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels / 255 * 16 - source.images[original][..., None]).max() < 0.04
    assert train.describe(12) == "digits/train[12]"


# ---- Configuration files. ------------------------------------------------------------------------


def test_each_data_set_has_a_config_with_the_same_keys():
    assert CONFIGS.keys() == DATASETS.keys()
    for name, config in CONFIGS.items():
        assert list(config) == ["name", "flip", "crop_ratio", "mean", "std", "options"]
        assert config["name"] == name


@pytest.mark.parametrize("name", sorted(WITHOUT_FILES))
def test_configured_mean_and_std_are_those_of_the_images(name):
    config = CONFIGS[name]
    dataset = build_dataset(name, "train", options=config["options"])
    pixels = np.stack([np.asarray(dataset.load(index)) for index in range(200)]) / 255
    assert np.allclose(pixels.mean(axis=(0, 1, 2)), config["mean"], atol=0.02)
    assert np.allclose(pixels.std(axis=(0, 1, 2)), config["std"], atol=0.02)


def test_listing_images_needs_no_torch():
    """For the launcher, which answers before torch is there."""
    code = "import sys, data.datasets; print({'torch', 'torchvision'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
