"""JPEG files that libjpeg warns of: whole ones are decoded, incomplete ones are refused wherever they were cut."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from vdtrain.data.decode import DecodeError, decode, decode_into, decode_whole, image_size

EOI = b"\xff\xd9"
KINDS = {
    "baseline": {"quality": 85},
    "full chroma": {"quality": 98, "subsampling": 0, "optimize": True},
    "progressive": {"quality": 85, "progressive": True},
    "restarts": {"quality": 85, "restart_marker_blocks": 1},
    "grey": {"quality": 85},
}


def drawn(height: int = 64, width: int = 80) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    return (np.mgrid[0:height, 0:width][0][..., None] * 2 + noise).astype(np.uint8)


def jpeg(kind: str = "baseline", pixels: np.ndarray | None = None) -> bytes:
    image, file = Image.fromarray(drawn() if pixels is None else pixels), io.BytesIO()
    (image.convert("L") if kind == "grey" else image).save(file, "JPEG", **KINDS[kind])
    return file.getvalue()


def patched(data: bytes, marker: bytes, offset: int, value: bytes) -> bytes:
    """The file with bytes changed at an offset from a marker."""
    place = data.index(marker) + offset
    return data[:place] + value + data[place + len(value) :]


def scan(data: bytes) -> int:
    """Where the coded data of the first scan begin."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def without_header(data: bytes) -> bytes:
    """What follows the first segment."""
    return data[4 + int.from_bytes(data[4:6], "big") :]


def unknown_transform(data: bytes) -> bytes:
    return data[:2] + b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x09" + without_header(data)


HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "Samsung's parameters of a scan": lambda data: patched(
        data, b"\xff\xda", scan(data) - data.index(b"\xff\xda") - 3, bytes(3)
    ),
    "bytes before the end": lambda data: data[:-2] + b"\x12\x34" * 20 + EOI,
    "zeros before the end": lambda data: data[:-2] + bytes(500) + EOI,
    "fill bytes before the end": lambda data: data[:-2] + b"\xff" * 9 + EOI,
    "JFIF 2.01": lambda data: patched(data, b"JFIF", 5, b"\2\1"),
    "JFIF 2.01 and bytes before the end": lambda data: patched(data, b"JFIF", 5, b"\2\1")[:-2] + bytes(99) + EOI,
    "unknown colour transform": unknown_transform,
    "bytes between the segments": lambda data: data.replace(b"\xff\xc4", b"odd\xff\xff\xc4", 1),
    "no end": lambda data: data[:-2],
    "half an end": lambda data: data[:-1],
    "bytes behind the end": lambda data: data + b"a comment",
    "two images": lambda data: data + jpeg(pixels=drawn(32, 32)),
    "an appended film": lambda data: data + b"\0\0\0\x18ftypmp42" + bytes(1000),
}


@pytest.mark.parametrize(
    ("fault", "kind"),
    # A progressive scan needs its parameters.
    [(fault, kind) for fault in HARMLESS for kind in KINDS if (fault[:3], kind) != ("Sam", "progressive")],
)
def test_a_harmless_fault_changes_no_pixel(fault: str, kind: str) -> None:
    data = jpeg(kind)
    odd = HARMLESS[fault](data)
    assert odd != data
    assert image_size(odd) == (80, 64)
    assert np.array_equal(decode_whole(odd), decode_whole(data))
    for resolution in (16, 32, 64):
        assert np.array_equal(decode(odd, resolution, (0.3, 0.7)), decode(data, resolution, (0.3, 0.7)))


def test_a_faulty_square_is_decoded_into_its_place_at_a_smaller_scale() -> None:
    data = jpeg(pixels=drawn(64, 64))
    places = np.zeros((2, 32, 32, 3), np.uint8)
    for place, each in zip(places, (data, patched(data, b"JFIF", 5, b"\2\1")[:-2] + bytes(99) + EOI), strict=True):
        decode_into(place, each, (0.5, 0.5))
    assert np.array_equal(places[0], simplejpeg.decode_jpeg(data, "RGB", min_height=32, min_width=32))
    assert np.array_equal(*places)


