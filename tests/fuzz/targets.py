"""What is fuzzed: strategies of inputs as bytes, and functions that read them.

A function returns for a right result, or raises one of `EXPECTED` with a message of one line. Everything else is a
finding: another exception, a message of several lines, more seconds than `SECONDS` or more memory than `MEGABYTES`.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import shards
from data_pipeline.index.shard_reading import ShardError, read_shard
from vdtrain.checkpoint.folder import CHECKPOINTS, INDEX_FILE, CheckpointError, index_checksum, latest_by_sizes
from vdtrain.checkpoint.format import Index
from vdtrain.commands.plan import main as plan
from vdtrain.config.instantiate import check_parts, read_yaml, recorded_model, resolved
from vdtrain.data.decode import DecodeError, decode
from vdtrain.data.latents import LatentDescription, LatentFile, LatentFolder, write_latents
from vdtrain.data.manifest import (
    SAMPLE_SCHEMA,
    SHARD_SCHEMA,
    SHARDS_FILE,
    Manifest,
    ManifestError,
    SamplesWriter,
    read_shards,
    write_shards,
)
from vdtrain.data.shards import StreamError
from vdtrain.data.tar_samples import CutError
from vdtrain.data.tar_samples import samples as streamed
from vdtrain.errors import ConfigError
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.tensor_files import open_tensors

EXPECTED = (
    *(ConfigError, ManifestError, StreamError, CheckpointError, ShardError, DecodeError, CutError, WeightsError),
)


@dataclass(frozen=True)
class Target:
    """Attributes:
    inputs: bytes to read.
    read: raises EXPECTED alone.
    """

    inputs: st.SearchStrategy[bytes]
    read: Callable[[bytes], None]


def damaged(whole: Callable[[], bytes]) -> st.SearchStrategy[bytes]:
    """A whole file with some bytes changed, cut out, doubled or at its end."""
    edit = st.tuples(
        st.sampled_from(["set", "set", "set", "cut", "double", "end", "zero"]),
        st.integers(0, 1 << 20),
        st.one_of(st.binary(max_size=12), st.sampled_from([b"\xff" * 8, b"9" * 12, b"\x80" + b"\xff" * 11, b"-1"])),
    )

    def apply(edits: list[tuple[str, int, bytes]]) -> bytes:
        content = bytearray(whole())
        for kind, at, data in edits:
            at %= len(content) + 1
            if kind == "set":
                content[at : at + len(data)] = data
            elif kind == "cut":
                del content[at : at + len(data)]
            elif kind == "double":
                content[at:at] = content[at : at + 512]
            elif kind == "end":
                del content[at:]
            else:
                content[at : at + 16] = bytes(16)
        return bytes(content)

    return st.lists(edit, max_size=6).map(apply)


# --- tars ------------------------------------------------------------------------------------------------------------


@cache
def picture(form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(file, form)
    return file.getvalue()


def tar(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as made:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return file.getvalue()


@cache
def whole_tar() -> bytes:
    described = json.dumps({"url": "http://a", "exif": '{"Image Orientation": "Rotated 180"}'}).encode()
    return tar([("a.jpg", picture()), ("a.txt", b"a"), ("ü" * 60 + ".png", picture("PNG")), ("b.json", described)])


fields = st.one_of(st.binary(max_size=12), st.integers(0, 1 << 20).map(lambda size: b"%011o\0" % size))


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header with a right checksum, and something behind it."""
    block = bytearray(512)
    name = draw(st.one_of(st.sampled_from([b"a.jpg", b"a.txt", b"b.json", b"pax"]), st.binary(max_size=30)))
    block[: len(name)] = name
    size = draw(fields)
    block[124 : 124 + len(size)] = size
    block[156:157] = draw(st.sampled_from([b"0", b"x", b"g", b"L", b"K", b"X", b"S", b"5", b"1", b"\0"]))
    block[257:265] = draw(st.sampled_from([b"ustar\x0000", b"ustar  \0", bytes(8)]))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    records = st.sampled_from([b"9 size=1\n", b"10 size=-1\n", b"5016 size=" + b"1" * 5_005 + b"\n", b"9 path=a\n"])
    content = draw(st.one_of(st.binary(max_size=40), records, st.just(picture())))
    return bytes(block) + content + bytes(-len(content) % 512)


