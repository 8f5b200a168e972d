"""What inspect says of a manifest is what it holds, and the contact sheet shows its pairs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from data_pipeline.__main__ import main
from data_pipeline.index.index import index
from data_pipeline.inspection import MARGIN, Pair, draw_pairs, write_contact_sheet
from tests.pairs import write_pairs, write_shard
from vdtrain.data.manifest import Manifest
from vdtrain.grid import ELLIPSIS, wrap


def write_image(folder: Path, name: str, images: list[tuple[int, int, str, str]]) -> None:
    """A shard of plain images by width, height, caption and orientation."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for number, (width, height, caption, orientation) in enumerate(images):
            file = io.BytesIO()
            Image.new("RGB", (width, height), (200, 10 * number, 30)).save(file, "JPEG")
            described = {
                "url": f"http://a/{name}/{number}",
                "exif": json.dumps({"Image Orientation": orientation}),
            }
            sample = {"jpg": file.getvalue(), "txt": caption.encode(), "json": json.dumps(described).encode()}
            for suffix, content in sample.items():
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (folder / f"{name}_stats.json").write_text(json.dumps({"successes": len(images)}))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    upright = "Horizontal (normal)"
    write_image(
        tmp_path / "first",
        "000000",
        [(300, 600, "a b", upright), (600, 300, "a b c d", "Rotated 90 CW"), (9, 9, "", "")],
    )
    write_image(tmp_path / "second", "000000", [(700, 520, "ein größeres Wort 猫", upright), (100, 100, "e", upright)])
    index({"first": tmp_path / "first", "second": tmp_path / "second"}, tmp_path / "manifest")
    return tmp_path / "manifest"


def test_it_says_what_the_manifest_holds(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(manifest), "data=shapes", "data.inspect.pixels=64"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    tables = {line.split()[0]: line.split()[1:] for line in lines[3:6]}
    assert {name: (row[0], row[1], *row[4:]) for name, row in tables.items()} == {
        "first": ("1", "2", "100.0%", "0.0%"),
        "second": ("1", "2", "50.0%", "50.0%"),
        "all": ("2", "4", "75.0%", "25.0%"),
    }
    found = {line.rpartition(": ")[0] or line[:15].strip(): line.rpartition(": ")[2] for line in lines if line}
    bars = {
        name: line.split("%")[0].split()[-1]
        for line in lines
        if "%" in line and "to" in line
        for name in [line[:15].strip()]
    }
    assert bars["64 to 128"] == "25.0"
    assert bars["256 to 384"] == "50.0"
    assert bars["512 to 768"] == "25.0"
    assert bars["0.5 to 0.667"] == "50.0"
    assert bars["0.8 to 1.25"] == "25.0"
    assert bars["1.25 to 1.5"] == "25.0"
    assert "from all shards, 4 samples:" in lines
    assert found["characters of a caption"] == "7.5 in the mean, median 5, 95th percentile 17"
    assert found["words of a caption"] == "2.8 in the mean, median 3, 95th percentile 4"
    assert found["stored turned or mirrored, by EXIF"] == "25.0%"
    assert found["left out"] == "1 no caption"
    assert found["listed more than once"] == "0"
    assert found["contact sheet of 4 pairs, drawn at random"] == str(manifest.parent / "inspect.png")


def test_the_sheet_is_drawn_by_its_seed_and_shows_images_as_they_are_to_be_seen(manifest: Path, tmp_path: Path) -> None:
    sheets = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        output = tmp_path / f"{name}.png"
        settings = [
            "data=shapes",
            f"data.inspect.seed={seed}",
            f"data.inspect.output={output}",
            "data.inspect.pixels=64",
        ]
        assert main(["inspect", str(manifest), "data.inspect.images=3", *settings]) == 0
        with Image.open(output) as sheet:
            sheets[name] = np.asarray(sheet)
    assert sheets["first"].shape[1] == 3 * (64 + 2 * MARGIN)
    assert np.array_equal(sheets["first"], sheets["again"])
    assert not np.array_equal(sheets["first"], sheets["other"])
    pairs = list(draw_pairs(Manifest(manifest), np.random.default_rng(0), 4))
    assert sorted((pair.image.size, pair.caption, pair.note) for pair in pairs) == [
        ((100, 100), "e", "second  100 x 100"),
        ((300, 600), "a b", "first  300 x 600"),
        ((300, 600), "a b c d", "first  300 x 600"),
        ((700, 520), "ein größeres Wort 猫", "second  700 x 520"),
    ]


def test_pairs_whose_shard_was_damaged_since_are_shown_without_their_image(manifest: Path) -> None:
    shard = manifest.parent / "second" / "000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    pairs = list(draw_pairs(Manifest(manifest), np.random.default_rng(0), 4))
    assert sorted(pair.image is None for pair in pairs) == [False, False, True, True]
    assert all("made anew since the index" in pair.note for pair in pairs if pair.image is None)
    write_contact_sheet(manifest.parent / "sheet.png", pairs, 48)


@pytest.mark.parametrize(
    "caption", ["", "猫" * 300, "word " * 100, "\x00\u202e\ud7ff🐈 e\u0301", "a" * 500, "line\nline\tline"]
)
def test_captions_of_every_kind_are_wrapped(tmp_path: Path, caption: str) -> None:
    font = ImageFont.load_default(12)
    lines = wrap(caption, font, 100, 3)
    assert len(lines) <= 3
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "").removesuffix(ELLIPSIS) in "".join(caption.split())
    write_contact_sheet(tmp_path / "sheet.png", [Pair(None, caption, caption)], 100)


@pytest.mark.parametrize("output", [None, "mine.png"])
def test_a_sheet_that_stands_there_is_replaced_only_by_a_setting(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str | None
) -> None:
    sheet = manifest.parent / "inspect.png" if output is None else tmp_path / output
    words = ["inspect", str(manifest), "data=shapes", *([] if output is None else [f"data.inspect.output={sheet}"])]
    sheet.write_text("not to be lost")
    assert main(words) == 2
    said = capsys.readouterr()
    remedy = "data.inspect.overwrite=true"
    assert said.err == f"error: data.inspect.output={sheet}: {sheet} exists already; {remedy} replaces it\n"
    # It is said before any work, and a command that draws no sheet does not ask.
    assert said.out == ""
    assert main([*words, "data.inspect.images=0"]) == 0
    assert sheet.read_text() == "not to be lost"
    assert main([*words, remedy]) == 0
    with Image.open(sheet) as drawn:
        assert drawn.format == "PNG"


def test_of_many_shards_some_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_pairs(tmp_path, shards=5, count=4)
    settings = ["data=shapes", "data.inspect.shards=2", "data.inspect.images=0"]
    assert main(["inspect", str(manifest), *settings]) == 0
    printed = capsys.readouterr().out
    assert "from 2 of 5 shards, drawn at random, 8 samples:" in printed
    assert "contact sheet" not in printed


def test_what_cannot_be_inspected_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no manifest")
    for name in ("nowhere", "file", "."):
        assert main(["inspect", str(tmp_path / name), "data=shapes"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: data.manifest=")
        assert error.count("\n") == 1
    write_shard(tmp_path / "000000.tar", 1, seed=0)
    index({"drawn": tmp_path}, tmp_path / "it's 1")
    assert main(["inspect", str(tmp_path / "it's 1"), "data=shapes", "data.inspect.pixels=8"]) == 2
    assert "data.inspect.pixels=8: must be at least 32" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "it's 1"), "data=shapes"]) == 0
    assert main(["inspect", "--cfg", "job"]) == 0
