"""Tar files of small images, made in memory."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data.datasets import build_dataset


def image_file(seed: int, kind: str = "JPEG") -> bytes:
    """Different pixels for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def packed(files: dict[str, bytes], **settings) -> bytes:
    """A tar, as it is stored."""
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w", **settings) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stored.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def build(root: Path, split: str = "train", **options):
    return build_dataset("tar", split, root, options)


def contents(dataset) -> list[tuple[str, bytes]]:
    """(class, file as it is stored) of each image."""
    return [
        (dataset.classes[label], bytes(dataset.contents(index)))
        for index, label in enumerate(dataset.labels)
    ]


FILES = {
    f"{name}/{name}_{number}.{kind}": image_file(10 * seed + number, kind.replace("jpg", "JPEG"))
    for seed, name in enumerate(["cat", "ant", "dog"])
    for number, kind in enumerate(["jpg", "png", "jpg", "jpg"])
}


def of_class(name: str) -> dict[str, bytes]:
    """Its files, without their folder."""
    return {path.split("/")[1]: file for path, file in FILES.items() if path.startswith(name)}


PER_CLASS = {f"{name}.tar": packed(of_class(name)) for name in ("dog", "cat", "ant")}


def write_class_tars(root: Path) -> Path:
    """One tar for each class to train, one class to evaluate."""
    for name, tar in PER_CLASS.items():
        write(root / "train" / name, tar)
    write(root / "val" / "cat.tar", packed({"new.jpg": image_file(99)}))
    return root