tars = st.lists(st.one_of(headers(), st.just(whole_tar()[:-1024])), max_size=5).map(b"".join)


def read_tar(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(content)
        for own in (True, False):
            try:
                found = read_shard(path, "drawn", decoded=True, own=own).samples
                for offset, size in zip(found["offset"].to_pylist(), found["size"].to_pylist(), strict=True):
                    assert content[offset : offset + size]
            except ShardError as error:
                check(error)
        try:
            shards.samples(path)
        except ValueError as error:
            check(error)
        for sample in streamed(io.BytesIO(content), None, Counter()):
            try:
                decode(sample.image, 8, (0.5, 0.5), sample.orientation)
            except DecodeError as error:
                check(error)


# --- manifests and latents -------------------------------------------------------------------------------------------


def sample_rows() -> pa.Table:
    row = {"uid": "0" * 32, "shard": "0.tar", "key": "a", "offset": 512, "size": 300, "orientation": 1}
    row |= {"width": 16, "height": 16, "caption": "a"}
    return pa.Table.from_pylist([row, row], SAMPLE_SCHEMA)


def manifest_files(folder: Path) -> dict[str, bytes]:
    writer = SamplesWriter(folder, "samples-00000.parquet")
    row = {"path": "0.tar", "source": "drawn", "bytes": 4096, "modified_ns": 1, "sha256": "0" * 64}
    writer.add({**row, "broken": "{}", "decoded": True}, sample_rows())
    writer.close()
    write_shards(folder, pa.Table.from_pylist(writer.rows, SHARD_SCHEMA))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@cache
def whole_manifest() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return manifest_files(Path(folder))


def numbered(name: str) -> bytes:
    """A file of the manifest as `read_manifest` takes it."""
    return bytes([name == SHARDS_FILE]) + whole_manifest()[name]


values = st.one_of(
    *(st.none(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=5), st.floats(), st.binary(max_size=4)),
    st.lists(st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1)), max_size=3),
)


@st.composite
def odd_tables(draw: st.DrawFn) -> bytes:
    """A file of the manifest with another column, type or number of rows; its first byte tells which file."""
    name = draw(st.sampled_from(sorted(whole_manifest())))
    table = pq.read_table(io.BytesIO(whole_manifest()[name]))
    for _ in range(draw(st.integers(1, 3))):
        column = draw(st.sampled_from(table.column_names))
        place = table.column_names.index(column)
        if draw(st.booleans()) or len(table.column_names) == 1:
            try:
                made = pa.array([draw(values)] * len(table))
            except (pa.ArrowException, OverflowError):
                continue
            table = table.set_column(place, column, made)
        else:
            table = table.remove_column(place)
    file = io.BytesIO()
    try:
        pq.write_table(table.slice(0, draw(st.integers(0, 2))), file)
    except pa.ArrowException:
        return b""
    return bytes([name == SHARDS_FILE]) + file.getvalue()