def test_another_decoder_agrees_on_corrupt_data_of_full_length() -> None:
    data = jpeg("full chroma")
    agreed = 0
    for place in range(scan(data) + 100, len(data) - 100, 97):
        corrupt = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
        try:
            found = decode_whole(corrupt)
        except DecodeError:
            continue
        with Image.open(io.BytesIO(corrupt)) as file:
            assert np.array_equal(found, np.asarray(file))
        agreed += 1
    assert agreed > 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [b"", EOI, EOI + b"a comment", b"\xff" + EOI, bytes(20_000), bytes(20_000) + EOI])
def test_a_file_cut_anywhere_is_refused(kind: str, tail: bytes) -> None:
    """A file that somebody ended may lack at most its last unit, in the corner, of 16 x 16 pixels."""
    data = jpeg(kind)
    whole = decode_whole(data)
    reasons: Counter[str] = Counter()
    for length in [*range(0, len(data) - 2, 29), *range(len(data) - 130, len(data) - 2, 2)]:
        try:
            found = decode_whole(data[:length] + tail)
        except DecodeError as error:
            reasons[error.reason] += 1
            with pytest.raises(DecodeError):
                decode(data[:length] + tail, 16, (0.5, 0.5))
            continue
        rows, columns = np.nonzero((found != whole).any(-1))
        assert not len(rows) or (tail.strip(b"\0") and min(rows) >= 64 - 17 and min(columns) >= 80 - 17)
    assert set(reasons) <= {"truncated", "cannot decode"}
    assert reasons["truncated"] > 50


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_its_writer_ended_may_lack_the_bits_of_its_last_unit(kind: str) -> None:
    """Chroma of that unit also counts in the pixels beside it."""
    data, unit = jpeg(kind), 8 if kind in ("full chroma", "grey", "progressive") else 16
    whole = decode_whole(data)
    for missing in range(1, 9):
        rows, columns = np.nonzero((decode_whole(data[: -2 - missing] + EOI) != whole).any(-1))
        assert min(rows, default=64) >= 64 - unit - 1
        assert min(columns, default=80) >= 80 - unit - 1


def test_missing_scans_are_noticed_though_libjpeg_is_silent() -> None:
    data = jpeg("progressive")
    starts = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    assert len(starts) > 5
    for place in starts[1:]:
        simplejpeg.decode_jpeg(data[:place] + EOI)
        for tail in (b"", EOI):
            with pytest.raises(DecodeError, match="truncated: scans are missing"):
                decode(data[:place] + tail, 32, (0.5, 0.5))


def test_lost_restart_intervals_are_noticed() -> None:
    data = jpeg("restarts")
    places = [
        place for place in range(scan(data), len(data) - 2) if data[place] == 0xFF and 0xD0 <= data[place + 1] <= 0xD7
    ]
    assert len(places) > 10
    for first, second in ((3, 4), (3, 11), (3, 5), (len(places) - 2, len(places) - 1)):
        with pytest.raises(DecodeError, match="truncated"):
            decode_whole(data[: places[first]] + data[places[second] :])


@pytest.mark.parametrize(
    ("marker", "offset", "value", "reason"),
    [
        (b"\xff\xc0", 4, b"\x0c", "precision 12"),
        (b"\xff\xc0", 1, b"\xc9", "arithmetic coding is not read"),
        (b"\xff\xc0", 1, b"\xca", "arithmetic coding is not read"),
        (b"\xff\xc0", 1, b"\xc3", "cannot decode"),
    ],
)
def test_what_libjpeg_cannot_decode_is_refused(marker: bytes, offset: int, value: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode_whole(patched(jpeg(), marker, offset, value))


@pytest.mark.parametrize("transform", [0, 2])
@pytest.mark.parametrize("fault", ["none", "bytes before the end"])
def test_inverted_inks_become_colours(transform: int, fault: str) -> None:
    rows, columns = np.mgrid[0:64, 0:64]
    inks = np.stack([rows * 4, columns * 4, np.full_like(rows, 100), rows + columns], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(file, "JPEG", quality=95)
    data = patched(file.getvalue(), b"Adobe", 11, bytes([transform]))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    found = decode_whole(HARMLESS[fault](data) if fault != "none" else data)
    assert np.abs(found - expected).max() <= 2
