"""Images in tar files: every layout gives the data set of the unpacked files, to every process."""

import io
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from data.datasets import DataError, build_dataset
from data.loader import TrainLoader
from data.tar import MOST_OPEN_TARS
from data.transforms import TrainTransform
from tests.tars import (
    FILES,
    PER_CLASS,
    build,
    contents,
    image_file,
    packed,
    write,
    write_class_tars,
)
from tests.test_imagenet import WNIDS, write_devkit


@pytest.fixture
def root(tmp_path):
    return write_class_tars(tmp_path)


# ---- The same images as in folders. --------------------------------------------------------------


def folders_in_shards() -> dict[str, bytes]:
    shards: list[dict[str, bytes]] = [{}, {}]
    for number, (path, file) in enumerate(reversed(FILES.items())):
        shards[number % 2][f"./{'ba'[number % 2]}/{path}"] = file
    return {f"shard-{number}.tar": packed(files) for number, files in enumerate(shards)}


LAYOUTS = {
    "one tar per class": lambda: PER_CLASS,
    "shards with class folders": folders_in_shards,
    "a tar of tars": lambda: {"ILSVRC2012_img_train.tar": packed({"readme.txt": b"!"} | PER_CLASS)},
    "the whole folder": lambda: {
        "t.TAR": packed({f"train/{p}": file for p, file in FILES.items()})
    },
    "tars of tars of tars": lambda: {
        "a.tar": packed({"b/c.tar": packed({"ant.tar": PER_CLASS["ant.tar"]})}),
        "d.tar": packed({"cat.tar": PER_CLASS["cat.tar"], "x/dog.tar": PER_CLASS["dog.tar"]}),
    },
}