def read_manifest(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, data in whole_manifest().items():
            (folder / name).write_bytes(content[1:] if (name == SHARDS_FILE) == bool(content[:1] > b"\0") else data)
        (folder / "0.tar").write_bytes(bytes(4096))
        read_shards(folder)
        manifest = Manifest(folder)
        manifest.counts(16)
        _ = manifest.modalities
        for shard in range(len(manifest.paths)):
            rows = manifest.rows(shard)
            for offset, size in zip(rows.offset.tolist(), rows.size.tolist(), strict=True):
                assert 512 <= offset <= offset + size <= manifest.bytes[shard]
            [caption.as_py().encode() for caption in rows.captions]


DESCRIPTION = LatentDescription(16, 16, (2, 2, 2), "vae", "fp32")


@cache
def whole_latents() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path, count = Path(folder) / "a.safetensors", 3
        moments = np.ones((count, 2, 2, 2), np.float16)
        rows = np.arange(3, dtype=np.int32)
        write_latents(path, DESCRIPTION, "0" * 64, rows, 512 * (rows + 1), np.zeros(3, bool), moments)
        return path.read_bytes()


@st.composite
def odd_headers(draw: st.DrawFn, whole: Callable[[], bytes]) -> bytes:
    """A safetensors file whose header tells other types, shapes and places."""
    content = whole()
    size = int.from_bytes(content[:8], "little")
    described = json.loads(content[8 : 8 + size])
    for name in draw(st.lists(st.sampled_from(sorted(described)), max_size=2)):
        if name == "__metadata__":
            continue
        odd = st.one_of(st.integers(-1, 2**63), st.lists(st.integers(0, 2**40), max_size=3), st.text(max_size=3))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        kinds = st.sampled_from(["F32", "F16", "BF16", "U8", "I32", "I64", "F8_E4M3"])
        described[name][key] = draw(kinds if key == "dtype" else odd)
    text = json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_latents(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(content)
        with path.open("rb") as opened:
            file = LatentFile(path, opened.fileno(), DESCRIPTION, "0" * 64, 512 * np.arange(1, 5))
            for row in range(4):
                try:
                    assert file.read(opened.fileno(), row).shape == (2, 2, 2)
                except (StreamError, DecodeError) as error:
                    check(error)


def read_description(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        latents = LatentFolder(folder, 16)
        latents.path.mkdir()
        (latents.path / "latents.json").write_bytes(content)
        latents.description()


# --- checkpoints and weights -----------------------------------------------------------------------------------------

trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
INDEX: dict[str, Any] = {
    "format": 1,
    "step": 3,
    "world_size": 1,
    "zero_stage": 1,
    "precision": "fp32",
    "optimizer_steps": 3,
    "ema_updates": None,
    "trainer": {},
    "groups": [{"group": "g", "numel": 4, "partitions": [[0, 4]], "parameters": []}],
    "files": {"a.safetensors": {"bytes": 1, "sha256": "0"}},
}


@st.composite
def indices(draw: st.DrawFn) -> bytes:
    """checkpoint.json of another shape, with a right checksum."""
    content = json.loads(json.dumps(INDEX))
    for key in draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=3)):
        content[key] = draw(st.one_of(trees, st.dictionaries(st.sampled_from(["a", "../b", "g"]), trees, max_size=2)))
    return json.dumps({"sha256": index_checksum(content), "checkpoint": content}).encode()


def read_checkpoint(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / CHECKPOINTS / "step-000000003"
        folder.mkdir(parents=True)
        (folder / INDEX_FILE).write_bytes(content)
        (folder / "a.safetensors").write_bytes(b"a")
        for line in latest_by_sizes(folder.parent)[1]:
            assert "\n" not in line
        Index.read(folder)


@cache
def whole_weights(form: str) -> bytes:
    from safetensors.torch import save

    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.int64)}
    if form == "safetensors":
        return save(tensors)
    file = io.BytesIO()
    torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


