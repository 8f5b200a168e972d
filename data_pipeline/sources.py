"""Published metadata sets and the columns that matter in them, under whichever of their published names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from vdtrain.compose import ConfigError


@dataclass(frozen=True)
class Schema:
    """Names of a set's columns, compared without regard to case.

    Attributes:
        url, caption: published names of the two columns that every row needs.
        kept: columns that are kept beside each picture, where a set has them.
    """

    url: tuple[str, ...]
    caption: tuple[str, ...]
    kept: tuple[str, ...]


SCHEMAS = {
    "laion2b_en": Schema(
        url=("url",),
        caption=("text", "caption"),
        kept=("sample_id", "license", "nsfw", "similarity", "hash", "punsafe", "pwatermark", "aesthetic"),
    ),
    "coyo700m": Schema(
        url=("url",),
        caption=("text", "caption"),
        kept=(
            "id",
            "image_phash",
            "clip_similarity_vitb32",
            "clip_similarity_vitl14",
            "nsfw_score_opennsfw2",
            "nsfw_score_gantman",
            "watermark_score",
            "aesthetic_score_laion_v2",
        ),
    ),
}


@dataclass(frozen=True)
class Columns:
    """The columns of one metadata set, as its files spell them."""

    url: str
    caption: str
    kept: tuple[str, ...]


def metadata_files(setting: str, metadata: str) -> list[Path]:
    """The parquet files of a set: the one that is named, or those in the folder that is.

    Raises:
        ConfigError: there is none.
    """
    path = Path(metadata)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] * path.is_file()
    if not files:
        raise ConfigError(f"{setting}={metadata}: no parquet file there; put the metadata there or give another path")
    return files


def resolve_columns(setting: str, schema_name: str, file: Path) -> Columns:
    """Find a set's columns in one of its files.

    Raises:
        ConfigError: an unknown schema, or a file without a URL or a caption column.
    """
    if schema_name not in SCHEMAS:
        raise ConfigError(f"{setting}.schema={schema_name}: unknown; choose one of {', '.join(SCHEMAS)}")
    schema = SCHEMAS[schema_name]
    spelt: dict[str, str] = {name.lower(): name for name in pq.read_schema(file).names}

    def find(kind: str, aliases: Sequence[str]) -> str:
        for alias in aliases:
            if alias in spelt:
                return spelt[alias]
        raise ConfigError(
            f"{setting}.metadata: {file} has no {kind} column ({' or '.join(aliases)}), only "
            f"{', '.join(spelt.values())}; give metadata of the schema {schema_name}"
        )

    kept = tuple(spelt[name] for name in schema.kept if name in spelt)
    return Columns(find("URL", schema.url), find("caption", schema.caption), kept)
