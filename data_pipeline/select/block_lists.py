"""Lists of URLs and of hashes that must not be downloaded. All processes of a machine share them in memory."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.select.metadata_files import PARQUET, block_list_files
from data_pipeline.select.sources import URL, schema_of
from data_pipeline.select.urls import addresses, changed
from vdtrain.config.data_schema import BlockListConfig, SourceConfig
from vdtrain.errors import ConfigError, not_utf8, one_line, unreadable

BATCH_ROWS = 1 << 16
HASHES = ("hash", "md5", "phash")


@dataclass(frozen=True)
class BlockLists:
    """Blocked values as sorted 64-bit hashes (uint64), by the role of their column: url, hash, md5 or phash."""

    hashes: Mapping[str, np.ndarray]

    def blocked(self, role: str, values: pa.Array) -> np.ndarray:
        """Whether each value of a column is blocked, as booleans. A null is not blocked."""
        ordered, hashes = self.hashes[role], _hashes(role, values.drop_null())
        found = np.zeros(len(values), bool)
        places = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
        found[values.is_valid().to_numpy(zero_copy_only=False)] = ordered[places] == hashes
        return found

    def save(self, folder: Path) -> None:
        """Write the lists to a folder, for `load`."""
        folder.mkdir(parents=True)
        for role, hashes in self.hashes.items():
            np.save(folder / f"{role}.npy", hashes)

    @classmethod
    def load(cls, folder: Path) -> BlockLists:
        """Map the lists of a folder into memory."""
        return cls({file.stem: np.load(file, mmap_mode="r") for file in folder.iterdir()})


def read_block_lists(config: BlockListConfig, sources: Mapping[str, SourceConfig]) -> BlockLists:
    """Read the files that a configuration names.

    Raises:
        ConfigError: a file cannot be read or is empty, or no source has the column that a list is for.
    """
    known = {URL, *(role for name, source in sources.items() for role in schema_of(name, source.schema).roles)}
    lists = {role: files for role in (URL, *HASHES) if (files := getattr(config, role))}
    for role in lists:
        if role not in known:
            raise ConfigError(
                f"data.select.block_lists.{role}: no source has such a column; leave the list out, or add a source "
                "that has it"
            )
    return BlockLists({role: _read(role, files) for role, files in lists.items()})


def _read(role: str, files: Sequence[str]) -> np.ndarray:
    setting = f"data.select.block_lists.{role}"
    hashes = []
    for file in block_list_files(setting, files):
        name, entries = str(file), 0
        try:
            for values in _entries(setting, file):
                stripped = pc.utf8_trim_whitespace(values.drop_null())
                stripped = stripped.filter(pc.not_equal(stripped, ""))
                stripped = addresses(stripped) if role == URL else _signed(stripped) if role == "hash" else stripped
                hashes.append(_hashes(role, stripped))
                entries += len(stripped)
        except OSError as error:
            raise ConfigError(f"{setting}: {name} {unreadable(error, file)}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{setting}: {name} {not_utf8(error, file)}") from error
        except (pa.ArrowException, EOFError, zlib.error) as error:
            raise ConfigError(f"{setting}: {name} cannot be read ({one_line(error)}); give another file") from error
        if entries == 0:
            # An empty list blocks nothing: it is a mistake.
            raise ConfigError(f"{setting}: {name} is empty; give another file, or leave it out")
    return np.unique(np.concatenate(hashes))


def _entries(setting: str, file: Path) -> Iterator[pa.Array]:
    """The entries of a list as batches of strings."""
    if not file.name.lower().endswith(PARQUET):
        packed = file.suffix.lower() == ".gz"
        with gzip.open(file, "rt", encoding="utf-8-sig") if packed else file.open(encoding="utf-8-sig") as lines:
            while batch := list(islice(lines, BATCH_ROWS)):
                yield pa.array(batch, pa.string())
        return
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if len(names) != 1:
            raise ConfigError(f"{setting}: {file} has the columns {', '.join(names)}; leave the one to block")
        for batch in parquet.iter_batches(BATCH_ROWS):
            yield batch.column(0).cast(pa.string())


def _signed(values: pa.Array) -> pa.Array:
    """Hashes as the signed numbers of the metadata: some lists have the unsigned numbers of the same bits."""
    large = pc.match_substring_regex(values, r"^[0-9]{19,20}$")
    return changed(values, large, lambda text: str((int(text) + (1 << 63)) % (1 << 64) - (1 << 63)))


def _hashes(role: str, values: pa.Array) -> np.ndarray:
    """BLAKE2b-64 of values without nulls. The case of hexadecimal digits does not matter.

    Args:
        values: of the role url: addresses. Neither http or https nor their escapes make a difference.
    """
    texts = pc.utf8_lower(values.cast(pa.string())).cast(pa.binary()).to_pylist() if role != URL else []
    if role == URL:
        texts = [unquote_to_bytes(value.partition(":")[2]) for value in values.to_pylist()]
    blake2b = hashlib.blake2b
    digests = [blake2b(value, digest_size=8).digest() for value in texts]
    return np.frombuffer(b"".join(digests), np.uint64)