pickles = st.lists(
    st.one_of(
        st.sampled_from(
            [b"\x80\x02", b"}", b"]", b")", b"(", b"t", b"u", b"s", b"R", b"b", b"\x81", b"d", b"\x90", b"."]
        ),
        st.sampled_from([b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cx\ny\n"]),
        st.integers(0, 2**32 - 1).map(lambda place: b"r" + place.to_bytes(4, "little")),
        st.integers(0, 255).map(lambda place: b"h" + bytes([place])),
        st.sampled_from([b"\x8a\xff", b"\x96" + b"\0\0\0\0\x04\0\0\0", b"X\x01\0\0\0a", b"K\x05", b"\x86", b"Q", b"N"]),
        st.binary(max_size=3),
    ),
    max_size=30,
).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")


def zipped(pickle: bytes) -> bytes:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", pickle)
        made.writestr("archive/version", b"3\n")
    return file.getvalue()


def read_weights(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        path.write_bytes(content)
        tensors = open_tensors(path, "weights")
        for name in tensors:
            try:
                assert tensors[name].shape == tensors.entries[name].shape
            except WeightsError as error:
                check(error)
        index = Path(folder) / "model.safetensors.index.json"
        index.write_bytes(content)


def read_weights_index(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.safetensors").write_bytes(whole_weights("safetensors"))
        path = Path(folder) / "model.safetensors.index.json"
        path.write_bytes(content)
        open_tensors(path, "weights")


# --- configuration ---------------------------------------------------------------------------------------------------

KEYS = ("seed", "batch_size", "model", "data.root", "phases", "stage", "run_dir", "tracking", "nothing", "flows")
TEXTS = ("[", "]", "{", "}", "${", "${a}", "'", '"', "\\", ",", ":", "=", "1e999", "null", "???", "!!int", "9" * 5_000)
words = st.lists(
    st.one_of(
        st.builds(
            "{}{}={}".format,
            st.sampled_from(["", "+", "++", "~"]),
            st.sampled_from(KEYS),
            st.lists(st.one_of(st.sampled_from(TEXTS), st.text(max_size=6)), max_size=5).map("".join),
        ),
        st.text(max_size=12),
    ),
    max_size=3,
).map(lambda given: "\0".join(word.replace("\0", "") for word in given).encode("utf-8", "surrogatepass"))


def read_words(content: bytes) -> None:
    """The command line of a command that only prints its configuration."""
    given = content.decode("utf-8", "surrogateescape").split("\0")
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = plan([*given, "--cfg", "job"])
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("warning: ")]
    assert (status, len(lines)) in ((0, 0), (2, 1)), said.getvalue()


documents = st.one_of(
    trees.map(lambda tree: yaml.safe_dump(tree).encode()),
    trees.map(lambda tree: yaml.safe_dump({"modalities": {"image": tree}, "width": tree}).encode()),
    st.lists(
        st.sampled_from(
            [
                *(
                    b"a: ",
                    b"- ",
                    b"\n",
                    b"  ",
                    b"[",
                    b"]",
                    b"{",
                    b"}",
                    b"? ",
                    b"&a ",
                    b"*a",
                    b"<<: ",
                    b"!!int ",
                    b"!!bool ",
                ),
                *(
                    b"!!timestamp ",
                    b"!!float ",
                    b"!!binary ",
                    b"!!set ",
                    b"!!omap ",
                    b"!!python/name:os.system ",
                    b"1:0" * 90,
                ),
                *(
                    b"${a}",
                    b"${oc.env:HOME}",
                    b"modalities: ",
                    b"_target_: ",
                    b"x",
                    b"0x1",
                    b"2001-99-99",
                    b"\xff",
                    b"'",
                ),
            ]
        ),
        max_size=25,
    ).map(b"".join),
)


def read_document(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.yaml"
        path.write_bytes(content)
        try:
            found = resolved(read_yaml(path))
            model = recorded_model(found)
        except ValueError as error:
            check(error)
            return
        check_parts(model, [], "checkpoint=x")


TARGETS = {
    "tar": Target(
        st.one_of(
            damaged(whole_tar), st.lists(st.one_of(headers(), st.just(whole_tar()[:-1024])), max_size=5).map(b"".join)
        ),
        read_tar,
    ),
    "manifest": Target(
        st.one_of(
            odd_tables(),
            *(
                damaged(lambda name=name: bytes([name == SHARDS_FILE]) + whole_manifest()[name])
                for name in whole_manifest()
            ),
        ),
        read_manifest,
    ),
    "latents": Target(st.one_of(damaged(whole_latents), odd_headers(whole_latents)), read_latents),
    "description": Target(
        st.one_of(
            st.dictionaries(
                st.sampled_from(["layout", "resolution", "min_side", "shape", "vae", "precision"]), trees
            ).map(lambda given: json.dumps({**DESCRIPTION.to_dict(), **given}).encode()),
            damaged(lambda: json.dumps(DESCRIPTION.to_dict()).encode()),
        ),
        read_description,
    ),
    "checkpoint": Target(st.one_of(indices(), trees.map(lambda tree: json.dumps(tree).encode())), read_checkpoint),
    "weights": Target(
        st.one_of(
            *(damaged(lambda form=form: whole_weights(form)) for form in ("safetensors", "zip", "legacy")),
            odd_headers(lambda: whole_weights("safetensors")),
            *(pickles, pickles.map(zipped)),
        ),
        read_weights,
    ),
    "weights-index": Target(
        st.one_of(trees, trees.map(lambda tree: {"weight_map": {"a": tree}})).map(
            lambda tree: json.dumps(tree).encode()
        ),
        read_weights_index,
    ),
    "configuration": Target(words, read_words),
    "model": Target(documents, read_document),
}


def check(error: BaseException) -> None:
    """The message of an expected error is one line."""
    assert "\n" not in str(error).strip(), repr(str(error))
    assert len(str(error)) < 5_000, f"a message of {len(str(error))} characters"
