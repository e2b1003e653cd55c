"""The fast decoder against Pillow: the same pictures, crops and errors."""

import io
import mmap
import struct
import sys
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from bench.loader import natural_noise
from data import picture
from data.base import UNREADABLE, DataError
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


# ---- More than 8 bits. ---------------------------------------------------------------------------


def sixteen_bits(colours: int, most: int = 65535) -> np.ndarray:
    """uint16 [20, 30] or [20, 30, colours], from 0 to `most`."""
    shape = (20, 30) if colours == 1 else (20, 30, colours)
    values = np.random.default_rng(0).integers(0, most + 1, shape, dtype=np.uint16)
    values.flat[:3] = most
    return values


def as_png(values: np.ndarray) -> bytearray:
    """Pillow writes no colours of 16 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    height, width, *colours = values.shape
    kind = {(): 0, (3,): 2, (2,): 4, (4,): 6}[tuple(colours)]
    header = struct.pack(">2I5B", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return bytearray(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))


def as_tiff(values: np.ndarray, order: str, compressed: bool, planes: int = 1) -> bytearray:
    """Of three colours, which Pillow does not write. order: < or >, as struct has it."""
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compressed else data
    height, width, colours = values.shape
    tags = [  # number, type (3: short, 4: long), value or values
        *((256, 3, (width,)), (257, 3, (height,)), (258, 3, (16,) * colours)),
        *((259, 3, (8 if compressed else 1,)), (262, 3, (2,)), (273, 4, (8,))),
        *((277, 3, (colours,)), (278, 3, (height,)), (279, 4, (len(data),)), (284, 3, (planes,))),
    ]
    data += b"\0" * (len(data) % 2)
    longer, entries = 8 + len(data), b""  # the three depths do not fit into their entry
    for number, kind, found in tags:
        packed = struct.pack(f"{order}{len(found)}{'H' if kind == 3 else 'I'}", *found)
        if len(packed) > 4:
            data, packed = data + packed, struct.pack(f"{order}I", longer)
        entries += struct.pack(f"{order}HHI", number, kind, len(found)) + packed.ljust(4, b"\0")
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return bytearray(start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


DEEP = {
    "grey png": (1, lambda values: stored(Image.fromarray(values), "PNG")),
    "grey tiff": (1, lambda values: stored(Image.fromarray(values), "TIFF")),
    "grey lzw": (1, lambda values: stored(Image.fromarray(values), "TIFF", compression="tiff_lzw")),
    "rgb png": (3, as_png),
    "rgba png": (4, as_png),
    **{
        f"rgb tiff {order} {compressed}": (3, partial(as_tiff, order=order, compressed=compressed))
        for order in "<>"
        for compressed in (False, True)
    },
}


def three(values: np.ndarray) -> np.ndarray:
    """Red, green, blue."""
    return np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 else values[..., :3]


@pytest.fixture
def is_dark(monkeypatch, caplog):
    """Whether a picture that was just decoded was warned of, as if it were the first."""
    monkeypatch.setattr(picture, "DARK_IS_SAID", mmap.mmap(-1, 1))

    def is_dark(found: Image.Image) -> bool:
        warned = [record.getMessage() for record in caplog.records]
        caplog.clear()
        monkeypatch.setattr(picture, "DARK_IS_SAID", mmap.mmap(-1, 1))
        return any("largest value is below an eighth" in message for message in warned)

    return is_dark


@pytest.mark.parametrize("kind", DEEP)
def test_sixteen_bits_are_read_over_their_full_range_or_up_to_max_value(kind, is_dark):
    colours, store = DEEP[kind]
    values = sixteen_bits(colours)
    found = decode(store(values), "fast")
    assert found.mode == "RGB" and not is_dark(found)
    assert np.array_equal(np.asarray(found), three(values) >> 8)
    values = sixteen_bits(colours, 4095)
    if colours == 4:
        values[..., 3] = 65535  # transparency is none of the values
    found = decode(store(values), "fast")
    assert is_dark(found) and np.array_equal(np.asarray(found), three(values) >> 8)
    found = decode(store(values), "fast", max_value=4095)
    expected = np.floor(three(values) / 4095 * 255 + 0.5)
    assert not is_dark(found) and np.array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("most, expected", [(8191, True), (8192, False)])
@pytest.mark.parametrize("kind", ["grey png", "grey tiff", "rgb png", "rgb tiff < False"])
def test_below_an_eighth_of_the_range_a_picture_is_dark(kind, most, expected, is_dark):
    colours, store = DEEP[kind]
    assert is_dark(decode(store(sixteen_bits(colours, most)), "pil")) == expected


NUMBERS = {
    "float32": (lambda values: (values / 4095).astype(np.float32), 1.0),
    "int32": (lambda values: values.astype(np.int32), 4095),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_without_a_range_are_refused_by_name_unless_there_is_one(kind):
    convert, max_value = NUMBERS[kind]
    values = sixteen_bits(1, 4095)
    contents = stored(Image.fromarray(convert(values)), "TIFF")
    message = r"^dataset.options.max_value=null: expected the value that is white in a.tif, whose"
    with pytest.raises(DataError, match=message):
        decode(contents, "fast", name="a.tif")
    found = np.asarray(decode(contents, "fast", max_value, "a.tif"))
    assert np.abs(found - three(values) / 4095 * 255).max() <= 0.5001


def test_what_is_outside_the_range_is_black_or_white():
    values = np.array([[-1, np.nan, 0, 2, 3, np.inf]], dtype=np.float32)
    found = decode(stored(Image.fromarray(values), "TIFF"), "fast", max_value=2)
    assert np.asarray(found)[0, :, 0].tolist() == [0, 0, 0, 255, 255, 255]


def test_what_pillow_would_get_wrong_is_refused():
    planes = as_tiff(sixteen_bits(3), "<", compressed=False, planes=2)
    with pytest.raises(DataError, match=r"^a.tif holds planes of 16 bits: expected"):
        decode(planes, "fast", name="a.tif")
    with pytest.raises(UNREADABLE, match="^unknown raw mode"):  # grey with transparency
        decode(as_png(sixteen_bits(2)), "fast", 4095, "a.png")


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_max_value_changes_nothing_of_eight_bits(kind):
    contents = (KINDS | OTHERS)[kind]()
    ours, expected = (decode(contents, "pil", max_value) for max_value in (100, None))
    assert ours.tobytes() == expected.tobytes()


def test_twelve_bits_in_twelve_are_read_over_their_full_range():
    """TIFF has them packed, two values in three bytes."""
    values = sixteen_bits(1, 4095)
    pairs = values.reshape(-1, 2).astype(int)
    packed = [pairs[:, 0] >> 4, (pairs[:, 0] % 16 << 4) + (pairs[:, 1] >> 8), pairs[:, 1] % 256]
    data = np.stack(packed, axis=1).astype(np.uint8).tobytes()
    places = {256: 30, 257: 20, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 20, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in places.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    contents = bytearray(start + data + struct.pack("<H", len(places)) + entries + bytes(4))
    assert np.array_equal(np.asarray(decode(contents, "fast")), three(values) >> 4)
