"""Own images into shards: every form in which people have them, what is left out, and runs that end in the middle."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from pillow_heif import from_pillow

from data_pipeline.__main__ import main
from data_pipeline.pack import pack as module
from data_pipeline.pack.tables import Entry
from miniature.shapes import caption, draw, sample_scene
from vdtrain.commands.evaluate import main as evaluate
from vdtrain.config.command_schema import EvaluateConfig
from vdtrain.config.compose import compose, to_object
from vdtrain.config.data_schema import PackConfig
from vdtrain.errors import ConfigError
from vdtrain.evaluation.pairs import Pairs
from vdtrain.evaluation.parts import Part

# A run that comes to a halt within its second shard, until it is killed.
HALTS = """
import sys
from data_pipeline.__main__ import main
from data_pipeline.pack import pack as module
from data_pipeline.pack.picture import prepare

def halting(path, config):
    if path.endswith("12.jpg"):
        print("halted", flush=True)
        sys.stdin.read()
    return prepare(path, config)

module.prepare = halting
main(sys.argv[1:])
"""
ORIENTATION = 0x0112


def image(path: Path, size: tuple[int, int] = (40, 32), colour: str = "red", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def captioned(folder: Path, count: int) -> Path:
    """Drawn images as 00.jpg, 01.jpg ... with their captions beside them."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        scene = sample_scene(generator)
        Image.fromarray(draw(scene, 48)).save(folder / f"{number:02d}.jpg")
        (folder / f"{number:02d}.txt").write_text(caption(scene, generator))
    return folder


def words(source: Path, root: Path, *settings: str) -> list[str]:
    small = ["data.pack.min_image_size=16", "data.pack.processes=1"]
    return ["pack", str(source), f"data.root={root}", *small, *settings]


