"""The filters that a row must pass to be worth its download. They take a batch of rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.select.block_lists import BlockLists
from data_pipeline.select.sources import CAPTION, STATUS, URL, Column, Schema
from data_pipeline.select.urls import addresses, changed, url_problems
from vdtrain.config.data_schema import FilterConfig
from vdtrain.data.tar_samples import UNCLEAN, clean_caption
from vdtrain.errors import ConfigError

DUPLICATE_URL = "duplicate URL"
DUPLICATE_IMAGE = "duplicate image"
NOT_SCORED = "no value for "
# img2dataset's: failed_to_download, failed_to_resize. A table of one's own can have a status of another meaning.
FAILED = "(?i)^(fail|error)"


@dataclass
class FilterResult:
    """The rows of a batch that pass, with their cleaned captions and their addresses, and counts of the others."""

    rows: np.ndarray  # ascending indices
    captions: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    addresses: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    dropped: Counter[str] = field(default_factory=Counter)  # by the first filter that rejected them
    unscored: Counter[str] = field(default_factory=Counter)  # passed without the value that a filter reads, by filter

    def drop(self, bad: np.ndarray, reason: str) -> None:
        """Drop rows, by one boolean for each row in `rows`."""
        if count := int(np.count_nonzero(bad)):
            self.dropped[reason] += count
            self.rows = self.rows[~bad]
            if len(self.addresses):
                self.addresses = self.addresses.filter(pa.array(~bad))


@dataclass(frozen=True)
class RowFilter:
    """The filters of a configuration over the columns of a schema (sources.read_columns), the cheapest first.

    The order: URL and caption present, status, size, scores, URL policy, block lists, caption. Duplicates are found
    later.
    """

    schema: Schema
    config: FilterConfig
    allow_loopback: bool
    blocked: BlockLists

    def columns(self) -> list[Column]:
        """The columns that the filters read, besides URL and caption."""
        roles = ("similarity", "nsfw", "nsfw_label", "watermark", "aesthetic", *self.blocked.hashes)
        names = {name for role in roles for name in self.schema.roles.get(role, ())}
        names |= {"metadata_width", "metadata_height", STATUS}
        return [column for column in self.schema.columns if column.name in names]

    def __call__(self, columns: Mapping[str, pa.Array]) -> FilterResult:
        result = FilterResult(np.arange(len(columns[URL])))
        for name, reason in ((URL, "no URL"), (CAPTION, "no caption")):
            lengths = pc.binary_length(columns[name]).fill_null(0).to_numpy(zero_copy_only=False)
            result.drop(lengths[result.rows] == 0, reason)
        failed = pc.match_substring_regex(columns[STATUS], FAILED).fill_null(False)
        result.drop(failed.to_numpy(zero_copy_only=False)[result.rows], "status of a failed download")
        self._sizes(result, columns)
        self._scores(result, columns)
        self._urls(result, columns)
        self._captions(result, columns[CAPTION])
        return result

    def _sizes(self, result: FilterResult, columns: Mapping[str, pa.Array]) -> None:
        config = self.config
        limits = (config.side_min, config.area_min, config.aspect_ratio_min, config.aspect_ratio_max)
        if all(limit is None for limit in limits):
            return
        width, height = (_floats(columns[name]) for name in ("metadata_width", "metadata_height"))
        # Zero means the size is unknown.
        unknown = ~((width > 0) & (height > 0))
        self._unscored(result, unknown[result.rows], "size")
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = width / height
        for limit, values, sign, reason in (
            (config.side_min, np.minimum(width, height), 1, "side too short"),
            (config.area_min, width * height, 1, "area too small"),
            (config.aspect_ratio_min, ratio, 1, "aspect ratio too small"),
            (config.aspect_ratio_max, ratio, -1, "aspect ratio too large"),
        ):
            if limit is not None:
                bad = (sign * values < sign * limit) & ~unknown
                result.drop(bad[result.rows], reason)

    def _scores(self, result: FilterResult, columns: Mapping[str, pa.Array]) -> None:
        config = self.config
        for role, limit, sign, reason in (
            ("similarity", config.similarity_min, 1, "similarity too low"),
            ("nsfw", config.nsfw_max, -1, "NSFW probability too high"),
            ("watermark", config.watermark_max, -1, "watermark probability too high"),
            ("aesthetic", config.aesthetic_min, 1, "aesthetic score too low"),
        ):
            if limit is None:
                continue
            present, bad = np.zeros((2, len(columns[URL])), bool)
            for name in self.schema.roles.get(role, ()):
                values = _floats(columns[name])
                present |= ~np.isnan(values)
                # Both sides in single precision: a value equal to the limit passes.
                bad |= sign * values < sign * np.float32(limit)
            self._unscored(result, ~present[result.rows], role)
            result.drop(bad[result.rows], reason)
        labels = self.schema.roles.get("nsfw_label", ())
        if config.nsfw_labels and labels:
            wanted = pa.array([label.upper() for label in config.nsfw_labels])
            bad = pc.is_in(pc.utf8_upper(columns[labels[0]]), value_set=wanted).to_numpy(zero_copy_only=False)
            result.drop(bad[result.rows], "NSFW label")

    def _urls(self, result: FilterResult, columns: Mapping[str, pa.Array]) -> None:
        found = addresses(columns[URL].take(pa.array(result.rows)))
        places, problems = url_problems(found, self.allow_loopback)
        result.dropped.update(problems)
        fetched = np.delete(np.arange(len(result.rows)), places)
        result.rows, result.addresses = result.rows[fetched], found.take(pa.array(fetched))
        for role in self.blocked.hashes:
            for name in [URL] if role == URL else self.schema.roles.get(role, ()):
                values = result.addresses if role == URL else columns[name].take(pa.array(result.rows))
                result.drop(self.blocked.blocked(role, values), f"blocked {'URL' if role == URL else role}")

    def _captions(self, result: FilterResult, captions: pa.Array) -> None:
        config = self.config
        cleaned = clean_captions(captions.take(pa.array(result.rows)))
        characters = pc.utf8_length(cleaned).to_numpy(zero_copy_only=False)
        # Cleaned captions have one space between words.
        words = pc.count_substring(cleaned, " ").to_numpy(zero_copy_only=False) + 1
        longest = np.inf if config.caption_characters_max is None else config.caption_characters_max
        short = (characters < (config.caption_characters_min or 0)) | (words < (config.caption_words_min or 0))
        passed = np.ones(len(cleaned), bool)
        for bad, reason in (
            (characters == 0, "no caption after cleaning"),
            (short, "caption too short"),
            (characters > longest, "caption too long"),
        ):
            result.drop(bad[passed], reason)
            passed &= ~bad
        result.captions = cleaned.filter(pa.array(passed))

    def _unscored(self, result: FilterResult, unknown: np.ndarray, name: str) -> None:
        if self.config.unscored == "drop":
            result.drop(unknown, NOT_SCORED + name)
        elif count := int(np.count_nonzero(unknown)):
            result.unscored[name] += count


def clean_captions(captions: pa.Array) -> pa.Array:
    """`clean_caption` of a column of strings without nulls. Captions that are clean already cost little."""
    return changed(captions, pc.match_substring_regex(captions, UNCLEAN), clean_caption)


def check_filters(config: FilterConfig) -> None:
    """Raise a ConfigError for limits that keep no row."""
    for name in ("aspect_ratio", "caption_characters"):
        low, high = getattr(config, f"{name}_min"), getattr(config, f"{name}_max")
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"data.select.filters.{name}_min={low}: above {name}_max={high}, so that no row is kept; lower it"
            )


def _floats(values: pa.Array) -> np.ndarray:
    """Numbers with NaN for null: float32 stays float32, whole numbers become float64."""
    if not pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
    return np.asarray(values.fill_null(float("nan")).to_numpy(zero_copy_only=False))
