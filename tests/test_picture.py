"""The fast decoder against Pillow: the same pictures, crops and errors."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bench.loader import natural_noise
from data import picture
from data.base import UNREADABLE
from data.picture import decode, find_decoder, size_of, to_image
from data.transforms import EvalTransform, TrainTransform


def photo(width: int = 200, height: int = 150) -> Image.Image:
    return Image.fromarray(natural_noise(width, height, np.random.default_rng(0)))


def stored(image: Image.Image, kind: str = "JPEG", **options) -> bytearray:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return bytearray(file.getvalue())


def assert_alike(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Nowhere more than a few of 255 levels apart, and hardly at all on average."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype == torch.uint8
    difference = (ours.int() - expected.int()).abs().float()
    assert difference.max() <= 10 and difference.mean() < 0.5


KINDS = {
    "colour": lambda: stored(photo(), quality=92),
    "full chroma": lambda: stored(photo(), quality=95, subsampling=0),
    "progressive": lambda: stored(photo(), quality=90, progressive=True),
    "grey": lambda: stored(photo().convert("L")),
    "restart markers": lambda: stored(photo(), restart_marker_blocks=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_jpeg_decoded_by_torch_is_pillows_picture(kind):
    contents = KINDS[kind]()
    fast, slow = decode(contents, "fast"), decode(contents, "pil")
    assert isinstance(fast, torch.Tensor) and size_of(fast) == size_of(slow) == (200, 150)
    assert np.array_equal(np.asarray(to_image(fast)), np.asarray(slow))


OTHERS = {
    "cmyk": lambda: stored(photo().convert("CMYK")),
    "png": lambda: stored(photo(), "PNG"),
    "palette": lambda: stored(photo().convert("P"), "GIF"),
    "webp": lambda: stored(photo(), "WEBP"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_go_through_pillow(kind):
    contents = OTHERS[kind]()
    fast, slow = decode(contents, "fast"), decode(contents, "pil")
    assert isinstance(fast, Image.Image)
    assert fast.tobytes() == slow.tobytes()


@pytest.mark.parametrize("side, min_crop", [(64, 0.2), (280, 0.2), (64, 0.9)])
def test_training_crops_are_pillows(side, min_crop):
    """Smaller and larger than the picture, mirrored and not."""
    transform = TrainTransform(side, min_crop, flip=True, seed=0)
    contents = KINDS["colour"]()
    for index in range(12):
        fast, slow = (transform(decode(contents, name), 3, index) for name in ("fast", "pil"))
        assert_alike(fast, slow)


@pytest.mark.parametrize("size", [(200, 150), (150, 201), (40, 30)])
def test_evaluation_crops_are_pillows(size):
    contents = stored(photo(*size), quality=95)
    fast, slow = (EvalTransform(64)(decode(contents, name)) for name in ("fast", "pil"))
    assert_alike(fast, slow)


DAMAGES = {
    "cut off": lambda contents: contents[: len(contents) // 2],
    "only a start": lambda contents: contents[:20],
    "text": lambda contents: bytearray(b"\xff\xd8\xff<html>404</html>"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_pillow_cannot_read_is_unreadable_here_too(damage):
    contents = DAMAGES[damage](KINDS["colour"]())
    for name in ("fast", "pil"):
        with pytest.raises(UNREADABLE):
            decode(contents, name)


CODECS = ("torchcodec.decoders", "torchvision.io")


def hide(monkeypatch, *modules: str) -> None:
    """As if they were not installed."""
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(picture, "decode_jpeg", find_decoder())


def outcome(contents: bytearray) -> torch.Tensor | type:
    try:
        found = decode(contents, "fast")
        return found if isinstance(found, torch.Tensor) else torch.from_numpy(np.array(found))
    except UNREADABLE as error:
        return type(error)


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS, *DAMAGES])
def test_torchcodec_and_torchvision_decode_the_same_bits(kind, monkeypatch):
    make = (KINDS | OTHERS).get(kind, lambda: DAMAGES[kind](KINDS["colour"]()))
    contents = make()
    assert "torchcodec" in find_decoder().func.__module__
    ours = outcome(contents)
    hide(monkeypatch, CODECS[0])
    assert "torchvision" in picture.decode_jpeg.__module__
    expected = outcome(contents)
    assert ours is expected or torch.equal(ours, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_no_decoder_turns_pictures(orientation, monkeypatch):
    """And none minds 0xFF 0xE1 elsewhere: here in a quantisation table."""
    exif, buffer, tables = Image.Exif(), io.BytesIO(), {0: [255, 225, *[16] * 62]}
    exif[0x0112] = orientation
    photo().save(buffer, "JPEG", exif=exif, comment=b"c", qtables=tables)
    contents = buffer.getvalue()
    assert b"\xff\xe1" in contents[contents.index(b"\xff\xdb") + 4 :]
    found = outcome(bytearray(contents))
    hide(monkeypatch, CODECS[0])
    assert torch.equal(found, outcome(bytearray(contents))) and found.shape == (3, 150, 200)


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_pillow_decodes_where_neither_is_installed(kind, monkeypatch):
    contents = (KINDS | OTHERS)[kind]()
    hide(monkeypatch, *CODECS)
    assert picture.decode_jpeg is None
    fast, slow = decode(contents, "fast"), decode(contents, "pil")
    assert isinstance(fast, Image.Image) and fast.tobytes() == slow.tobytes()