def samples(output: Path) -> list[dict[str, Any]]:
    """All samples, as the webdataset library reads them."""
    tars = [str(tar) for tar in sorted(output.glob("*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False)) if tars else []


def texts(output: Path) -> dict[str, str]:
    """Captions by the paths of the images."""
    return {json.loads(each["json"])["path"]: each["txt"].decode() for each in samples(output)}


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """What was printed since the last call, errors last."""

    def read() -> str:
        shown = capsys.readouterr()
        return shown.out + shown.err

    return read


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_captions_beside_the_images(tmp_path: Path, said: Said) -> None:
    top = tmp_path / "photos"
    for name, text in (("a.jpg", "a.txt"), ("B.JPG", "B.TXT"), ("c.d.png", "c.d.caption"), ("e.webp", "e.webp.txt")):
        image(top / name)
        (top / text).write_text(f"the text of {name}\n")
    image(top / "deep" / "er" / "ü.jpeg")
    (top / "deep" / "er" / "ü.txt").write_bytes("\ufeffwith a\r\nmark ".encode())
    image(top / "windows.bmp")
    (top / "windows.txt").write_text("two bytes", encoding="utf-16")
    odd = os.fsdecode(b"odd \xff.jpg")
    image(top / odd)
    (top / odd).with_suffix(".txt").write_text("not a name of Unicode")
    # What is left out, and what is passed over.
    image(top / "none.jpg")
    image(top / "tiny.jpg", (40, 15))
    image(top / "cut.jpg")
    (top / "cut.jpg").write_bytes((top / "cut.jpg").read_bytes()[:-20])
    (top / "words.jpg").write_text("no image")
    for name in ("tiny", "cut", "words", "lonely"):
        (top / f"{name}.txt").write_text("a text")
    for name, text in (("empty", b" \n"), ("latin", "é".encode("latin-1"))):
        image(top / f"{name}.jpg")
        (top / f"{name}.txt").write_bytes(text)
    (top / "gone.jpg").symlink_to(top / "nowhere.jpg")
    (top / "gone.txt").write_text("of a dangling link")
    for name in ("._a.jpg", ".hidden/a.jpg", "__MACOSX/a.jpg"):
        image(top / name)
    (top / "README.md").write_text("not an image")
    assert main(words(top, tmp_path)) == 0
    assert texts(tmp_path / "packed") == {
        **{name: f"the text of {name}" for name in ("a.jpg", "B.JPG", "c.d.png", "e.webp")},
        "deep/er/ü.jpeg": "with a mark",
        "windows.bmp": "two bytes",
        "odd \N{REPLACEMENT CHARACTER}.jpg": "not a name of Unicode",
    }
    out = said()
    for reason in (
        "2 no caption (none.jpg)",
        "1 too small (tiny.jpg)",
        "2 unreadable image (cut.jpg)",
        "1 caption is not UTF-8 (latin.jpg)",
        "1 caption without an image (lonely.txt)",
        "1 missing file (gone.jpg)",
    ):
        assert reason in out, out


def test_links_are_followed_and_form_no_circle(tmp_path: Path) -> None:
    captioned(tmp_path / "disk" / "far", 3)
    top = tmp_path / "photos"
    captioned(top, 2)
    (top / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(top)
    (tmp_path / "here").symlink_to(top)
    assert main(words(tmp_path / "here", tmp_path)) == 0
    assert list(texts(tmp_path / "packed")) == [
        *("00.jpg", "01.jpg", "linked/far/00.jpg", "linked/far/01.jpg", "linked/far/02.jpg")
    ]


def test_an_image_folder_of_hugging_face(tmp_path: Path, said: Said) -> None:
    top = tmp_path / "set"
    for name in ("a.png", "train/b.png", "train/unnamed.png", "test/c.png", "test/in/d.png"):
        image(top / name)
    (top / "train" / "metadata.csv").write_text('file_name,split,text\nb.png,x,"b, with a comma"\nlost.png,x,l\n')
    lines = [{"file_name": "c.png", "caption": "c"}, {"file_name": "in/d.png", "caption": ["d", "also d"]}]
    (top / "test" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (top / "a.txt").write_text("a")
    assert main(words(top, tmp_path)) == 0
    assert texts(tmp_path / "packed") == {
        "a.png": "a",
        "test/c.png": "c",
        "test/in/d.png": "d",
        "train/b.png": "b, with a comma",
    }
    out = said()
    assert "1 missing file (lost.png)" in out
    assert "1 not named in the metadata file (train/unnamed.png)" in out
    # At the top, with a column of another name.
    (top / "metadata.csv").write_text("file_name,haiku\ntrain/b.png,old pond\n")
    for name in ("train/metadata.csv", "test/metadata.jsonl"):
        (top / name).unlink()
    settings = ["data.pack.caption_column=Haiku", "data.pack.overwrite=true"]
    assert main(words(top, tmp_path, *settings)) == 0
    assert texts(tmp_path / "packed") == {"train/b.png": "old pond"}
    (top / "metadata.jsonl").write_text("{}")
    assert main(words(top, tmp_path)) == 2
    assert "has metadata.csv and metadata.jsonl; give one of them as data.pack.input" in said()


# --- tables -----------------------------------------------------------------------------------------------------------


def as_csv(separator: str, encoding: str = "utf-8", head: str = "filepath,title") -> Callable[[Path, list], None]:
    def write(path: Path, rows: list[tuple[str, str]]) -> None:
        lines = [head.replace(",", separator), *(f'"{place}"{separator}"{text}"' for place, text in rows)]
        path.write_bytes("\r\n".join(lines).encode(encoding))

    return write


def as_lines(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps({'image': place, 'caption': [text]})}\n\n" for place, text in rows))


def as_list(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text(json.dumps([{"id": 1, "image": place, "caption": text} for place, text in rows]))


def as_parquet(path: Path, rows: list[tuple[str, str]]) -> None:
    places = pa.array([place for place, _ in rows], pa.large_string())
    captions = pa.array([text for _, text in rows]).dictionary_encode()
    pq.write_table(pa.table({"TEXT": captions, "Image_Path": places}), path, row_group_size=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("open_clip.csv", as_csv("\t")),
        ("excel.csv", as_csv(";", "utf-8-sig")),
        ("unicode.csv", as_csv(",", "utf-16")),
        ("pairs.tsv", as_csv("\t")),
        ("captions.txt", as_csv(",", head="image,caption")),
        ("results.CSV", as_csv("|", head="image_name, comment")),
        ("pairs.jsonl", as_lines),
        ("pairs.json", as_list),
        ("pairs.parquet", as_parquet),
    ],
)
def test_a_table(tmp_path: Path, said: Said, name: str, write: Callable[[Path, list], None]) -> None:
    table = tmp_path / "set" / name
    inside, outside = image(tmp_path / "set" / "in" / "a b.jpg"), image(tmp_path / "elsewhere" / "b.png")
    write(
        table,
        [
            ("in/a b.jpg", "a, with; all| marks"),
            (str(outside), "an absolute path"),
            (str(inside), "the first again"),
            ("in\\a b.jpg", "from Windows"),
            ("in/lost.jpg", "gone"),
            ("https://example.org/a.jpg", "not here"),
            ("in/a b.jpg", " "),
            ("", "of nothing"),
        ],
    )
    assert main(words(table, tmp_path)) == 0
    assert [(json.loads(each["json"])["path"], each["txt"].decode()) for each in samples(tmp_path / "packed")] == [
        ("in/a b.jpg", "a, with; all| marks"),
        (str(outside), "an absolute path"),
        ("in/a b.jpg", "the first again"),
        ("in/a b.jpg", "from Windows"),
    ]
    out = said()
    for reason in ("1 missing file (in/lost.jpg)", "1 an address, not a file (https", "1 no caption", "1 no path"):
        assert reason in out, out


def test_columns_and_root_of_a_table(tmp_path: Path, said: Said) -> None:
    image(tmp_path / "images" / "a.jpg")
    table = tmp_path / "table.csv"
    table.write_text("where,what\na.jpg,a text\nshort\n")
    assert main(words(table, tmp_path)) == 2
    assert "no known column of image paths, only where, what; name it by data.pack.image_column" in said()
    settings = ["data.pack.image_column=where", f"data.pack.images={tmp_path}/images"]
    assert main(words(table, tmp_path, *settings, "data.pack.caption_column=that")) == 2
    assert "no column that, only where, what; name it by data.pack.caption_column" in said()
    assert main(words(table, tmp_path, *settings, "data.pack.caption_column=what")) == 0
    assert texts(tmp_path / "packed") == {"a.jpg": "a text"}
    assert "1 row without image or caption column (row 3)" in said()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", "é,ü\n".encode("latin-1"), "not UTF-8"),
        ("a.csv", b"", "an empty first line"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.json", b"{broken", "cannot be read"),
        ("a.json", b'{"a": 1}', "neither a list of objects nor COCO's captions"),
        ("a.json", b'{"images": [], "annotations": [{"bbox": []}]}', "annotations have no captions"),
        ("a.xlsx", b"PK", "neither a folder nor one of .csv .tsv"),
        ("lost.csv", None, "no such folder or file"),
    ],
)
def test_a_table_that_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, said: Said, name: str, content: bytes | None, line: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(words(tmp_path / name, tmp_path)) == 2
    out = said()
    assert line in out, out
    assert out.startswith(f"error: data.pack.input={tmp_path / name}: ")
    assert out.count("\n") == 1
    assert not list(tmp_path.rglob("*.tar"))


def test_images_inside_a_table_are_refused(tmp_path: Path, said: Said) -> None:
    table = tmp_path / "hub.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"\xff\xd8", "path": "a.jpg"}], "text": ["a"]}), table)
    assert main(words(table, tmp_path)) == 2
    assert "holds the images themselves and not their paths" in said()


def write_coco(folder: Path, year: int = 2017) -> Path:
    """Two images of five captions, one without, in the layout of COCO's archives."""
    prefix = "COCO_val2014_" if year == 2014 else ""
    for number in (139, 285, 632):
        image(folder / f"val{year}" / f"{prefix}{number:012d}.jpg")
    # Not in the order of their ids.
    annotations = [
        {"image_id": number, "id": 10 * number + count, "caption": f"caption {count} of {number}\n"}
        for count in (3, 1, 4, 2, 5)
        for number in (285, 139)
    ]
    images = [{"id": number, "file_name": f"{prefix}{number:012d}.jpg"} for number in (139, 285, 632)]
    table = folder / "annotations" / f"captions_val{year}.json"
    table.parent.mkdir()
    table.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return table


def test_captions_of_coco(tmp_path: Path, said: Said) -> None:
    table = write_coco(tmp_path / "coco")
    assert main(words(table, tmp_path)) == 0
    assert "1 no caption (000000000632.jpg)" in said()
    names = [f"{number:012d}.jpg" for number in (139, 285)]
    expected = {name: f"caption 1 of {int(name[:-4])}" for name in names}
    assert texts(tmp_path / "packed") == expected
    each = ["data.pack.captions=each", f"data.pack.output={tmp_path}/each"]
    assert main(words(table, tmp_path, *each)) == 0
    assert [sample["txt"].decode() for sample in samples(tmp_path / "each")] == [
        f"caption {count} of {number}" for number in (139, 285) for count in range(1, 6)
    ]
    (tmp_path / "coco" / "val2017").rename(tmp_path / "moved")
    assert main(words(table, tmp_path, f"data.pack.output={tmp_path}/third")) == 2
    assert "no 000000000139.jpg in" in said()
    moved = [f"data.pack.images={tmp_path}/moved", f"data.pack.output={tmp_path}/third"]
    assert main(words(table, tmp_path, *moved)) == 0
    assert texts(tmp_path / "third") == expected


@pytest.mark.parametrize("year", [2014, 2017])
def test_one_command_makes_cocos_pairs_with_all_references(year: int, tmp_path: Path, said: Said) -> None:
    coco, made = tmp_path / "coco", tmp_path / "made"
    write_coco(coco, year)
    given = [f"data=coco{year}", f"data.root={made}", "data.pack.processes=1", "data.index.processes=1"]
    assert main(["pack", str(coco), *given]) == 0
    assert "2 samples in 1 shards" in said()
    measured = [*given[:2], "resolution=32", "samples=2", "part_samples=2", "loader_workers=1", "threads=1"]
    config = to_object(compose("evaluate", measured), EvaluateConfig)
    found = Pairs(config).read(Part(0, 0, 2))
    numbers = [text.rpartition(" ")[2] for text in found["text"]]
    assert found["text"] == [f"caption 1 of {number}" for number in numbers]
    assert found["references"] == [[f"caption {count} of {number}" for count in range(1, 6)] for number in numbers]
    # COCO's own file names other things by the same numbers.
    wrong = [*measured, f"data.references={coco}/annotations/captions_val{year}.json", f"output_dir={tmp_path}/wrong"]
    with pytest.raises(ConfigError, match=r"is of other images|has no caption of"):
        Pairs(to_object(compose("evaluate", wrong), EvaluateConfig)).read(Part(0, 0, 2))
    # Results in COCO's form, by the numbers of its images, against COCO's files as they are.
    results = [{"image_id": number, "caption": f"caption 2 of {number}"} for number in (285, 139)]
    (tmp_path / "results.json").write_text(json.dumps(results))
    words = [f"captions={tmp_path}/results.json", f"real_images={coco}/val{year}", "model=tiny", "resolution=32"]
    words += [f"data.references={coco}/annotations/captions_val{year}.json", f"output_dir={tmp_path}/evaluation"]
    assert evaluate([*words, "loader_workers=1", "threads=1"]) == 0
    figures = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["flows"]["image-to-text"]
    assert figures["bleu"] == pytest.approx(100)
    assert figures["cider"] > 0
    assert main(["pack", str(tmp_path), *given]) == 2
    assert f"data.pack.table=annotations/captions_val{year}.json: " in said()


# --- images -----------------------------------------------------------------------------------------------------------


def packed(tmp_path: Path, path: Path, *settings: str) -> tuple[Image.Image, dict[str, Any], bytes]:
    """An image as it is in a shard, what its JSON says, and its bytes."""
    path.with_suffix(".txt").write_text("a text")
    assert main(words(path.parent, tmp_path, "data.pack.image_size=32", *settings)) == 0
    (sample,) = samples(tmp_path / "packed")
    return Image.open(io.BytesIO(sample["jpg"])), json.loads(sample["json"]), sample["jpg"]


def test_an_image_is_resized_once_and_never_enlarged(tmp_path: Path) -> None:
    made, described, _ = packed(tmp_path, image(tmp_path / "set" / "a.png", (640, 200)))
    assert (made.format, made.size) == ("JPEG", (102, 32))
    sizes = ("original_width", "original_height", "width", "height")
    assert [described[key] for key in sizes] == [640, 200, 102, 32]


def test_a_jpeg_that_needs_no_change_keeps_its_bytes(tmp_path: Path) -> None:
    path = image(tmp_path / "set" / "a.jpg", (40, 30), quality=71)
    assert packed(tmp_path, path)[2] == path.read_bytes()


def test_a_faulty_jpeg_is_packed_if_it_is_whole(tmp_path: Path, said: Said) -> None:
    drawn = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    place = io.BytesIO()
    Image.fromarray(drawn).save(place, "JPEG", quality=90)
    whole = place.getvalue()
    folder = tmp_path / "set"
    folder.mkdir()
    files = {
        "whole": whole,
        "jfif": whole.replace(b"JFIF\0\1\1", b"JFIF\0\2\1"),
        "endless": whole[:-2],
        "half": whole[: len(whole) // 2],
        "ended": whole[: len(whole) // 2] + b"\xff\xd9",
    }
    for name, data in files.items():
        (folder / f"{name}.jpg").write_bytes(data)
        (folder / f"{name}.txt").write_text(name)
    assert main(words(folder, tmp_path, "data.pack.image_size=32")) == 0
    found = samples(tmp_path / "packed")
    assert {each["txt"].decode() for each in found} == {"whole", "jfif", "endless"}
    assert len({each["jpg"] for each in found}) == 1
    assert "2 unreadable image" in said()


def test_an_image_on_its_side_is_turned(tmp_path: Path) -> None:
    picture = Image.new("RGB", (80, 64), "blue")
    picture.paste("red", (0, 0, 80, 32))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    (tmp_path / "set").mkdir()
    picture.save(tmp_path / "set" / "a.jpg", exif=exif, quality=95)
    made, described, _ = packed(tmp_path, tmp_path / "set" / "a.jpg")
    assert made.size == (32, 40)
    assert (described["original_width"], described["original_height"]) == (64, 80)
    assert ORIENTATION not in made.getexif()
    # What was above is now on the right.
    assert made.getpixel((28, 20))[0] > 200
    assert made.getpixel((4, 20))[2] > 200


def transparent(path: Path) -> None:
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(path)


def palette(path: Path) -> None:
    picture = Image.new("P", (32, 32), 0)
    picture.putpalette([0, 0, 0, 9, 9, 9])
    picture.save(path, transparency=0)


def deep(path: Path) -> None:
    Image.fromarray(np.full((32, 32), 0x8080, np.uint16)).save(path)


def cmyk(path: Path) -> None:
    Image.new("CMYK", (32, 32), (0, 0, 0, 127)).save(path)


def phone(path: Path) -> None:
    from_pillow(Image.new("RGB", (64, 64), (128, 128, 128))).save(path)


def avif(path: Path) -> None:
    Image.new("RGB", (32, 32), (128, 128, 128)).save(path)


@pytest.mark.parametrize(
    ("name", "write", "grey"),
    [
        ("a.png", transparent, 255),
        ("a.webp", transparent, 255),
        ("b.png", palette, 255),
        ("c.png", deep, 128),
        ("d.jpg", cmyk, 128),
        ("E.HEIC", phone, 128),
        ("f.avif", avif, 128),
    ],
)
def test_an_image_becomes_plain_colour(tmp_path: Path, name: str, write: Callable[[Path], None], grey: int) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / name)
    made, _, _ = packed(tmp_path, tmp_path / "set" / name)
    assert made.mode == "RGB"
    assert np.abs(np.asarray(made).astype(int) - grey).max() <= 2


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, said: Said) -> None:
    path = image(tmp_path / "set" / "a.png", (400, 300))
    path.with_suffix(".txt").write_text("a text")
    assert main(words(path.parent, tmp_path, "data.pack.max_image_pixels=100000")) == 1
    assert "nothing to pack; left out: 1 too many pixels (a.png)" in said()


# --- runs -------------------------------------------------------------------------------------------------------------


def test_any_number_of_processes_makes_the_same_shards(tmp_path: Path) -> None:
    top = captioned(tmp_path / "photos", 40)
    (top / "07.jpg").write_text("broken")
    for processes in (1, 2):
        settings = [f"data.pack.processes={processes}", f"data.pack.output={tmp_path}/{processes}"]
        assert main(words(top, tmp_path, "data.pack.samples_per_shard=10", *settings)) == 0
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert [len(samples(tmp_path / "1")), len(list((tmp_path / "1").glob("*.tar")))] == [39, 4]


def test_a_run_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    top, size = captioned(tmp_path / "photos", 30), "data.pack.samples_per_shard=10"
    command = [sys.executable, "-c", HALTS, *words(top, tmp_path, size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halted\n"
        assert [tar.name for tar in (tmp_path / "packed").glob("*.tar")] == ["000000.tar"]
        process.send_signal(signal.SIGKILL)
    assert list((tmp_path / "packed").glob("*.incomplete"))
    # As if it had been killed between a tar and its record.
    (tmp_path / "packed" / "000001.tar").write_bytes(b"an earlier attempt")
    made: list[int] = []
    make = module.make_shard
    monkeypatch.setattr(module, "make_shard", lambda shard: made.append(shard.number) or make(shard))
    assert main(words(top, tmp_path, size)) == 0
    assert made == [1, 2]
    assert "30 samples in 3 shards, 2 of them new; left out: none" in said()
    assert main(words(top, tmp_path, size, f"data.pack.output={tmp_path}/whole")) == 0
    assert hashes(tmp_path / "packed") == hashes(tmp_path / "whole")


def test_again_does_nothing_and_a_change_is_one_line(tmp_path: Path, said: Said) -> None:
    top, output = captioned(tmp_path / "photos", 5), tmp_path / "packed"
    assert main(words(top, tmp_path)) == 0
    said()
    before = hashes(output)
    assert main(words(top, tmp_path)) == 0
    assert "5 samples in 1 shards, which are there already: nothing to do; left out: none" in said()
    assert main(words(top, tmp_path, "data.pack.encode_quality=80", "data.pack.image_size=32")) == 2
    out = said()
    assert out.startswith("error: data.pack.image_size, data.pack.encode_quality: changed since the shards in ")
    assert out.count("\n") == 1
    image(top / "03.jpg")
    image(top / "04b.jpg")
    (top / "04b.txt").write_text("one more")
    assert main(words(top, tmp_path)) == 2
    out = said()
    assert "data.pack.input: changed (first at 03.jpg) since the shards in" in out
    assert hashes(output) == before
    assert main(words(top, tmp_path, "data.pack.overwrite=true")) == 0
    assert len(samples(output)) == 6
    # Moved as a whole, it is still the same.
    top.rename(tmp_path / "moved")
    assert main(words(tmp_path / "moved", tmp_path)) == 0
    assert "nothing to do" in said()


def test_tars_of_others_are_left_alone(tmp_path: Path, said: Said) -> None:
    top = captioned(tmp_path / "photos", 2)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "000000.tar").write_text("mine")
    assert main(words(top, tmp_path, "data.pack.overwrite=true")) == 2
    assert "has tar files that were not packed here; choose another folder" in said()
    assert (tmp_path / "packed" / "000000.tar").read_text() == "mine"


def test_a_pack_of_nothing_is_an_error_until_there_is_something(tmp_path: Path, said: Said) -> None:
    top = tmp_path / "photos"
    image(top / "a.jpg")
    assert main(words(top, tmp_path)) == 1
    assert said() == f"error: data.pack.input={top}: nothing to pack; left out: 1 no caption (a.jpg)\n"
    (top / "a.txt").write_text(" ")
    for _ in range(2):
        assert main(words(top, tmp_path)) == 1
        assert "nothing to pack" in said()
    (top / "a.txt").write_text("a text")
    assert main(words(top, tmp_path)) == 0
    assert main(["pack"]) == 2
    assert said().endswith("write `python -m data_pipeline pack FOLDER`, or a table in its place\n")


def test_the_memory_of_a_plan_does_not_grow_with_the_images(tmp_path: Path) -> None:
    config = PackConfig(samples_per_shard=100)

    def peak(count: int) -> int:
        entries: Iterator[Entry] = (Entry(f"{number}.jpg", "a text", None, "1 2") for number in range(count))
        tracemalloc.start()
        try:
            assert module._write_plan(entries, config, tmp_path / f"{count}.parquet") == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(20_000) < 1.5 * peak(1_000)
