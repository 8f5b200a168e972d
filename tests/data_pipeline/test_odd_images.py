"""Odd and damaged images from a tar of one's own to the batches of training, by the command as typed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import webdataset
from PIL import Image

from data_pipeline.__main__ import main
from vdtrain.data.decode import decode
from vdtrain.data.manifest import Manifest
from vdtrain.data.stream import PairStream

SIDE = 64


def members() -> dict[str, bytes]:
    """Images by what they are; all of them draw the same."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    picture = Image.fromarray(np.stack([rows * 3, columns * 3, rows + columns], -1).astype(np.uint8))
    files = {}
    for kind in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF"):
        file = io.BytesIO()
        picture.save(file, kind)
        files[kind] = file.getvalue()
    heic = io.BytesIO()
    pillow_heif.from_pillow(picture).save(heic, quality=95)
    jpeg = files["JPEG"]
    odd = jpeg.replace(b"JFIF\0\1\1", b"JFIF\0\2\1")
    half = jpeg[: (jpeg.index(b"\xff\xda") + len(jpeg)) // 2]
    cut = {"half a JPEG": half, "half a JPEG, ended": half + b"\xff\xd9"}
    return {**files, "HEIC": heic.getvalue(), "JFIF 2.01": odd, "no end": jpeg[:-2], "more": jpeg + bytes(99), **cut}


@pytest.mark.parametrize("decoded", [True, False])
def test_the_index_and_the_stream_take_what_is_whole_and_count_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, decoded: bool
) -> None:
    images = members()
    (tmp_path / "tars").mkdir()
    with webdataset.TarWriter(str(tmp_path / "tars" / "mine.tar")) as writer:
        for number, (name, data) in enumerate(images.items()):
            writer.write({"__key__": f"{number:02d}", "jpg": data, "txt": name.encode(), "json": b"{}"})
    settings = ["data=own", f"data.shards={tmp_path / 'tars'}", f"data.manifest={tmp_path / 'manifest'}"]
    assert main(["index", *settings, f"data.index.decode={str(decoded).lower()}"]) == 0
    printed = capsys.readouterr().out
    reasons = {"1 GIF is not read", "1 TIFF is not read"} | ({"2 cannot be decoded: content"} if decoded else set())
    assert set(printed.strip().partition("left out: ")[2].split(", ")) == reasons
    good = set(images) - {"GIF", "TIFF", "half a JPEG", "half a JPEG, ended"}
    stream = PairStream(
        tmp_path / "manifest", seed=1, resolution=32, global_batch_size=len(Manifest(tmp_path / "manifest"))
    )
    batch = next(iter(stream))
    stream.close()
    assert set(batch.samples["text"]) == good
    assert set(stream.replaced) == (set() if decoded else {"truncated"})
    assert caplog.text.count("mine.tar, key ") == sum(stream.replaced.values())
    expected = decode(images["JPEG"], 32, (0.5, 0.5)).transpose(2, 0, 1).astype(int)
    for image in batch.samples["image"].numpy():
        assert np.abs(image - expected).mean() < 3
