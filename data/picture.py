"""A picture between its file and its crop: a Pillow image, or uint8 [3, H, W] where torch decodes.

decoder=fast: torchcodec decodes JPEG files (torchvision, where that is not installed: the same
bits) and torch resizes their crops, about twice as fast as Pillow (bench/loader.py says how much).
Pixels differ from Pillow's by a few of 255 levels. What is no plain JPEG (PNG, CMYK, ...) goes
through Pillow all the same. decoder=pil: all of it.
"""

import io
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Picture = Image.Image | Tensor
Box = tuple[int, int, int, int]  # left, top, right, bottom: right and bottom are outside
JPEG = b"\xff\xd8\xff"


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


def decode(contents: bytearray, decoder: str) -> Picture:
    """The contents of an image file. Raises one of UNREADABLE (data/base.py)."""
    if decoder == "fast" and decode_jpeg is not None and contents[:3] == JPEG:
        hide_rotation(contents)
        stored = torch.frombuffer(contents, dtype=torch.uint8)
        with suppress(RuntimeError):  # Pillow knows more kinds, and names what is damaged
            picture = decode_jpeg(stored)
            if len(picture) in (1, 3):  # grey or RGB
                return picture.expand(3, -1, -1)
    with Image.open(io.BytesIO(contents)) as image:
        return to_rgb(image)


def hide_rotation(contents: bytearray) -> None:
    """torchcodec turns pictures as EXIF says. In place: its part of the header becomes an unknown
    one."""
    place = 2
    while b"\xff\xe0" <= contents[place : place + 2] <= b"\xff\xfe":  # before tables and pixels
        if contents[place + 1] == 0xE1:
            contents[place + 1] = 0xEF
        place += 2 + int.from_bytes(contents[place + 2 : place + 4])


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB. Transparency is dropped, not blended with a colour of our choice."""
    if image.mode.startswith("I"):
        # 16-bit grey. Depending on its version, Pillow clips such values to white: scale them here.
        values = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
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
