"""Lists of URLs and of hashes that must not be downloaded, as sorted 64-bit hashes that all processes share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.duplicates import hash_values
from data_pipeline.sources import schema_of
from vdtrain.compose import ConfigError
from vdtrain.data_config import BlockListConfig, SourceConfig
from vdtrain.system_errors import not_utf8, unreadable

BATCH_LINES = 1 << 16
HASHES = ("hash", "md5", "phash")


@dataclass
class BlockLists:
    """Sorted hashes (uint64) of blocked URLs, and of blocked values by role: hash, md5 or phash."""

    urls: np.ndarray | None = None
    hashes: dict[str, np.ndarray] = field(default_factory=dict)

    def has_urls(self, urls: pa.Array) -> np.ndarray:
        """Whether each of some URLs is blocked, as booleans."""
        assert self.urls is not None
        return _contained(self.urls, hash_values(urls))

    def has_hashes(self, role: str, values: pa.Array) -> np.ndarray:
        """Whether each value of a role's column is blocked, as booleans; a null is not."""
        present = values.is_valid().to_numpy(zero_copy_only=False)
        blocked = np.zeros(len(values), bool)
        blocked[present] = _contained(self.hashes[role], hash_values(_normal(values.drop_null())))
        return blocked

    def save(self, folder: Path) -> None:
        """Write the lists to a folder that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.urls is not None:
            np.save(folder / "url.npy", self.urls)
        for name, values in self.hashes.items():
            np.save(folder / f"{name}.npy", values)

    @classmethod
    def load(cls, folder: Path) -> BlockLists:
        """Lists in memory that all processes of a machine share."""
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
        return cls(arrays.pop("url", None), arrays)


def read_block_lists(config: BlockListConfig, sources: Mapping[str, SourceConfig]) -> BlockLists:
    """Read the files that a configuration names.

    Raises:
        ConfigError: a file cannot be read or is empty, or no source has the column that a list is for.
    """
    lists = {role: files for role in HASHES if (files := getattr(config, role))}
    known = {role for name, source in sources.items() for role in schema_of(name, source.schema).roles}
    for role in lists:
        if role not in known:
            raise ConfigError(
                f"data.select.block_lists.{role}: no source has such a column; leave the list out, or add one that has"
            )
    setting = "data.select.block_lists"
    urls = _read(f"{setting}.url", config.url) if config.url else None
    return BlockLists(urls, {role: _read(f"{setting}.{role}", files) for role, files in lists.items()})


def _read(setting: str, files: Sequence[str]) -> np.ndarray:
    pieces = []
    for name in files:
        count = 0
        try:
            for values in _entries(setting, Path(name)):
                pieces.append(hash_values(values if setting.endswith(".url") else _normal(values)))
                count += len(values)
        except OSError as error:
            raise ConfigError(f"{setting}: {name} {unreadable(error, Path(name))}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{setting}: {name} {not_utf8(error, Path(name))}") from error
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{setting}: {name} cannot be read ({error}); give another file") from error
        if count == 0:
            # An empty list blocks nothing, which nobody who gives one can mean.
            raise ConfigError(f"{setting}: {name} is empty; give another file, or leave it out")
    return np.unique(np.concatenate(pieces)) if pieces else np.empty(0, np.uint64)


def _entries(setting: str, file: Path) -> Iterator[pa.Array]:
    """The entries of a list in batches of strings, without white space around them and empty lines."""
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet:
            if len(parquet.schema_arrow.names) != 1:
                raise ConfigError(
                    f"{setting}: {file} has the columns {', '.join(parquet.schema_arrow.names)}; leave the one to block"
                )
            for batch in parquet.iter_batches(BATCH_LINES):
                yield from _stripped(batch.column(0).cast(pa.string()))
        return
    with file.open(encoding="utf-8-sig") as lines:
        gathered: list[str] = []
        for line in lines:
            gathered.append(line)
            if len(gathered) == BATCH_LINES:
                yield from _stripped(pa.array(gathered, pa.string()))
                gathered = []
        yield from _stripped(pa.array(gathered, pa.string()))


def _stripped(values: pa.Array) -> Iterator[pa.Array]:
    stripped = pc.utf8_trim_whitespace(values.drop_null())
    yield stripped.filter(pc.not_equal(stripped, ""))


def _normal(values: pa.Array) -> pa.Array:
    """Hashes as text, in lower case: hexadecimal digits are written in both."""
    return pc.utf8_lower(values.cast(pa.string()))


def _contained(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    if len(ordered) == 0 or len(values) == 0:
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[places] == values)
