"""Published metadata to the rows that are worth their download, streaming, in memory that does not grow with the rows.

1. Scan: every unit of row groups is filtered; what is kept leaves one bit per row, and hashes of URLs and images.
2. Duplicates: bucket by bucket of the hashes, first of URLs, then of images among what is left. The first row stays,
   in the order of the sources in the configuration, of their files by name, and of the rows.
3. Parts: the metadata is read again, and the kept pairs are written with cleaned captions and a name each.

What a finished step leaves in `data.select.scratch` is used again after an interruption.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.select.duplicates import (
    HashFiles,
    bucket_bits,
    clear_bits,
    count_bits,
    read_block_lists,
    repeated_rows,
)
from data_pipeline.select.filters import DUPLICATE_IMAGE, DUPLICATE_URL, check_filters
from data_pipeline.select.parts import Parts, plan_parts, write_parts
from data_pipeline.select.selection import (
    Selection,
    changed_settings,
    fingerprint,
    plans,
    read_selection,
    write_selection,
)
from data_pipeline.select.sources import find_columns, metadata_files, schema_of
from data_pipeline.select.units import BATCH_ROWS, UNIT_ROWS, Scan, Unit, clear, locked, prepare, scan, units_of
from data_pipeline.workers import Run, workers
from vdtrain.config.compose import ConfigError
from vdtrain.config.data_schema import DataConfig


def select(data: DataConfig, batch_rows: int = BATCH_ROWS, unit_rows: int = UNIT_ROWS) -> dict[str, Selection]:
    """Select the rows of every source; nothing is done where it has been done by the same plan.

    Args:
        batch_rows: rows that are read at a time.
        unit_rows: rows that a process takes at a time, in whole row groups.

    Returns:
        What was made of each source.

    Raises:
        ConfigError: an impossible setting, metadata that is missing or of another schema, another plan than that which
            shards were made by, or another run at work.
    """
    _check(data)
    planned = plans(data)
    scratch = Path(data.select.scratch)
    with locked(scratch) as lock:
        earlier = {name: read_selection(Path(source.selected)) for name, source in data.sources.items()}
        wanted = _outdated(data, planned, earlier)
        if wanted:
            prepare(data, planned, wanted, scratch, unit_rows)
            with workers(data.select.processes, "data.select.processes", lock) as run:
                _select(data, planned, wanted, scratch, run, batch_rows, unit_rows)
        clear(scratch)
    selections = {name: read_selection(Path(source.selected)) for name, source in data.sources.items()}
    for name, selection in selections.items():
        assert selection is not None
        print("\n".join([f"{name}: {selection.text()[0]}", *selection.text()[1:]]))
    return {name: selection for name, selection in selections.items() if selection is not None}


def _check(data: DataConfig) -> None:
    check_filters(data.select.filters)
    rows, samples = data.select.rows_per_part, data.download.samples_per_shard
    if rows % samples:
        raise ConfigError(
            f"data.select.rows_per_part={rows}: must be a multiple of data.download.samples_per_shard={samples}"
        )
    folders = {name: Path(source.selected).resolve() for name, source in data.sources.items()}
    metadata = {Path(source.metadata).resolve() for source in data.sources.values()}
    for name, source in data.sources.items():
        schema_of(f"data.sources.{name}", source.schema)
        if folders[name] in metadata or list(folders.values()).count(folders[name]) > 1:
            raise ConfigError(
                f"data.sources.{name}.selected={source.selected}: taken already; give it a folder of its own"
            )


def _outdated(
    data: DataConfig, planned: Mapping[str, Mapping[str, Any]], earlier: Mapping[str, Selection | None]
) -> list[str]:
    """Sources whose rows have to be selected.

    Raises:
        ConfigError: shards were made of rows that another plan selected.
    """
    wanted = []
    for name, source in data.sources.items():
        selection = earlier[name]
        same = selection is not None and selection.fingerprint == fingerprint(planned[name])
        if same and selection is not None and all(file.exists() for file in selection.files(Path(source.selected))):
            continue
        wanted.append(name)
        shards = Path(source.shards)
        if selection is not None and not same and shards.is_dir() and any(shards.iterdir()):
            changed = ", ".join(changed_settings(selection.plan, planned[name]))
            raise ConfigError(
                f"{changed}: changed since shards were made of what was selected; change it back, or remove {shards} "
                f"and {source.selected} to begin anew"
            )
    return wanted


def _select(
    data: DataConfig,
    planned: Mapping[str, dict[str, Any]],
    wanted: Sequence[str],
    scratch: Path,
    run: Run,
    batch_rows: int,
    unit_rows: int,
) -> None:
    units = _units(data, unit_rows)
    rows = sum(unit.rows for unit in units)
    with _timed("scan", rows):
        kept = _scan(data, units, scratch, run, batch_rows)
    by_step = [_counts(units, kept)]
    for kind, choice in (
        ("url", data.select.filters.duplicate_urls),
        ("phash", data.select.filters.duplicate_images),
    ):
        if choice == "drop":
            with _timed(f"duplicates ({kind})", sum(by_step[-1])):
                _drop_repeated(kept, units, kind, scratch, run)
        by_step.append(_counts(units, kept))
    file = scratch / "kept.npy"
    np.save(file, kept)
    places = {name: [place for place, unit in enumerate(units) if unit.source == name] for name in wanted}
    tasks: list[Parts] = []
    for name in wanted:
        own = [units[place] for place in places[name]]
        tasks += _parts(data, name, own, [by_step[-1][place] for place in places[name]], file, batch_rows)
    with _timed("parts", sum(by_step[-1])):
        for _ in run(write_parts, tasks, "parts"):
            pass
    for name in wanted:
        own = [units[place] for place in places[name]]
        steps = [sum(step[place] for place in places[name]) for step in by_step]
        write_selection(Path(data.sources[name].selected), _selection(planned[name], own, steps, scratch))


def _units(data: DataConfig, unit_rows: int) -> list[Unit]:
    units: list[Unit] = []
    for name, source in data.sources.items():
        setting = f"data.sources.{name}"
        for file in metadata_files(f"{setting}.metadata", source.metadata):
            columns = find_columns(setting, source.schema, file)
            # On whole bytes of the bits.
            base = -(-(units[-1].base + units[-1].rows) // 8) * 8 if units else 0
            units += units_of(name, file, columns, len(units), base, unit_rows)
    return units


def _scan(data: DataConfig, units: Sequence[Unit], scratch: Path, run: Run, batch_rows: int) -> np.ndarray:
    """One bit per row, packed: whether the filters keep it."""
    read_block_lists(data.select.block_lists, data.sources).save(scratch / "block_lists")
    schemas = {name: schema_of(f"data.sources.{name}", source.schema) for name, source in data.sources.items()}
    bits = bucket_bits(sum(unit.rows for unit in units))
    tasks = [
        Scan(unit, schemas[unit.source], data.select.filters, data.allow_loopback, scratch, bits, batch_rows)
        for unit in units
    ]
    kept = np.zeros(-(-(units[-1].base + units[-1].rows) // 8) if units else 0, np.uint8)
    for unit, folder in zip(units, run(scan, tasks, "scan"), strict=True):
        kept[unit.bytes] = np.load(folder / "kept.npy")
    return kept


def _counts(units: Sequence[Unit], kept: np.ndarray) -> list[int]:
    """Kept rows of each unit."""
    return [count_bits(kept[unit.bytes]) for unit in units]


def _drop_repeated(kept: np.ndarray, units: Sequence[Unit], kind: str, scratch: Path, run: Run) -> None:
    """Clear the bits of rows whose URL or image an earlier row has."""
    alive = scratch / f"alive_{kind}.npy"
    np.save(alive, kept)
    files = [HashFiles(unit.folder(scratch), unit.base) for unit in units]
    buckets = range(1 << bucket_bits(sum(unit.rows for unit in units)))
    for rows in run(partial(_repeated, files, kind, alive), buckets, f"duplicates ({kind})"):
        clear_bits(kept, rows)


def _repeated(files: Sequence[HashFiles], kind: str, alive: Path, bucket: int) -> np.ndarray:
    return repeated_rows(files, kind, bucket, np.load(alive, mmap_mode="r"))


def _parts(
    data: DataConfig, name: str, units: Sequence[Unit], kept_rows: Sequence[int], kept: Path, batch_rows: int
) -> list[Parts]:
    """The tasks of writing a source's parts, which have the columns that any of its files has."""
    source = data.sources[name]
    present = {column for unit in units for column in unit.columns.kept}
    columns = [column for column in schema_of(name, source.schema).columns if column.name in present]
    setting = f"data.sources.{name}.selected={source.selected}"
    folder, rows = Path(source.selected), data.select.rows_per_part
    return [
        Parts(tuple(units[place:]), tuple(columns), folder, setting, first, count, skip, rows, kept, batch_rows)
        for place, first, count, skip in plan_parts(kept_rows, rows)
    ]


def _selection(plan: dict[str, Any], units: Sequence[Unit], steps: Sequence[int], scratch: Path) -> Selection:
    """The record of a source. `steps`: rows that are left after the scan, without repeated URLs, without images."""
    scans = [json.loads((unit.folder(scratch) / "counts.json").read_text(encoding="utf-8")) for unit in units]
    dropped: Counter[str] = Counter()
    unscored: Counter[str] = Counter()
    for each in scans:
        dropped.update(each["dropped"])
        unscored.update(each["unscored"])
    dropped[DUPLICATE_URL] = steps[0] - steps[1]
    dropped[DUPLICATE_IMAGE] = steps[1] - steps[2]
    rows_per_part = int(plan["data.select.rows_per_part"])
    return Selection(
        fingerprint=fingerprint(plan),
        plan=plan,
        read=sum(unit.rows for unit in units),
        rows=steps[2],
        parts=-(-steps[2] // rows_per_part),
        rows_per_part=rows_per_part,
        counts={reason: count for reason, count in dropped.most_common() if count},
        unscored=dict(unscored.most_common()),
    )


@contextmanager
def _timed(step: str, rows: int) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{step}: {rows:,} rows in {time.monotonic() - began:,.1f} s", flush=True)
