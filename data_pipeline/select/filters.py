"""What a row must be like to be worth its download, a batch of rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.select.duplicates import BlockLists
from data_pipeline.select.sources import CAPTION, URL, Column, Schema
from data_pipeline.select.url_policy import url_problems
from vdtrain.config.compose import ConfigError
from vdtrain.config.data_schema import FilterConfig
from vdtrain.data.captions import UNCLEAN, clean_caption

DUPLICATE_URL = "duplicate URL"
DUPLICATE_IMAGE = "duplicate image"
NOT_SCORED = "no value for "


@dataclass
class Verdict:
    """What came of a batch.

    Attributes:
        rows: places of the rows that are kept, ascending.
        dropped: how many were dropped, by the first reason that met them.
        unscored: how many passed a filter without the value that it asks for, by filter.
    """

    rows: np.ndarray
    dropped: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)

    def drop(self, bad: np.ndarray, reason: str) -> None:
        """Drop those of the rows that are still kept for which `bad` is true."""
        if count := int(np.count_nonzero(bad)):
            self.dropped[reason] += count
            self.rows = self.rows[~bad]


class RowFilter:
    """The filters of a configuration over the columns of a schema (sources.read_columns), from cheap to dear.

    The order: URL and caption present, size, scores, URL policy, block lists, caption. Duplicates come after.
    """

    def __init__(self, schema: Schema, config: FilterConfig, allow_loopback: bool, blocked: BlockLists) -> None:
        self.schema = schema
        self.config = config
        self.allow_loopback = allow_loopback
        self.blocked = blocked

    def columns(self) -> list[Column]:
        """The columns that the filters read, beside URL and caption."""
        roles = ("similarity", "nsfw", "nsfw_label", "watermark", "aesthetic", "phash", *self.blocked.hashes)
        names = {name for role in roles for name in self.schema.roles.get(role, ())}
        names |= {"metadata_width", "metadata_height"}
        return [column for column in self.schema.columns if column.name in names]

    def __call__(self, columns: Mapping[str, pa.Array]) -> Verdict:
        verdict = Verdict(np.arange(len(columns[URL])))
        for name, reason in ((URL, "no URL"), (CAPTION, "no caption")):
            lengths = pc.binary_length(columns[name]).fill_null(0).to_numpy(zero_copy_only=False)
            verdict.drop(lengths[verdict.rows] == 0, reason)
        self._sizes(verdict, columns)
        self._scores(verdict, columns)
        self._urls(verdict, columns)
        self._captions(verdict, columns[CAPTION])
        return verdict

    def _sizes(self, verdict: Verdict, columns: Mapping[str, pa.Array]) -> None:
        config = self.config
        limits = (config.side_min, config.area_min, config.aspect_ratio_min, config.aspect_ratio_max)
        if all(limit is None for limit in limits):
            return
        width, height = (_floats(columns[name]) for name in ("metadata_width", "metadata_height"))
        # A size of nothing is none.
        unknown = ~((width > 0) & (height > 0))
        self._unscored(verdict, unknown[verdict.rows], "size")
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
                verdict.drop(bad[verdict.rows], reason)

    def _scores(self, verdict: Verdict, columns: Mapping[str, pa.Array]) -> None:
        config = self.config
        for role, limit, sign, reason in (
            ("similarity", config.similarity_min, 1, "similarity too low"),
            ("nsfw", config.nsfw_max, -1, "NSFW probability too high"),
            ("watermark", config.watermark_max, -1, "watermark probability too high"),
            ("aesthetic", config.aesthetic_min, 1, "aesthetic score too low"),
        ):
            if limit is None:
                continue
            # Held to single precision on both sides, so that a value at the limit is kept.
            scores = [_floats(columns[name]) for name in self.schema.roles.get(role, ())]
            rows = len(columns[URL])
            present = np.zeros(rows, bool)
            bad = np.zeros(rows, bool)
            for values in scores:
                present |= ~np.isnan(values)
                bad |= sign * values < sign * np.float32(limit)
            self._unscored(verdict, ~present[verdict.rows], role)
            verdict.drop(bad[verdict.rows], reason)
        labels = self.schema.roles.get("nsfw_label", ())
        if config.nsfw_labels and labels:
            found = columns[labels[0]]
            wanted = pa.array([label.upper() for label in config.nsfw_labels])
            bad = pc.is_in(pc.utf8_upper(found), value_set=wanted).to_numpy(zero_copy_only=False)
            verdict.drop(bad[verdict.rows], "NSFW label")

    def _urls(self, verdict: Verdict, columns: Mapping[str, pa.Array]) -> None:
        places, problems = url_problems(columns[URL].take(pa.array(verdict.rows)), self.allow_loopback)
        verdict.dropped.update(problems)
        verdict.rows = np.delete(verdict.rows, places)
        if self.blocked.urls is not None:
            verdict.drop(self.blocked.has_urls(columns[URL].take(pa.array(verdict.rows))), "blocked URL")
        for role in self.blocked.hashes:
            for name in self.schema.roles.get(role, ()):
                values = columns[name].take(pa.array(verdict.rows))
                verdict.drop(self.blocked.has_hashes(role, values), f"blocked {role}")

    def _captions(self, verdict: Verdict, captions: pa.Array) -> None:
        config = self.config
        cleaned = clean_captions(captions.take(pa.array(verdict.rows)))
        characters = pc.utf8_length(cleaned).to_numpy(zero_copy_only=False)
        # Cleaned captions have one space between words.
        words = pc.count_substring(cleaned, " ").to_numpy(zero_copy_only=False) + 1
        empty = characters == 0
        short = np.zeros(len(cleaned), bool)
        long = np.zeros(len(cleaned), bool)
        if config.caption_characters_min is not None:
            short |= characters < config.caption_characters_min
        if config.caption_words_min is not None:
            short |= words < config.caption_words_min
        if config.caption_characters_max is not None:
            long |= characters > config.caption_characters_max
        for bad, reason in (
            (empty, "no caption after cleaning"),
            (short & ~empty, "caption too short"),
            (long & ~short & ~empty, "caption too long"),
        ):
            if count := int(np.count_nonzero(bad)):
                verdict.dropped[reason] += count
        verdict.rows = verdict.rows[~(empty | short | long)]

    def _unscored(self, verdict: Verdict, unknown: np.ndarray, name: str) -> None:
        if self.config.unscored == "drop":
            verdict.drop(unknown, NOT_SCORED + name)
        elif count := int(np.count_nonzero(unknown)):
            verdict.unscored[name] += count


def clean_captions(captions: pa.Array) -> pa.Array:
    """`clean_caption` of a column of strings without nulls, fast where captions are clean."""
    odd = pc.match_substring_regex(captions, UNCLEAN)
    found = [clean_caption(text) for text in captions.filter(odd).to_pylist()]
    return pc.replace_with_mask(captions, odd, pa.array(found, pa.string())) if found else captions


def check_filters(config: FilterConfig) -> None:
    """Refuse limits that no row can be within.

    Raises:
        ConfigError: with the setting, its value and the remedy.
    """
    for low_name, high_name in (
        ("aspect_ratio_min", "aspect_ratio_max"),
        ("caption_characters_min", "caption_characters_max"),
    ):
        low_value, high_value = getattr(config, low_name), getattr(config, high_name)
        if low_value is not None and high_value is not None and low_value > high_value:
            raise ConfigError(
                f"data.select.filters.{low_name}={low_value}: above {high_name}={high_value}, so that no row is kept; "
                "lower it"
            )


def _floats(values: pa.Array) -> np.ndarray:
    """Numbers with NaN for null: float32 stays float32, whole numbers become float64."""
    if not pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
    return np.asarray(values.fill_null(float("nan")).to_numpy(zero_copy_only=False))