@pytest.mark.parametrize("decoder", ["fast", "pil"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_data_set_is_that_of_the_unpacked_files(tmp_path, layout, decoder):
    for name, tar in LAYOUTS[layout]().items():
        write(tmp_path / "tars" / "train" / name, tar)
    for name, file in FILES.items():
        write(tmp_path / "files" / "train" / name, file)
    ours = build(tmp_path / "tars", decoder=decoder)
    theirs = build_dataset("imagefolder", "train", tmp_path / "files", {"decoder": decoder})
    assert ours.classes == theirs.classes == ["ant", "cat", "dog"]
    assert ours.labels.dtype == np.int64
    assert ours.labels.tolist() == theirs.labels.tolist()
    assert len(ours) == len(theirs) == len(FILES)
    for index in range(len(ours)):
        assert Path(ours.describe(index)).name == Path(theirs.describe(index)).name
        assert ours.contents(index) == theirs.contents(index)
        ours_loaded, theirs_loaded = ours.load(index), theirs.load(index)
        assert type(ours_loaded) is type(theirs_loaded)
        assert np.array_equal(np.asarray(ours_loaded), np.asarray(theirs_loaded))


def test_descriptions_lead_to_the_image(tmp_path):
    write(tmp_path / "train" / "all.tar", packed({"./deep/ant.tar": PER_CLASS["ant.tar"]}))
    assert build(tmp_path).describe(1) == f"{tmp_path}/train/all.tar/deep/ant.tar/ant_1.png"


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_evaluation_labels_are_those_of_training(root, name):
    (root / "val").rename(root / name)
    evaluation = build(root, "eval")
    assert evaluation.classes == ["ant", "cat", "dog"] and evaluation.labels.tolist() == [1]
    assert contents(evaluation) == [("cat", image_file(99))]


@pytest.mark.parametrize("pack_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, pack_format):
    name = "/".join(["deep" * 20] * 3 + ["größe", "x" * 150 + ".jpg"])
    files = {name: image_file(1), "größe/y.jpg": image_file(2)}
    write(tmp_path / "train" / "a.tar", packed(files, format=pack_format))
    dataset = build(tmp_path)
    assert contents(dataset) == [("größe", image_file(1)), ("größe", image_file(2))]
    assert dataset.describe(0) == f"{tmp_path}/train/a.tar/{name}"


def test_names_that_are_no_text_are_kept(tmp_path):
    write(tmp_path / "train" / "a.tar", packed({"bad\udcff.jpg": image_file(1)}, format=0))
    assert build(tmp_path).describe(0).endswith("a.tar/bad\udcff.jpg")


def test_only_visible_image_files_count(tmp_path):
    path = tmp_path / "train" / "ant.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "b.txt", ".c.jpg", ".d/e.jpg", "._a.jpg", ".f.tar"):
            file = image_file(1)
            member = tarfile.TarInfo(name)
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
        kinds = {
            "soft.jpg": tarfile.SYMTYPE,
            "hard.jpg": tarfile.LNKTYPE,
            "in.jpg": tarfile.DIRTYPE,
        }
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            tar.addfile(member)
    write(path.with_name(".hidden.tar"), b"not read")
    write(path.with_name("notes.txt"), b"not read")
    (path.parent / "folder.tar").mkdir()
    dataset = build(tmp_path)
    assert [dataset.describe(i) for i in range(len(dataset))] == [f"{path}/a.jpg"]


def test_of_members_with_the_same_name_the_last_counts(tmp_path):
    path = write(tmp_path / "train" / "ant.tar", packed({"a.jpg": image_file(1)}))
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("./a.jpg")
        member.size = len(image_file(2))
        tar.addfile(member, io.BytesIO(image_file(2)))
    assert contents(build(tmp_path)) == [("ant", image_file(2))]


# ---- ImageNet. -----------------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path):
    inner = {f"{wnid}.tar": packed({f"{wnid}_1.JPEG": image_file(1)}) for wnid in WNIDS}
    write(tmp_path / "train" / "ILSVRC2012_img_train.tar", packed(inner))
    return tmp_path


def flat_validation(folder: str = "") -> bytes:
    names = [f"{folder}ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
    return packed({name: image_file(number) for number, name in enumerate(names, 1)})


@pytest.mark.parametrize("folder", ["", "./", "val/"])
def test_imagenet_as_it_is_shipped(imagenet, folder):
    write_devkit(imagenet / "ILSVRC2012_devkit_t12/data", [WNIDS[2], *WNIDS[:2]], [2, 1, 3, 1])
    write(imagenet / "val" / "ILSVRC2012_img_val.tar", flat_validation(folder))
    evaluation = build(imagenet, "eval")
    assert evaluation.classes == WNIDS
    by_label = [(0, 1), (1, 3), (2, 2), (2, 4)]
    expected = [(WNIDS[label], image_file(number)) for label, number in by_label]
    assert contents(evaluation) == expected


def test_validation_tars_named_by_class_need_no_devkit(imagenet):
    write(imagenet / "val" / f"{WNIDS[1]}.tar", flat_validation())
    assert build(imagenet, "eval").labels.tolist() == [1] * 4


def test_a_flat_validation_set_says_what_is_missing(imagenet):
    tar = write(imagenet / "val" / "ILSVRC2012_img_val.tar", flat_validation())
    with pytest.raises(DataError, match="meta.mat are needed to label its images; looked in"):
        build(imagenet, "eval")
    write_devkit(imagenet, WNIDS, [1, 2, 3])
    with pytest.raises(DataError, match="val contains ILSVRC2012_val_00000004.JPEG; expected nam"):
        build(imagenet, "eval")
    write_devkit(imagenet, [*WNIDS, "n99999999"], [1, 2, 3, 4])
    with pytest.raises(DataError, match="val has classes that .*/train lacks: n99999999$"):
        build(imagenet, "eval")
    with tarfile.open(tar, "a") as file:
        file.addfile(tarfile.TarInfo("zebra.jpg"))
    with pytest.raises(DataError, match="val contains zebra.jpg; expected names from ILSVRC"):
        build(imagenet, "eval")


# ---- Many workers and threads. -------------------------------------------------------------------


def batches(dataset, num_workers: int):
    transform = TrainTransform(side=8, min_crop=0.2, flip=True, seed=3)
    order = {"seed": 3, "batch_size": 2, "accum_iter": 1, "rank": 0, "world_size": 1}
    loader = TrainLoader(dataset, transform, num_workers=num_workers, device="cpu", **order)
    return list(loader.stream(0, 14))  # more than two epochs


def test_workers_read_the_batches_of_the_unpacked_files(root):
    for name, file in FILES.items():
        write(root / "files" / "train" / name, file)
    expected = batches(build_dataset("imagefolder", "train", root / "files"), num_workers=0)
    dataset = build(root)
    dataset.load(0)  # what is open here is open in the workers
    for found, batch in zip(batches(dataset, num_workers=2), expected, strict=True):
        assert torch.equal(found.images, batch.images) and torch.equal(found.labels, batch.labels)
        assert not found.unreadable


@pytest.fixture(scope="module")
def many_tars(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    for number in range(MOST_OPEN_TARS + 50):
        write(root / "train" / f"{number:04d}.tar", packed({"a.jpg": b"%d" % number}))
    return root


def test_not_all_tars_are_open_at_once(many_tars):
    dataset = build(many_tars)
    for index in range(len(dataset)):
        assert dataset.contents(index) == b"%d" % index
    files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert sum(path.endswith(".tar") for path in files) == MOST_OPEN_TARS


def test_threads_may_read_while_others_close(many_tars):
    dataset = build(many_tars)
    order = np.random.default_rng(0).integers(0, len(dataset), 400)
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(dataset.contents, order.tolist())
        assert all(file == b"%d" % index for file, index in zip(found, order, strict=True))


def test_a_data_set_can_be_sent_to_another_process(root):
    dataset = build(root)
    assert contents(pickle.loads(pickle.dumps(dataset))) == contents(dataset)


def test_a_tar_that_became_shorter_is_named(root):
    dataset = build(root)
    path = root / "train" / "dog.tar"
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(OSError, match=f"{path} ends at byte .*: it was longer when indexed"):
        dataset.contents(len(dataset) - 1)


# ---- Bad input. ----------------------------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path, root):
    with pytest.raises(DataError, match=r"needs data_path: a folder with train/\*.tar and val/"):
        build_dataset("tar", "train", None)
    with pytest.raises(DataError, match=r"nowhere is not a folder; dataset tar needs a folder wit"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty/train is not a folder; dataset tar needs"):
        build(tmp_path / "empty")
    write(tmp_path / "empty" / "train" / "a.jpg", b"")
    with pytest.raises(DataError, match=r"train contains no tar files; expected .*/train/\*.tar$"):
        build(tmp_path / "empty")
    (root / "val").rename(root / "elsewhere")
    with pytest.raises(DataError, match="evaluation images in .*: val or validation or test$"):
        build(root, "eval")


def test_evaluation_classes_unknown_in_training_are_named(root):
    write(root / "val" / "zebra.tar", packed({"a.jpg": image_file(1)}))
    with pytest.raises(DataError, match=r"val has classes that \S*/train lacks: zebra$"):
        build(root, "eval")
