"""A picture between its file and its crop: a Pillow image, or uint8 [3, H, W] where torch decodes.

decoder=fast: torchcodec decodes JPEG files (torchvision, where that is not installed: the same
bits) and torch resizes their crops, about twice as fast as Pillow (bench/loader.py says how much).
Pixels differ from Pillow's by a few of 255 levels. What is no plain JPEG (PNG, CMYK, ...) goes
through Pillow all the same. decoder=pil: all of it.

Values of more than 8 bits are brought to 8: those of 16 bits over their full range, or over what
max_value says. Other numbers have no range of their own, and without max_value are refused.
"""

import io
import logging
import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from data.base import UnusableImages

logger = logging.getLogger("lmim.data")

Picture = Image.Image | Tensor
Box = tuple[int, int, int, int]  # left, top, right, bottom: right and bottom are outside
JPEG = b"\xff\xd8\xff"
MAX_VALUE = "dataset.options.max_value"
BITS, PLANES = 258, 284  # tags of TIFF
OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
DARK_IS_SAID = mmap.mmap(-1, 1)  # shared with the processes of loaders, which are forked


def find_decoder() -> Callable | None:
    """Of JPEG files, grey or RGB as they are stored. None: Pillow has to do it."""
    unusable = (ImportError, OSError, RuntimeError)  # not there, too old, not for this torch
    with suppress(*unusable):
        from torchcodec.decoders import decode_jpeg

        return partial(decode_jpeg, mode="UNCHANGED")
    with suppress(*unusable):
        from torchvision.io import decode_jpeg as older

        return older
    return None


decode_jpeg = find_decoder()


def decode(
    contents: bytearray, decoder: str, max_value: float | None = None, name: str = "the image"
) -> Picture:
    """The contents of an image file. Raises one of UNREADABLE (data/base.py), and UnusableImages
    where it could be read, but not without max_value. name: for that."""
    if decoder == "fast" and decode_jpeg is not None and contents[:3] == JPEG:
        hide_rotation(contents)
        stored = torch.frombuffer(contents, dtype=torch.uint8)
        with suppress(RuntimeError):  # Pillow knows more kinds, and names what is damaged
            picture = decode_jpeg(stored)
            if len(picture) in (1, 3):  # grey or RGB
                return picture.expand(3, -1, -1)
    return decode_with_pillow(contents, max_value, name)


def decode_with_pillow(
    contents: bytes | bytearray, max_value: float | None, name: str
) -> Image.Image:
    """-> RGB"""
    with Image.open(io.BytesIO(contents)) as image:
        if bits_of(image) > 8:
            return to_eight_bits(image, contents, max_value, name)
        return to_rgb(image)


def bits_of(image: Image.Image) -> int:
    """Of one value in the file; 8 may mean fewer."""
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(BITS, (1,)))
    raw_modes = [str(tile[3]) for tile in image.tile]  # type: ignore[attr-defined]
    return 16 if image.mode[0] in "IF" or ";16" in "".join(raw_modes) else 8


def to_eight_bits(
    image: Image.Image, contents: bytes | bytearray, max_value: float | None, name: str
) -> Image.Image:
    """-> RGB"""
    is_grey, tags = image.mode[0] in "IF", getattr(image, "tag_v2", {})
    # Depending on its version, Pillow opens 16-bit PNG as I.
    has_range = not is_grey or image.mode.startswith("I;") or image.format in ("PNG", "PPM")
    if max_value is None and not has_range:
        valid = f"the value that is white in {name}, whose numbers have no range of their own"
        raise UnusableImages(f"{MAX_VALUE}=null: expected {valid}")
    if not is_grey and tags.get(PLANES) == 2:  # Pillow would get them wrong
        raise UnusableImages(f"{name} holds planes of 16 bits: expected whole pixels")
    image.load()
    values = np.asarray(image)
    if max_value is None:  # of colours Pillow has kept the high byte
        values = values >> (bits_of(image) - 8 if is_grey else 0)
    else:
        if not is_grey:
            values = values * 256.0 + low_bytes(contents)
        values = np.nan_to_num(values.astype(np.float64)).clip(0, max_value)
        values = values * (255 / max_value) + 0.5
    levels = values.clip(0, 255).astype(np.uint8).tobytes()
    picture = to_rgb(Image.frombytes("L" if is_grey else image.mode, image.size, levels))
    if max_value is None and np.asarray(picture).max() < 256 / 8:
        warn_of_dark(name)
    return picture


def low_bytes(contents: bytes | bytearray) -> np.ndarray:
    """Of each colour of 16 bits Pillow keeps the high byte. In the other byte order, that is the
    low one."""
    with Image.open(io.BytesIO(contents)) as image:
        image.tile = [tile._replace(args=other_byte(tile.args)) for tile in image.tile]
        image.load()
        return np.asarray(image)


def other_byte(how):
    """Pillow's names are such as RGB;16L."""
    if isinstance(how, str):
        return how[:-1] + OTHER_BYTE[how[-1]]
    return other_byte(how[0]), *how[1:]


def warn_of_dark(name: str) -> None:
    """Once in a run, by its first process or one of that one's loaders."""
    if not DARK_IS_SAID[0] and os.environ.get("RANK", "0") == "0":
        DARK_IS_SAID[0] = 1
        remedy = f"{MAX_VALUE}=4095 reads 12 bits over their full range (this is said once)"
        problem = "its largest value is below an eighth of what its bits hold"
        logger.warning("%s is nearly black: %s; %s", name, problem, remedy)


def hide_rotation(contents: bytearray) -> None:
    """torchcodec turns pictures as EXIF says. In place: its part of the header becomes an unknown
    one."""
    place = 2
    while b"\xff\xe0" <= contents[place : place + 2] <= b"\xff\xfe":  # before tables and pixels
        if contents[place + 1] == 0xE1:
            contents[place + 1] = 0xEF
        place += 2 + int.from_bytes(contents[place + 2 : place + 4])


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode of 8 bits to RGB.

    Transparency is dropped, not blended with a colour of our choice."""
    if image.mode == "P":
        # Pillow warns about palettes with transparency unless they pass through RGBA.
        image = image.convert("RGBA")
    return image.convert("RGB")


def size_of(picture: Picture) -> tuple[int, int]:
    """(width, height)"""
    return (picture.shape[2], picture.shape[1]) if isinstance(picture, Tensor) else picture.size


def crop_and_resize(picture: Picture, box: Box, width: int, height: int) -> Tensor:
    """Bicubic and antialiased, from the pixels inside the box alone: resizing the whole and
    cutting afterwards would blend in pixels from outside. -> uint8 [3, height, width]"""
    if isinstance(picture, Tensor):
        left, top, right, bottom = box
        # Channels last, as the decoder leaves pictures, is the fastest.
        crop = picture[None, :, top:bottom, left:right]
        crop = crop.contiguous(memory_format=torch.channels_last)
        return F.interpolate(crop, (height, width), mode="bicubic", antialias=True)[0]
    return to_tensor(picture.crop(box).resize((width, height), Image.Resampling.BICUBIC))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_image(picture: Picture) -> Image.Image:
    """For augmentations that are made of Pillow's operations."""
    if isinstance(picture, Tensor):
        return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return picture
