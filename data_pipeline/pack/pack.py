"""A user's own images and captions to tar shards, written by the webdataset library.

The plan lists all images first, in a fixed order. Shard N holds row group N of the plan, so processes can make shards
side by side, and a later run makes those that are missing.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.pack.folders import folder_entries
from data_pipeline.pack.picture import LeftOutError, prepare, read_caption
from data_pipeline.pack.tables import Entry, LeftOut, coco_document, coco_entries, coco_folder, table_entries
from data_pipeline.workers import alone, workers
from vdtrain.config.command_line import shell
from vdtrain.config.data_schema import DataConfig, PackConfig
from vdtrain.errors import ConfigError, NothingError, missing
from vdtrain.files import written_whole
from vdtrain.progress import Progress, track

PLAN_FILE = "plan.parquet"
# Lines {"key": SHARD/KEY, "captions": [...]} of the images with several captions.
REFERENCES_FILE = "references.jsonl"
# Of a file name that is not UTF-8 the bytes are kept.
PLAN_SCHEMA = pa.schema(
    {"image": pa.binary(), "caption": pa.string(), "caption_file": pa.binary(), "stamp": pa.string()}
)
# Settings that decide which image is in which shard, and how it is stored.
PLAN_SETTINGS = (
    *("image_column", "caption_column", "captions"),
    *("samples_per_shard", "image_size", "encode_quality", "min_image_size", "max_image_pixels"),
)
SETTINGS_KEY = b"data.pack"


@dataclass(frozen=True)
class Shard:
    """The task of making a shard."""

    number: int
    base: Path  # the folder that the plan's paths are relative to
    config: PackConfig

    @property
    def tar(self) -> Path:
        return Path(self.config.output, f"{self.number:06d}.tar")

    @property
    def record(self) -> Path:
        """Its number of samples, and what is left out. It is written last."""
        return self.tar.with_suffix(".json")


def pack(data: DataConfig) -> None:
    """Make the shards that are missing; the number of processes does not change them.

    Raises:
        ConfigError: the input cannot be read, or the shards of another input or other settings are there.
        NothingError: no image could be packed.
    """
    config = data.pack
    if (problem := missing("webdataset")) is not None:
        raise ConfigError(problem)
    if config.input is None:
        raise ConfigError(
            "data.pack.input=null: no images; write `python -m data_pipeline pack FOLDER`, or a table in its place"
        )
    output = Path(config.output)
    lock = output.with_name(output.name + ".lock")
    with alone("pack", lock, f"data.pack.output={output}"):
        _pack(config, output, lock)
    if not config.index:
        words = [f"data.root={data.root}", f"data.shards={output}"]
        print(f"next: {shell(['python', '-m', 'data_pipeline', 'index', 'data=own', *words])}")


def _pack(config: PackConfig, output: Path, lock: Path) -> None:
    left_out = LeftOut()
    base, entries = _find(Path(str(config.input)), config, left_out)
    references = output / REFERENCES_FILE
    with (
        written_whole(references, f"data.pack.output={output}", overwrite=True) as draft,
        draft.open("w", encoding="utf-8") as file,
    ):
        rows = _plan(_with_references(entries, config, file), config, output)
    if not references.stat().st_size:
        references.unlink()
    shards = [Shard(number, base, config) for number in range(-(-rows // config.samples_per_shard))]
    new = [shard for shard in shards if not shard.record.exists()]
    processes = max(1, min(config.processes, len(new)))
    with workers(processes, "data.pack.processes", lock) as run, Progress("pack", rows, "images") as progress:
        progress.skip(config.samples_per_shard * (len(shards) - len(new)))
        for record in run(make_shard, new, ""):
            progress.advance(record["samples"] + len(record["left_out"]))
    samples = 0
    for shard in shards:
        record = json.loads(shard.record.read_text(encoding="utf-8"))
        samples += record["samples"]
        for name, reason in record["left_out"]:
            left_out.add(reason, name)
    if not samples:
        raise NothingError(f"data.pack.input={config.input}: nothing to pack; left out: {left_out}")
    done = f"{len(new):,} of them new" if new else "which are there already: nothing to do"
    print(f"{output}: {samples:,} samples in {len(shards):,} shards, {done}; left out: {left_out}")


def _with_references(entries: Iterator[Entry], config: PackConfig, file: IO[str]) -> Iterator[Entry]:
    """The entries; all captions of those that have several go to a file on the way."""
    for number, entry in enumerate(entries):
        if entry.references:
            key = f"{number // config.samples_per_shard:06d}/{number:09d}"
            file.write(json.dumps({"key": key, "captions": entry.references}, ensure_ascii=False) + "\n")
        yield entry


def _find(source: Path, config: PackConfig, left_out: LeftOut) -> tuple[Path, Iterator[Entry]]:
    """What is to be packed, and the folder that its paths are relative to."""
    if config.table is not None:
        source /= config.table
        if not source.is_file():
            raise ConfigError(
                f"data.pack.table={config.table}: {source} is not there; give the folder that the archives unpack to"
            )
    if source.is_dir():
        return source, folder_entries(source, config, left_out)
    if not source.exists():
        raise ConfigError(f"data.pack.input={source}: no such folder or file; give the images or a table of them")
    if source.suffix.lower() == ".json" and (document := coco_document(source)) is not None:
        folder = coco_folder(source, document, config)
        return folder, coco_entries(document, folder, config, left_out)
    folder = Path(config.images) if config.images is not None else source.parent
    return folder, table_entries(source, folder, folder, config, left_out)


def _plan(entries: Iterator[Entry], config: PackConfig, output: Path) -> int:
    """Write the plan, or compare it with the one that is there; returns its number of images.

    Raises:
        ConfigError: the folder holds shards of another plan, or shards of somebody else.
    """
    plan = output / PLAN_FILE
    begun = any(output.glob("*.tar"))
    if begun and not plan.exists():
        raise ConfigError(f"data.pack.output={output}: has tar files that were not packed here; choose another folder")
    with written_whole(plan, f"data.pack.output={output}", overwrite=True) as draft:
        rows = _write_plan(entries, config, draft)
        difference = _difference(plan, draft) if plan.exists() else None
        if difference is not None:
            if begun and not config.overwrite:
                raise ConfigError(
                    f"{difference} since the shards in {output} were packed; choose another data.pack.output, or "
                    "replace them by data.pack.overwrite=true"
                )
            for record in output.glob("[0-9]" * 6 + ".json"):
                record.unlink()
                record.with_suffix(".tar").unlink(missing_ok=True)
    return rows


def _write_plan(entries: Iterator[Entry], config: PackConfig, draft: Path) -> int:
    """Write entries to a parquet file, a row group for each shard; returns their number."""
    settings = {setting: getattr(config, setting) for setting in PLAN_SETTINGS}
    schema = PLAN_SCHEMA.with_metadata({SETTINGS_KEY: json.dumps(settings).encode()})
    rows = 0
    with pq.ParquetWriter(draft, schema, compression="zstd") as writer:
        waiting = track(entries, "find images", "images")
        while group := list(itertools.islice(waiting, config.samples_per_shard)):
            columns = [
                [os.fsencode(entry.image) for entry in group],
                [entry.caption for entry in group],
                [entry.caption_file and os.fsencode(entry.caption_file) for entry in group],
                [entry.stamp for entry in group],
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=len(group))
            rows += len(group)
    return rows


def _difference(old: Path, new: Path) -> str | None:
    """What differs between two plans: settings, or the first image; None if they are equal."""
    with pq.ParquetFile(old) as before, pq.ParquetFile(new) as after:
        earlier, later = (json.loads(file.schema_arrow.metadata[SETTINGS_KEY]) for file in (before, after))
        if changed := [f"data.pack.{setting}" for setting in PLAN_SETTINGS if earlier.get(setting) != later[setting]]:
            return f"{', '.join(changed)}: changed"
        for group in range(max(before.num_row_groups, after.num_row_groups)):
            tables = [_rows(file, group) for file in (before, after)]
            if tables[0] != tables[1]:
                one = next(a or b for a, b in itertools.zip_longest(*tables) if a != b)
                return f"data.pack.input: changed (first at {os.fsdecode(one['image'])})"
    return None


def _rows(plan: pq.ParquetFile, group: int) -> list[dict[str, Any]]:
    return list(plan.read_row_group(group, use_threads=False).to_pylist()) if group < plan.num_row_groups else []


def make_shard(shard: Shard) -> dict[str, Any]:
    """Make one shard; returns its number of samples, and the reason for each file that is left out.

    Raises:
        ConfigError: it cannot be written.
    """
    import webdataset

    left_out: list[tuple[str, str]] = []
    samples, count = _samples(shard, left_out), 0
    place = f"data.pack.output={shard.config.output}"
    # A shard without a sample has no tar.
    if (first := next(samples, None)) is not None:
        with (
            written_whole(shard.tar, place, overwrite=True) as draft,
            draft.open("wb") as file,
            # Without times the same images give the same bytes.
            webdataset.TarWriter(file, encoder=False, mtime=0) as writer,
        ):
            for sample in itertools.chain([first], samples):
                writer.write(sample)
                count += 1
    record = {"samples": count, "left_out": left_out}
    with written_whole(shard.record, place, overwrite=True) as draft:
        draft.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def _samples(shard: Shard, left_out: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The samples of a shard, as webdataset writes them."""
    with pq.ParquetFile(Path(shard.config.output, PLAN_FILE)) as plan:
        rows = _rows(plan, shard.number)
    for number, row in enumerate(rows, start=shard.number * shard.config.samples_per_shard):
        name = os.fsdecode(row["image"])
        shown = os.fsencode(name).decode("utf-8", "replace")
        try:
            caption = row["caption"]
            if caption is None:
                caption = read_caption(str(shard.base / os.fsdecode(row["caption_file"])))
            picture = prepare(str(shard.base / name), shard.config)
        except LeftOutError as error:
            left_out.append((shown, str(error)))
            continue
        described = {
            "path": shown,
            **dict(zip(("width", "height"), picture.size, strict=True)),
            **dict(zip(("original_width", "original_height"), picture.original, strict=True)),
        }
        yield {
            "__key__": f"{number:09d}",
            "jpg": picture.jpeg,
            "txt": caption.encode(),
            "json": json.dumps(described).encode(),
        }
