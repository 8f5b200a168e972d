"""Damaged files of every kind, given to the commands that read them: one line each, and no traceback."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_pipeline import shards
from data_pipeline.download.part import Part, Record
from data_pipeline.index.shard_reading import ShardError, read_shard
from data_pipeline.index.tar_members import TarMembers
from tests.cases import with_slow
from tests.data_pipeline.test_own_shards import J, write_tar
from tests.world import DATA, INDEX, LATENTS, SAMPLER, TRAIN, World, one_line
from vdtrain.config.data_schema import DownloadConfig
from vdtrain.data.manifest import SHARDS_FILE, Manifest
from vdtrain.data.tar_samples import CutError
from vdtrain.data.tar_samples import samples as streamed
from vdtrain.errors import ConfigError

# Contents of a JSON or YAML file that is not what its reader expects.
DOCUMENTS = {
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "nested without end": b'{"a":' * 100_000,
    "a list": b"[1, 2]",
    "a text": b'"text"',
    "nothing": b"",
    "null": b"null",
    "many digits": b"1" * 5_000,
    "infinity": b'{"rows": 1e999, "layout": 2, "format": 1, "successes": 1e999, "plan": 1, "rounds": 1e999}',
    "other shapes": b'{"successes": [1], "status_dict": [3], "files": [1], "layout": [2], "plan": [], "rounds": {}}',
}


@pytest.mark.parametrize("document", with_slow({name: name for name in DOCUMENTS}, ["not UTF-8", "other shapes"]))
def test_damaged_records_are_one_line(world: World, document: str) -> None:
    content = DOCUMENTS[document]
    exported = ["vdtrain", "weights", "export", "safetensors", "FOLDER/weights", "checkpoint=FOLDER/model"]
    assert world.type(*exported)[0] == 0
    sample = ["vdtrain", "sample", "FOLDER/weights", *SAMPLER[1:], "inputs=[a]", "output_dir=FOLDER/out"]
    for name in ("model.yaml", "weights.json", "model.safetensors"):
        file = next(world.folder.glob(f"weights/{name}"), None) or next(world.folder.glob("weights/*.json"))
        kept = file.read_bytes()
        file.write_bytes(content)
        status, said = world.type(*sample)
        assert (status, file.name in one_line(said)) == (2, True), said
        file.write_bytes(kept)
    (world / "latents" / "32").mkdir(parents=True)
    (world / "latents" / "32" / "latents.json").write_bytes(content)
    status, said = world.type(*LATENTS)
    assert status == 2
    assert "latents.json cannot be used" in one_line(said)
    for source in ("laion2b_en", "coyo700m"):
        (world / "selected" / source).mkdir(parents=True)
        (world / "selected" / source / "selection.json").write_bytes(content)
    selected = [f"data.sources.{source}.selected=FOLDER/selected/{source}" for source in ("laion2b_en", "coyo700m")]
    status, said = world.type("python", "-m", "data_pipeline", "download", *DATA, *selected)
    assert status == 2
    assert "selection.json: cannot be read" in one_line(said)
    rates = world / "bench.json"
    rates.write_bytes(content)
    status, said = world.type("vdtrain", "plan", "stage=stage1_single_flow", *TRAIN, f"rate={rates}")
    assert status == 2
    assert "rate=" in one_line(said)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_damaged_statistics_cost_their_shard(world: World, document: str) -> None:
    file = world / "shards/laion2b_en/00000_stats.json"
    file.write_bytes(DOCUMENTS[document])
    assert shards.problem(file) is not None
    status, said = world.type(*INDEX, "data.manifest=FOLDER/anew")
    assert status == 2
    assert "1 of 2 shards are left out" in one_line("\n".join(said.splitlines()[-1:]))
    assert len(Manifest(world / "anew")) == 16
    # The better attempt of a retried shard is the one whose statistics can be read.
    before = file.with_name(f"{file.name}{shards.BEFORE}")
    file.rename(before)
    file.write_text(json.dumps({"successes": 16, "status_dict": {"success": 16}}))
    shards.settle(file.parent)
    assert shards.problem(file) == f"{file.with_name('00000.tar')}: its parquet file is missing"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_damaged_plan_of_a_download_is_one_line(tmp_path: Path, document: str) -> None:
    urls = tmp_path / "00000.parquet"
    pq.write_table(pa.table({"url": ["http://a"]}), urls)
    part = Part("drawn", 0, urls, tmp_path / "00000", 1, 1)
    Record(part, DownloadConfig())
    assert Record(part, DownloadConfig()).rounds == 0
    part.beside(".plan.json").write_bytes(DOCUMENTS[document])
    with pytest.raises(ConfigError, match=r"plan\.json: is damaged \(.*\); remove it"):
        Record(part, DownloadConfig())


# --- tars ------------------------------------------------------------------------------------------------------------


def header(name: str, size: bytes, kind: bytes = b"0", form: bytes = b"ustar\x0000") -> bytes:
    """A header with a right checksum and any size field."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = form
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(content: bytes) -> bytes:
    return header("pax", b"%011o\0" % len(content), b"x") + content + bytes(-len(content) % 512)


