"""Every mode of every format that is read, against a second library; what is not read is refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter

import cv2
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from vdtrain.data import decode as decoding
from vdtrain.data.decode import DecodeError, decode, decode_whole, image_format, image_size, stored_orientation

ROWS, COLUMNS = np.mgrid[0:48, 0:64]
COLOURS = np.stack([ROWS * 5, COLUMNS * 4, (ROWS + COLUMNS) * 2], -1).astype(np.uint8)
WHITE = 255
# Of each pass of an interlaced PNG: its first row and column, and its steps.
ADAM7 = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)


def saved(image: Image.Image, kind: str, **arguments: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **arguments)
    return file.getvalue()


def heic(image: Image.Image, **arguments: object) -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **arguments)
    return file.getvalue()


def png(depth: int, colour: int, rows: list[bytes], *chunks: tuple[bytes, bytes], interlaced: bool = False) -> bytes:
    """A PNG file of COLOURS' size in any mode, of rows of packed samples."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 64, 48, depth, colour, 0, 0, interlaced)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def second_opinion(data: bytes) -> np.ndarray:
    """OpenCV's image, over white where it has alpha, uint8 RGB."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    if image.dtype == np.uint16:
        image = image / 257.0
    image = image.astype(float)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, -1)
    alpha = image[..., 3:] / 255 if image.shape[-1] == 4 else 1.0
    return (image[..., 2::-1] * alpha + WHITE * (1 - alpha)).round()


GREY16 = (ROWS * 1000 + COLUMNS * 100).astype(">u2")
DEEP = np.stack([ROWS * 1300, COLUMNS * 1000, (ROWS + COLUMNS) * 500, COLUMNS * 1023], -1).astype(">u2")
ALPHA = (COLUMNS * 4).astype(np.uint8)
PALETTE = bytes(range(48)) * 16
TRANSPARENT = bytes([0, 128, *[255] * 10])
MODES = {
    "1 bit": png(1, 0, [np.packbits(row % 2).tobytes() for row in ROWS + COLUMNS]),
    "2 bits": png(2, 0, [bytes(16 * [0b00011011])] * 48),
    "4 bits": png(4, 0, [bytes(range(32))] * 48),
    "grey": saved(Image.fromarray(COLOURS[..., 0]), "PNG"),
    "grey of 16 bits": png(16, 0, [row.tobytes() for row in GREY16]),
    "grey and alpha": saved(Image.merge("LA", [Image.fromarray(COLOURS[..., 0]), Image.fromarray(ALPHA)]), "PNG"),
    "grey and alpha of 16 bits": png(16, 4, [row.tobytes() for row in DEEP[..., [0, 3]]]),
    "colour": saved(Image.fromarray(COLOURS), "PNG"),
    "colour of 16 bits": png(16, 2, [row.tobytes() for row in DEEP[..., :3]]),
    "colour and alpha": saved(Image.fromarray(np.dstack([COLOURS, ALPHA])), "PNG"),
    "colour and alpha of 16 bits": png(16, 6, [row.tobytes() for row in DEEP]),
    "palette": saved(Image.fromarray(COLOURS).quantize(200), "PNG"),
    "palette of 4 bits": png(4, 3, [bytes(range(32))] * 48, (b"PLTE", PALETTE[:48])),
    "palette with alpha": png(8, 3, [bytes(range(64))] * 48, (b"PLTE", PALETTE), (b"tRNS", TRANSPARENT)),
    "colour with a transparent one": png(
        8, 2, [row.tobytes() for row in COLOURS], (b"tRNS", bytes([0, 0, 0, 40, 0, 20]))
    ),
    "WEBP": saved(Image.fromarray(COLOURS), "WEBP", quality=90),
    "WEBP and alpha": saved(Image.fromarray(np.dstack([COLOURS, ALPHA])), "WEBP", lossless=True),
    "AVIF": saved(Image.fromarray(COLOURS), "AVIF", quality=95),
    "AVIF and alpha": saved(Image.fromarray(np.dstack([COLOURS, ALPHA])), "AVIF", quality=100),
    "JPEG": saved(Image.fromarray(COLOURS), "JPEG"),
    "grey JPEG": saved(Image.fromarray(COLOURS[..., 0]), "JPEG"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_second_library_sees_the_same(mode: str) -> None:
    data = MODES[mode]
    found = decode_whole(data)
    assert (found.shape, found.dtype) == (COLOURS.shape, np.uint8)
    limit = 2 if "AVIF" in mode or "WEBP" in mode else 1
    assert np.abs(found - second_opinion(data)).max() <= limit
    assert image_size(data) == (64, 48)
    # The stream's crop is the same image.
    assert np.array_equal(decode(data, 48, (0.0, 0.0)), found[:, :48])


@pytest.mark.parametrize(
    ("data", "transparent"),
    [
        (png(16, 0, [row.tobytes() for row in GREY16], (b"tRNS", struct.pack(">H", 2100))), GREY16 == 2100),
        (png(1, 0, [bytes(8 * [0x0F])] * 48, (b"tRNS", b"\0\0")), COLUMNS % 8 < 4),
        (png(8, 0, [row.tobytes() for row in COLOURS[..., 0]], (b"tRNS", b"\0\x0f")), ROWS == 3),
        (
            png(16, 2, [row.tobytes() for row in DEEP[..., :3]], (b"tRNS", struct.pack(">HHH", 2600, 3000, 2500))),
            (ROWS == 2) & (COLUMNS == 3),
        ),
    ],
)
def test_a_transparent_value_becomes_white_and_others_stay(data: bytes, transparent: np.ndarray) -> None:
    assert transparent.any()
    found = decode_whole(data)
    assert (found[transparent] == WHITE).all()
    start = data.index(b"tRNS") - 4
    length = 12 + int.from_bytes(data[start : start + 4], "big")
    opaque = decode_whole(data[:start] + data[start + length :])
    assert np.array_equal(found[~transparent], opaque[~transparent])


def test_sixteen_bits_keep_what_differs_only_above_the_lowest_byte() -> None:
    found = decode_whole(MODES["grey of 16 bits"])
    assert len(np.unique(found)) > 150
    assert np.abs(found[..., 0] - GREY16 / 257).max() <= 1


def test_interlaced_animated_and_profiled_files_give_their_first_image() -> None:
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    passes = [COLOURS[top::down, left::across] for top, left, down, across in ADAM7]
    for data in (
        png(8, 2, [row.tobytes() for part in passes for row in part], interlaced=True),
        saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        saved(frames[0], "PNG", icc_profile=b"\0" * 200),
    ):
        assert np.array_equal(decode_whole(data), COLOURS)


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["HEIC", "AVIF"])
def test_the_turn_of_a_container_is_made_once(kind: str, orientation: int) -> None:
    stored = COLOURS.copy()
    stored[:12, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(stored)
    data = (
        heic(image, exif=exif.tobytes(), quality=95)
        if kind == "HEIC"
        else saved(image, "AVIF", exif=exif.tobytes(), quality=95)
    )
    expected = decoding.upright(stored, orientation).astype(int)
    found = decode_whole(data)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 4
    width, height = image_size(data)
    # libheif has turned it already, Pillow has not: the index lists the tag that is left to be followed.
    left = stored_orientation(data) or 1
    assert ((height, width) if left >= 5 else (width, height)) == expected.shape[1::-1]
    # Without a tag the container is upright, whatever other files tell of it.
    assert stored_orientation(heic(image) if kind == "HEIC" else saved(image, "AVIF")) == 1


def test_a_huge_heic_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(Image.fromarray(COLOURS))
    damaged = data[:-100] + bytes(100)
    with pytest.raises(DecodeError, match="Decoder plugin"):
        decode(damaged, 32, (0.5, 0.5))
    monkeypatch.setattr(decoding, "MAX_PIXELS", COLOURS[..., 0].size - 1)
    for content in (data, damaged):
        with pytest.raises(DecodeError, match="too many pixels"):
            decode(content, 32, (0.5, 0.5))


def test_heic_with_alpha_lies_over_white() -> None:
    found = decode_whole(heic(Image.fromarray(np.dstack([COLOURS, ALPHA])), quality=100))
    expected = second_opinion(MODES["colour and alpha"])
    assert np.abs(found - expected).mean() < 3


def test_without_its_package_heic_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(Image.fromarray(COLOURS))
    monkeypatch.setattr(decoding, "missing", lambda package: f"{package} is not installed; run `pip install ...`")
    for function in (image_size, decode_whole, lambda data: decode(data, 32, (0.5, 0.5))):
        with pytest.raises(DecodeError, match=r"HEIC is not read: pillow_heif is not installed; run `pip") as caught:
            function(data)
        assert caught.value.reason == "HEIC is not read"


@pytest.mark.parametrize(
    "data", [*(MODES[name] for name in ("colour", "grey of 16 bits", "WEBP", "AVIF")), heic(Image.fromarray(COLOURS))]
)
def test_other_formats_cut_anywhere_are_refused(data: bytes) -> None:
    whole = decode_whole(data)
    reasons: Counter[str] = Counter()
    for length in [*range(0, len(data), 13), *range(len(data) - 30, len(data))]:
        try:
            assert np.array_equal(decode_whole(data[:length]), whole)
        except DecodeError as error:
            reasons[error.reason] += 1
    assert set(reasons) <= {"cannot decode", "truncated"}
    assert sum(reasons.values()) > len(data) // 13 - 2


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("GIF", saved(Image.fromarray(COLOURS), "GIF")),
        ("BMP", saved(Image.fromarray(COLOURS), "BMP")),
        ("TIFF", saved(Image.fromarray(COLOURS), "TIFF")),
        ("TIFF", b"MM\0*" + bytes(40)),
        ("TIFF", b"II+\0" + bytes(40)),
        ("ICO", saved(Image.fromarray(COLOURS), "ICO")),
        ("JPEG 2000", saved(Image.fromarray(COLOURS), "JPEG2000")),
        ("JPEG XL", b"\xff\x0a" + bytes(40)),
        ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)),
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("SVG", b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg/>'),
        ("PDF", b"%PDF-1.7"),
        ("Photoshop", b"8BPS" + bytes(40)),
        ("video", b"\0\0\0\x18ftypmp42" + bytes(40)),
        ("video", b"\x1a\x45\xdf\xa3" + bytes(40)),
    ],
)
def test_what_is_not_read_is_refused_by_name(name: str, data: bytes) -> None:
    for function in (image_size, decode_whole, lambda data: decode(data, 32, (0.5, 0.5)), image_format):
        with pytest.raises(DecodeError, match=f"^{name} is not read$") as caught:
            function(data)
        assert caught.value.reason == f"{name} is not read"


@pytest.mark.parametrize(
    ("brands", "name"),
    [
        (b"avif....mif1", "AVIF"),
        (b"avis....avif", "AVIF"),
        (b"mif1....mif1avifmiaf", "AVIF"),
        (b"heic....mif1heic", "HEIF"),
        (b"mif1....mif1heic", "HEIF"),
        (b"msf1....hevc", "HEIF"),
    ],
)
def test_the_brands_of_a_container_tell_its_format(brands: bytes, name: str) -> None:
    assert image_format(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + b"\0\0\0\0meta") == name
