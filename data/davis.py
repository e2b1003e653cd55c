"""Videos with annotated objects in the folder layout of DAVIS-2017."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.base import DataError, readable
from data.files import existing_folder, list_folder, require_files
from data.masks import opened, read_mask, read_names, require_same_size

LAYOUT = "a folder with JPEGImages/480p/, Annotations/480p/ and ImageSets/2017/"
VOID = 255  # belongs neither to an object nor to the background
FEWEST_FRAMES = 3  # the first is given, and the last is not scored


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
        sizes = {annotation.shape[::-1] for annotation in annotations}
        if len(sizes) > 1:
            shown = " and ".join(f"{width} x {height}" for width, height in sorted(sizes))
            raise DataError(f"video {self.name} has frames of {shown} pixels: expected one size")
        if not set(np.unique(annotations[0]).tolist()) - {0, VOID}:
            raise DataError(f"{self.annotations[0]} marks no object: there is nothing to follow")
        return np.stack(annotations)

    def palette(self) -> list[int] | None:
        """Red, green, blue of each number, as in the first annotation; a grey one has none."""
        with opened(self.annotations[0]) as image:
            return image.getpalette()


def read_videos(data_path: str | None, split: str) -> list[Video]:
    """The sequences that ImageSets/2017/SPLIT.txt names, in its order."""
    root = existing_folder("DAVIS-2017", data_path, LAYOUT)
    names = read_names(root / "ImageSets" / "2017" / f"{split}.txt")
    return [read_video(root, name) for name in names]


def read_video(root: Path, name: str) -> Video:
    folder, annotated = (root / part / "480p" / name for part in ("JPEGImages", "Annotations"))
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; data_path needs {LAYOUT}")
    frames = [folder / image for image in list_folder(folder)[1]]
    if len(frames) < FEWEST_FRAMES:
        raise DataError(f"{folder} holds {len(frames)} frames: expected {FEWEST_FRAMES} or more")
    annotations = [annotated / f"{frame.stem}.png" for frame in frames]
    require_files("annotations", annotations)
    return Video(name, frames, annotations)