NUMBERS = {
    "negative": b"\xff" * 12,
    "huge": b"\x80" + b"\xff" * 11,
    "beyond the end": b"77777777777\0",
    "signed": b"-0000001000\0",
}
EXTENDED = {
    "5,000 digits": pax(b"5016 size=" + b"1" * 5_005 + b"\n"),
    "a length of 5,000 digits": pax(b"9" * 5_000 + b" size=1\n"),
    "no length": pax(b" size=1\n" * 10),
    "a million bytes of records": pax(b"5 a=\n" * 200_000),
    "one of 100 MB": header("pax", b"%011o\0" % 100_000_000, b"x"),
    "a thousand in a row": pax(b"8 a=bcd\n") * 1_000,
}


@pytest.mark.parametrize("case", [*NUMBERS, *EXTENDED])
def test_a_tar_with_odd_numbers_costs_the_samples_that_have_them(tmp_path: Path, case: str) -> None:
    whole = write_tar(tmp_path / "whole.tar", [("a.jpg", J), ("a.txt", b"a")]).read_bytes()
    odd = header("b.jpg", NUMBERS[case]) + J + bytes(-len(J) % 512) if case in NUMBERS else EXTENDED[case]
    path = tmp_path / "odd.tar"
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    fixed = io.BytesIO()
    with tarfile.open(fileobj=fixed, mode="w") as tar:
        for name, content in (("c.jpg", J), ("c.txt", b"c")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(whole[:end] + odd + fixed.getvalue())
    keys = read_shard(path, "own", own=True).samples["key"].to_pylist()
    # Records without a fault change nothing; all others cost what they describe.
    assert keys in (["a"], ["a", "c"])
    if case not in ("a million bytes of records", "a thousand in a row"):
        with pytest.raises(ShardError, match=r"odd\.tar: "):
            read_shard(path, "drawn")
    if case in NUMBERS:
        assert keys == ["a", "c"]
    seen = []
    with path.open("rb") as file, suppress(CutError):
        seen += [each.key for each in streamed(file, None, Counter())]
    assert seen in ([], ["a", "c"])
    with pytest.raises(ValueError, match=r"."):
        shards.samples(write_bytes(tmp_path / "count.tar", header("b.jpg", b"-0000001000\0")))


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_tiny_records_are_read_in_one_pass() -> None:
    """Twice the records look at twice the bytes: a copy of the rest for each record would be four times as much."""

    class Counted(bytes):
        copied = 0

        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            found = super().__getitem__(key)
            Counted.copied += len(found) if isinstance(found, bytes) else 1
            return found

    from data_pipeline.index.tar_members import _pax

    copied = []
    for count in (20_000, 40_000):
        Counted.copied = 0
        assert _pax(Counted(b"5 a=\n" * count + b"8 path=b\n".replace(b"8", b"9")), 0) == {"path": "b"}
        copied.append(Counted.copied)
    assert copied[1] < 2.1 * copied[0]


# --- manifests -------------------------------------------------------------------------------------------------------


def column(name: str, values: Callable[[list[object]], list[object]], kind: pa.DataType | None = None):  # type: ignore[no-untyped-def]
    def change(table: pa.Table) -> pa.Table:
        field = table.schema.get_field_index(name)
        made = pa.array(values(table[name].to_pylist()), kind or table.schema.field(name).type)
        return table.set_column(field, name, made)

    return change


MANIFESTS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "null paths": column("path", lambda values: [None] * len(values)),
    "texts for numbers": column("bytes", lambda values: ["many"] * len(values), pa.string()),
    "numbers for lists": column("sides", lambda values: [1] * len(values), pa.int32()),
    "negative samples": column("samples", lambda values: [-1] * len(values)),
    "more samples than rows": column("samples", lambda values: [10_000] * len(values)),
    "a row group too many": column("row_group", lambda values: [99] * len(values)),
    "a file elsewhere": column("samples_file", lambda values: ["/etc/passwd"] * len(values)),
    "reasons that are no JSON": column("broken", lambda values: ["[" * 100_000] * len(values)),
    "counts without sides": column("sides", lambda values: [[]] * len(values)),
    "rows left out that are not there": column("left_out", lambda values: [[-4]] * len(values)),
    "not UTF-8": column("path", lambda values: [b"\xff\xfe"] * len(values), pa.binary()),
    "no columns": lambda table: table.select(["path"]),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_damaged_list_of_shards_is_one_line(world: World, case: str) -> None:
    file = world / "manifest" / SHARDS_FILE
    pq.write_table(MANIFESTS[case](pq.read_table(file)), file)
    status, said = world.type("python", "-m", "data_pipeline", "inspect", *DATA, "data.inspect.output=FOLDER/a.png")
    assert status == 2
    assert "data.manifest=" in one_line(said)


ROWS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "huge offsets": column("offset", lambda values: [2**62] * len(values)),
    "negative sizes": column("size", lambda values: [-1] * len(values)),
    "null captions": column("caption", lambda values: [None] * len(values)),
    "no orientation": column("orientation", lambda values: [77] * len(values)),
    "texts for offsets": column("offset", lambda values: ["x"] * len(values), pa.string()),
    "fewer rows": lambda table: table.slice(1),
    "no captions": lambda table: table.drop_columns(["caption"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_damaged_list_of_samples_is_one_line(world: World, case: str) -> None:
    for file in (world / "manifest").glob("samples-*.parquet"):
        with pq.ParquetFile(file) as old:
            groups = [ROWS[case](old.read_row_group(number)) for number in range(old.num_row_groups)]
        with pq.ParquetWriter(file, groups[0].schema) as writer:
            for group in groups:
                writer.write_table(group)
    status, said = world.type("python", "-m", "data_pipeline", "inspect", *DATA, "data.inspect.output=FOLDER/a.png")
    assert status == 2
    assert "samples-" in one_line(said)


READERS = {
    "inspect": ["python", "-m", "data_pipeline", "inspect", *DATA, "data.inspect.output=FOLDER/a.png"],
    "index": INDEX,
    "latents": LATENTS,
    "train": ["vdtrain", "train", "stage=stage1_single_flow", *TRAIN, "run_dir=FOLDER/run"],
}


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(("file", "name"), [(SHARDS_FILE, b"sha256"), ("samples-00000.parquet", b"caption")])
def test_names_of_columns_that_are_not_utf8_are_one_line(world: World, file: str, name: bytes, command: str) -> None:
    """pyarrow raises a UnicodeDecodeError there, which is not one of its own errors."""
    damaged = world / "manifest" / file
    damaged.write_bytes(damaged.read_bytes().replace(name, name[:-1] + b"\xbb"))
    status, said = world.type(*READERS[command])
    if (command, file) == ("index", "samples-00000.parquet"):
        # The index reads the shards of a damaged file of samples anew.
        assert (status, "Traceback" in said) == (0, False), said
        return
    # Trouble with data ends a run by 1, mistakes in settings end a command by 2.
    assert status == (1 if command == "train" else 2), said
    assert f"{file} " in one_line(said)
    assert "move the folder" in said


@pytest.mark.parametrize("setting", ["pack", "data.select.block_lists.url"])
def test_a_parquet_file_that_is_not_utf8_is_not_to_be_converted(world: World, setting: str) -> None:
    """`iconv` would damage it further."""
    table = pa.table(
        {"image": ["a.jpg"], "caption": ["a"]} if setting == "pack" else {"address": ["http://a.org/b.jpg"]}
    )
    file = world / "table.parquet"
    pq.write_table(table, file)
    for name in (b"caption", b"address"):
        file.write_bytes(file.read_bytes().replace(name, name[:-1] + b"\xbb"))
    words = ["pack", "FOLDER/table.parquet", "data.pack.output=FOLDER/packed"]
    if setting != "pack":
        rows = {"url": ["http://a.org/c.jpg"], "caption": ["a"]}
        pq.write_table(pa.table(rows), world / "rows.parquet")
        sources = [f"data.sources.{name}.metadata=FOLDER/rows.parquet" for name in ("laion2b_en", "coyo700m")]
        sources += [f"data.sources.{name}.selected=FOLDER/selected/{name}" for name in ("laion2b_en", "coyo700m")]
        words = ["select", *sources, f"{setting}=[FOLDER/table.parquet]"]
    status, said = world.type("python", "-m", "data_pipeline", *words)
    assert status == 2, said
    assert re.search(r"table\.parquet:? cannot be read \(.*can't decode.*\); give another file$", one_line(said)), said


# --- weights and pictures --------------------------------------------------------------------------------------------


def zipped(change: Callable[[bytearray], object]) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, file)
    content = bytearray(file.getvalue())
    change(content)
    return bytes(content)


def archive(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in members:
            made.writestr(name, content)
    return file.getvalue()


DIRECTORY = b"PK\1\2"
BOMB = b"\x80\x02" + b"}" + b"r" + struct.pack("<I", 0x7FFFFFFF) + b"."
NESTED = b"\x80\x02)" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
ZIPS = {
    "cut directory": zipped(lambda content: content.__delitem__(slice(content.index(DIRECTORY) + 20, -22))),
    "directory elsewhere": zipped(lambda content: content.__setitem__(slice(-6, -2), b"\xff\xff\xff\x7f")),
    "sizes beyond the file": zipped(
        lambda content: content.__setitem__(
            slice(content.index(DIRECTORY) + 20, content.index(DIRECTORY) + 28), b"\xf0\xff\xff\x7f" * 2
        )
    ),
    "a zero directory": zipped(
        lambda content: content.__setitem__(slice(content.index(DIRECTORY), -22), bytes(len(content)))
    ),
    "an empty archive": b"PK\5\6" + bytes(18),
    "two magic bytes": b"PK",
    "other files": archive(("a.txt", b"a")),
    "a pickle that is none": archive(("archive/data.pkl", b"\xff" * 50), ("archive/version", b"3\n")),
    "a pickle of 2^31 entries": archive(("archive/data.pkl", BOMB), ("archive/version", b"3\n")),
    "a key of 2^60 parts": archive(
        ("archive/data.pkl", b"\x80\x02}" + NESTED[2:] + b"Ns."), ("archive/version", b"3\n")
    ),
}


@pytest.mark.parametrize("case", ZIPS)
def test_a_broken_archive_of_weights_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    from vdtrain.cli import main

    for suffix in (".pth", ".zip"):
        file = write_bytes(tmp_path / f"weights{suffix}", ZIPS[case])
        words = ["weights", "import", "versatile_diffusion", str(file), f"output={tmp_path}/out", "model=tiny"]
        assert main(words) == 2
        line = one_line(capsys.readouterr().err)
        assert file.name in line


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def picture(form: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, form)
    return file.getvalue()


PICTURES = {
    "empty": b"",
    "text": b"a red circle\n",
    "not UTF-8": b"\xff\xfe\xfd" * 100,
    "cut JPEG": picture("JPEG")[:-200],
    "header of a JPEG": b"\xff\xd8\xff\xe0",
    "cut PNG": picture("PNG")[:-100],
    "cut WebP": picture("WEBP")[:-50],
    "cut GIF": picture("GIF")[:100],
    "huge PNG": png((b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)), (b"IEND", b"")),
    "PNG without data": png((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)), (b"IEND", b"")),
    "PNG of size 0": png((b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)), (b"IEND", b"")),
    "an EPS program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "bad EXIF": picture("JPEG")[:2]
    + b"\xff\xe1\x00\x20Exif\0\0MM\0*\xff\xff\xff\xff"
    + bytes(12)
    + picture("JPEG")[2:-900],
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_broken_picture_is_one_line(world: World, case: str) -> None:
    write_bytes(world / "broken.png", PICTURES[case])
    out = ["output_dir=FOLDER/out"]
    for words in (
        ["vdtrain", "sample", *SAMPLER, "flow=image-to-image", "inputs=[FOLDER/broken.png]", *out],
        ["vdtrain", "sample", *SAMPLER, "inputs=[a]", "start_from=[FOLDER/broken.png]", *out],
        ["vdtrain", "blend", *SAMPLER, "contexts=[{image: FOLDER/broken.png}]", *out],
        ["vdtrain", "blend", *SAMPLER, "contexts=[{image: FOLDER/image.png, mask: FOLDER/broken.png}]", *out],
        ["vdtrain", "edit", *SAMPLER, "inputs=[FOLDER/broken.png]", "add=a", *out],
    ):
        status, said = world.type(*words)
        assert status == 2, (words, said)
        assert "broken.png" in one_line(said)


def test_members_of_the_reader_know_their_bounds(tmp_path: Path) -> None:
    """Damage that follows whole members loses none of them."""
    whole = write_tar(tmp_path / "whole.tar", [(f"{key}.jpg", J) for key in "abc"])
    with whole.open("rb") as file:
        assert [member.name for member in TarMembers(file, whole.stat().st_size)] == ["a.jpg", "b.jpg", "c.jpg"]
