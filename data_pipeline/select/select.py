"""Published metadata to the rows that are worth downloading, in memory that does not grow with the rows.

1. Scan: processes filter the metadata files. They write the rows that pass to `data.select.scratch`.
2. Duplicates: DuckDB finds the first row of every URL, and of every image among those. The order is that of the sources
   in the configuration, of their files by name, and of the rows.
3. Parts: processes write these rows in files of `data.select.rows_per_part` rows. `selection.json` is written last.

A select that is stopped starts again from the beginning.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.select.block_lists import read_block_lists
from data_pipeline.select.filters import DUPLICATE_IMAGE, DUPLICATE_URL, check_filters
from data_pipeline.select.scan import Part, RowCounts, Scan, Scratch, find_first_rows, scan, write_part
from data_pipeline.select.selection import (
    Selection,
    begin_selections,
    changed_settings,
    fingerprint,
    made_folders,
    part_file,
    plans,
    read_selection,
    write_selection,
)
from data_pipeline.select.sources import Source, check_columns, open_sources
from data_pipeline.workers import Run, workers
from vdtrain.config.data_schema import DataConfig
from vdtrain.config.fields import check_values
from vdtrain.errors import ConfigError

BATCH_ROWS = 1 << 16


def select(data: DataConfig, batch_rows: int = BATCH_ROWS) -> dict[str, Selection]:
    """Select the rows of every source whose selection is missing or was made by another plan; returns all selections.

    Raises:
        ConfigError: a setting is impossible, metadata is missing or damaged, shards were made by another plan, or
            another select is at work.
    """
    _check(data)
    planned = plans(data)
    scratch = Scratch(data.select.scratch)
    with scratch.opened():
        if wanted := _outdated(data, planned):
            _select(data, {name: planned[name] for name in wanted}, scratch, batch_rows)
    selections: dict[str, Selection] = {}
    for name, source in data.sources.items():
        selection = read_selection(Path(source.selected))
        assert selection is not None
        print(f"{name}: {selection.text()}")
        selections[name] = selection
    return selections


def _check(data: DataConfig) -> None:
    check_values(data.select, "data.select.")
    check_filters(data.select.filters)
    rows, samples = data.select.rows_per_part, data.download.samples_per_shard
    if rows % samples:
        raise ConfigError(
            f"data.select.rows_per_part={rows}: must be a multiple of data.download.samples_per_shard={samples}"
        )
    folders = {name: Path(source.selected).resolve() for name, source in data.sources.items()}
    metadata = {Path(source.metadata).resolve() for source in data.sources.values()}
    for name, source in data.sources.items():
        check_columns(f"data.sources.{name}", source)
        if folders[name] in metadata or list(folders.values()).count(folders[name]) > 1:
            raise ConfigError(
                f"data.sources.{name}.selected={source.selected}: taken already; give it a folder of its own"
            )


def _outdated(data: DataConfig, planned: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The sources whose rows must be selected; a ConfigError if shards were made of rows of another plan."""
    wanted = []
    for name, source in data.sources.items():
        folder, shards = Path(source.selected), Path(source.shards)
        selection = read_selection(folder)
        same = selection is not None and selection.fingerprint == fingerprint(planned[name])
        if selection and same and all(file.exists() for file in selection.files(folder)):
            continue
        wanted.append(name)
        if selection and not same and shards.is_dir() and any(shards.iterdir()):
            changed = ", ".join(changed_settings(selection.plan, planned[name]))
            raise ConfigError(
                f"{changed}: changed since shards were made of the selected rows; change it back, or remove {shards} "
                f"and {source.selected} to start again"
            )
    return wanted


def _select(data: DataConfig, wanted: Mapping[str, dict[str, Any]], scratch: Scratch, batch_rows: int) -> None:
    """Select the rows of all sources, and write those of the sources whose plans are given."""
    sources = open_sources(data.sources, made_folders(data))
    blocked = read_block_lists(data.select.block_lists, data.sources)
    begin_selections({_setting(data, name): Path(data.sources[name].selected) for name in wanted})
    blocked.save(scratch.block_lists)
    with workers(data.select.processes, "data.select.processes", scratch.lock) as run:
        with _timed("scan"):
            counts = _scan(data, sources, scratch, run, batch_rows)
        with _timed("duplicates"):
            left = find_first_rows(scratch, sources, data.select.filters, data.select.processes)
        with _timed("parts"):
            _write_parts(data, wanted, {name: rows for name, (_, rows) in left.items()}, scratch, run)
    for name, plan in wanted.items():
        found, (by_url, by_image) = counts[name], left[name]
        repeated = Counter({DUPLICATE_URL: found.passed - by_url, DUPLICATE_IMAGE: by_url - by_image})
        rows_per_part = data.select.rows_per_part
        selection = Selection(
            fingerprint=fingerprint(plan),
            plan=plan,
            read=found.read,
            rows=by_image,
            parts=-(-by_image // rows_per_part),
            rows_per_part=rows_per_part,
            counts=dict((found.dropped + repeated).most_common()),
            unscored=dict(found.unscored.most_common()),
        )
        write_selection(Path(data.sources[name].selected), selection)


def _setting(data: DataConfig, name: str) -> str:
    return f"data.sources.{name}.selected={data.sources[name].selected}"


def _scan(
    data: DataConfig, sources: Sequence[Source], scratch: Scratch, run: Run, batch_rows: int
) -> dict[str, RowCounts]:
    """Filter all files; returns the counts of each source."""
    filters, allow_loopback = data.select.filters, data.allow_loopback
    tasks = [
        Scan(file, source.schema, source.columns, filters, allow_loopback, scratch, batch_rows)
        for source in sources
        for file in source.files
    ]
    counts = {source.name: RowCounts() for source in sources}
    for task, found in zip(tasks, run(scan, tasks, "scan"), strict=True):
        counts[task.file.source].add(found)
    return counts


def _write_parts(data: DataConfig, wanted: Container[str], rows: Mapping[str, int], scratch: Scratch, run: Run) -> None:
    """Write the parts of the wanted sources; `rows` tells how many rows of each source are kept."""
    tasks, start, step = [], 0, data.select.rows_per_part
    for name, count in rows.items():
        places = range(start, start + count)
        start += count
        folder = Path(data.sources[name].selected)
        if name in wanted:
            tasks += [
                Part(part_file(folder, number), _setting(data, name), scratch, places[first : first + step])
                for number, first in enumerate(range(0, count, step))
            ]
    for _ in run(write_part, tasks, "parts"):
        pass


@contextmanager
def _timed(step: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{step}: {time.monotonic() - began:,.1f} s", flush=True)
