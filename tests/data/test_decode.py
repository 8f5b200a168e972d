import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from vdtrain.data.decode import SCRATCH_BYTES, DecodeError, decode, decode_into, image_size

CENTRE = (0.5, 0.5)


def encoded(width: int, height: int, kind: str = "JPEG") -> tuple[bytes, Image.Image]:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 64], axis=-1).astype(np.uint8)
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue(), image


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 200), (1024, 512), (37, 51)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_close_to_a_full_decode_and_a_careful_resize(width: int, height: int, kind: str) -> None:
    data, image = encoded(width, height, kind)
    found = decode(data, 32, CENTRE)
    scale = 32 / min(width, height)
    resized = image.resize((max(32, round(width * scale)), max(32, round(height * scale))), Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32))).astype(int)
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - expected).mean() < 6


@pytest.mark.parametrize("side", [48, 64, 96, 128, 192, 384])
def test_squares_decoded_into_their_place_are_as_from_elsewhere(side: int) -> None:
    data, _ = encoded(side, side)
    place = np.zeros((48, 48, 3), np.uint8)
    decode_into(place, data, (0.3, 0.7))
    assert np.array_equal(place, simplejpeg.decode_jpeg(data, "RGB", min_height=48, min_width=48))


@pytest.mark.parametrize("side", [*range(20, 130, 3), 385, 400])
def test_squares_of_any_side_fit(side: int) -> None:
    data, image = encoded(side, side)
    resized = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode(data, 48, CENTRE).astype(int) - resized).mean() < 6


def test_images_beyond_the_memory_of_a_thread_are_as_from_elsewhere() -> None:
    data, _ = encoded(1300, 1100)
    assert SCRATCH_BYTES < 3 * 1300 * 1100
    for resolution, side in ((1024, 1100), (512, 550)):
        square = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", min_height=resolution)[:, :side])
        resized = np.asarray(square.resize((resolution, resolution), Image.Resampling.BICUBIC))
        assert np.array_equal(decode(data, resolution, (0.0, 0.0)), resized)


def test_crops_move_with_their_place() -> None:
    data, _ = encoded(128, 32)
    start, end = decode(data, 32, (0.0, 0.0)), decode(data, 32, (0.0, 0.999))
    assert start[..., 1].mean() < 60 < 190 < end[..., 1].mean()


def test_grey_images_become_rgb() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 40), 90, np.uint8)).save(file, "JPEG")
    assert np.abs(decode(file.getvalue(), 32, CENTRE).astype(int) - 90).max() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("width", [96, 64])
def test_images_are_turned_once_as_their_orientation_says(width: int, orientation: int, kind: str) -> None:
    _, image = encoded(width, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(file) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB")).astype(int)
    top, left = (expected.shape[0] - 64) // 4, (expected.shape[1] - 64) // 4
    found = decode(file.getvalue(), 64, (0.25, 0.25), orientation)
    assert np.abs(found.astype(int) - expected[top : top + 64, left : left + 64]).max() <= 2
    # The tag in the bytes is ignored; some programs keep it, others lose it.
    if orientation > 1:
        assert not np.array_equal(decode(file.getvalue(), 64, (0.25, 0.25)), found)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_header_tells_the_size(kind: str) -> None:
    assert image_size(encoded(96, 64, kind)[0][:1000]) == (96, 64)


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(64, 64)[0][:40], encoded(64, 64, "GIF")[0]])
def test_damaged_and_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data, 32, CENTRE)
    with pytest.raises(DecodeError):
        image_size(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_refused_before_decoding() -> None:
    file = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(file, "PNG")
    with pytest.raises(DecodeError, match="11000 x 11000"):
        decode(file.getvalue(), 32, CENTRE)
    with pytest.raises(DecodeError, match="11000 x 11000"):
        image_size(file.getvalue())
