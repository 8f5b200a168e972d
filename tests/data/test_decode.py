import io

import numpy as np
import pytest
from PIL import Image

from vdtrain.data.decode import DecodeError, decode

CENTRE = (0.5, 0.5)


def encoded(width: int, height: int, kind: str = "JPEG") -> tuple[bytes, Image.Image]:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 64], axis=-1).astype(np.uint8)
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue(), picture


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 200), (1024, 512), (37, 51)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_close_to_a_full_decode_and_a_careful_resize(width: int, height: int, kind: str) -> None:
    data, picture = encoded(width, height, kind)
    found = decode(data, 32, CENTRE)
    scale = 32 / min(width, height)
    resized = picture.resize((max(32, round(width * scale)), max(32, round(height * scale))), Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32))).astype(int)
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - expected).mean() < 6


def test_crops_move_with_their_place() -> None:
    data, _ = encoded(128, 32)
    start, end = decode(data, 32, (0.0, 0.0)), decode(data, 32, (0.0, 0.999))
    assert start[..., 1].mean() < 60 < 190 < end[..., 1].mean()


def test_grey_pictures_become_rgb() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 40), 90, np.uint8)).save(file, "JPEG")
    assert np.abs(decode(file.getvalue(), 32, CENTRE).astype(int) - 90).max() < 3


@pytest.mark.parametrize("data", [b"", b"not a picture", encoded(64, 64)[0][:40]])
def test_damaged_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data, 32, CENTRE)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_pictures_are_refused_before_decoding() -> None:
    file = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(file, "PNG")
    with pytest.raises(DecodeError, match="11000 x 11000"):
        decode(file.getvalue(), 32, CENTRE)
