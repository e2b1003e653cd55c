"""Data sets with a mask for each image: `masks` (folders of images and of masks) and `voc`; videos
with annotated objects in the folder layout of DAVIS-2017.

A mask is a PNG whose values are numbers of classes or objects: palette colours are for the eye
only. 255 marks pixels that have neither.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data import files
from data.base import DataError, ImageDataset, readable
from data.files import FileDataset, PathList, existing_folder, list_folder, require_files

if TYPE_CHECKING:
    from data.picture import Picture

IGNORE = 255
MASKS_LAYOUT = "a folder with images/ and masks/, each with train/ and val/ or without either"
VOC_LAYOUT = "a folder with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/"
DAVIS_LAYOUT = "a folder with JPEGImages/480p/, Annotations/480p/ and ImageSets/2017/"
FEWEST_FRAMES = 3  # the first is given, and the last is not scored


class MaskedImages(ImageDataset):
    """Images, and for each a mask."""

    def mask(self, index: int) -> np.ndarray:
        """uint8 [H, W]: classes, or IGNORE."""
        raise NotImplementedError


class MaskedFiles(FileDataset, MaskedImages):
    """Image files, and for each the file of its mask."""

    def __init__(
        self, paths: Sequence[str | Path], mask_paths: Sequence[Path], others: Iterable[str] = ()
    ) -> None:
        super().__init__(paths, others=others)
        require_files("masks", mask_paths)
        self.mask_paths = PathList(mask_paths)

    def mask(self, index: int) -> np.ndarray:
        return read_mask(self.mask_paths[index])


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """uint8 [H, W]: the values as they are stored."""
    with opened(path) as image:
        if image.mode not in ("P", "L", "1"):
            valid = "palette or 8-bit grey images whose values are class numbers"
            raise DataError(f"the mask {path} is stored as {image.mode}: expected {valid}")
        return np.array(image).astype(np.uint8)


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    with readable(path), Image.open(path) as image:
        yield image


def build_masks(split: str, data_path: str | None) -> MaskedFiles:
    """images/a.jpg with masks/a.png, below train/ and val/ or, for both splits, below neither."""
    root = existing_folder("masks", data_path, MASKS_LAYOUT, "images", "masks")
    folder = root / "images"
    if any((folder / name).is_dir() for name in ("train", *files.EVAL_FOLDERS)):
        folder = files.split_folder(folder, split)
    images, others = files.images_below("masks", str(folder), MASKS_LAYOUT)
    places = [Path(image).relative_to(root / "images").with_suffix(".png") for image in images]
    return MaskedFiles(images, [root / "masks" / place for place in places], others)


def build_voc(split: str, data_path: str | None) -> MaskedFiles:
    """The images that ImageSets/Segmentation/train.txt or val.txt names."""
    root = existing_folder("voc", data_path, VOC_LAYOUT)
    list_file = "train.txt" if split == "train" else "val.txt"
    names = read_names(root / "ImageSets" / "Segmentation" / list_file)
    images = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    require_files("images", images)
    masks = [root / "SegmentationClass" / f"{name}.png" for name in names]
    return MaskedFiles(images, masks)


def read_names(path: Path) -> list[str]:
    """One name per line; there must be some."""
    names = path.read_text().split() if path.is_file() else []
    if not names:
        raise DataError(f"{path}: expected the names of what belongs to the split, one per line")
    return names


class WithMasks(ImageDataset):
    """Loads (image, mask), both of one size, for MaskTransform: so workers decode both."""

    def __init__(self, dataset: MaskedImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def describe(self, index: int) -> str:
        return self.dataset.describe(index)

    def load(self, index: int) -> "tuple[Picture, Image.Image]":  # type: ignore[override]
        image, mask = self.dataset.load(index), Image.fromarray(self.dataset.mask(index))
        require_same_size(self.describe(index), image, mask)
        return image, mask


def require_same_size(name: object, image: "Picture", mask: Image.Image) -> None:
    from data.picture import size_of

    if size_of(image) != mask.size:
        found, valid = ("{} x {}".format(*size) for size in (mask.size, size_of(image)))
        raise DataError(f"the mask of {name} has {found} pixels: expected {valid}, as the image")


@dataclass(frozen=True)
class Video:
    name: str
    frames: list[Path]
    annotations: list[Path]  # one per frame

    def frame(self, index: int, max_value: float | None = None) -> Image.Image:
        from data.picture import decode_with_pillow

        path = self.frames[index]
        with readable(path):
            return decode_with_pillow(path.read_bytes(), max_value, str(path))

    def objects(self) -> np.ndarray:
        """uint8 [T, H, W], of all frames: 0 is background, then numbers of objects."""
        annotations = []
        for frame, path in zip(self.frames, self.annotations, strict=True):
            annotations.append(read_mask(path))
            with opened(frame) as image:
                require_same_size(frame, image, Image.fromarray(annotations[-1]))
        if len({annotation.shape for annotation in annotations}) > 1:
            raise DataError(f"video {self.name} has frames of several sizes: expected one")
        if not set(np.unique(annotations[0]).tolist()) - {0, IGNORE}:
            raise DataError(f"{self.annotations[0]} marks no object: there is nothing to follow")
        return np.stack(annotations)

    def palette(self) -> list[int] | None:
        """Red, green, blue of each number, as in the first annotation; a grey one has none."""
        with opened(self.annotations[0]) as image:
            return image.getpalette()


def read_videos(data_path: str | None, split: str) -> list[Video]:
    """The sequences that ImageSets/2017/SPLIT.txt names, in its order."""
    root = existing_folder("DAVIS-2017", data_path, DAVIS_LAYOUT)
    names = read_names(root / "ImageSets" / "2017" / f"{split}.txt")
    return [read_video(root, name) for name in names]


def read_video(root: Path, name: str) -> Video:
    folder, annotated = (root / part / "480p" / name for part in ("JPEGImages", "Annotations"))
    frames = [folder / image for image in list_folder(folder)[1]]
    if len(frames) < FEWEST_FRAMES:
        raise DataError(f"{folder} holds {len(frames)} frames: expected {FEWEST_FRAMES} or more")
    annotations = [annotated / f"{frame.stem}.png" for frame in frames]
    require_files("annotations", annotations)
    return Video(name, frames, annotations)
