"""Select against plain Python: every filter's counts, duplicates across files and sources, and runs that are killed
(30 seconds)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_pipeline.__main__ import main
from data_pipeline.select import scan
from data_pipeline.select.select import select
from data_pipeline.select.selection import UNFINISHED_FILE, read_selection
from data_pipeline.select.urls import url_problem
from miniature.__main__ import main as miniature
from vdtrain.config.command_schema import DataPipelineConfig
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.data_schema import DataConfig, SourceConfig
from vdtrain.data.manifest import pair_uid
from vdtrain.data.tar_samples import clean_caption
from vdtrain.files import locked

OFF = [
    *(
        f"data.select.filters.{name}=null"
        for name in (
            "side_min",
            "area_min",
            "aspect_ratio_min",
            "aspect_ratio_max",
            "similarity_min",
            "nsfw_max",
            "watermark_max",
            "aesthetic_min",
            "caption_characters_min",
            "caption_characters_max",
            "caption_words_min",
        )
    ),
    "data.select.filters.nsfw_labels=[]",
    "data.select.filters.duplicate_urls=keep",
    "data.select.filters.duplicate_images=keep",
]
TYPES = {"width": pa.int32(), "height": pa.int32(), "similarity": pa.float32(), "punsafe": pa.float32()}
TYPES |= {"pwatermark": pa.float32(), "aesthetic": pa.float32(), "hash": pa.int64(), "phash": pa.string()}
TYPES |= {"url": pa.string(), "caption": pa.string(), "nsfw": pa.string(), "license": pa.string(), "md5": pa.string()}


def config(folder: Path, *overrides: str) -> DataConfig:
    """The full-size set's settings over metadata in `folder`, without its filters."""
    settings = [f"data.root={folder}", "data.select.processes=1", "data.download.samples_per_shard=1"]
    settings += ["data.select.rows_per_part=7", *OFF, *overrides]
    return to_object(compose("data_pipeline", settings), DataPipelineConfig).data


def table_source(folder: Path, name: str) -> SourceConfig:
    return SourceConfig(
        schema="table",
        metadata=f"{folder}/{name}",
        selected=f"{folder}/selected/{name}",
        shards=f"{folder}/shards/{name}",
    )


def own(folder: Path, *overrides: str) -> DataConfig:
    """The same with one source, `own`, a table."""
    data = config(folder, *overrides)
    data.sources = {"own": table_source(folder, "own")}
    return data


def write(file: Path, rows: list[dict[str, Any]], group: int = 1 << 20) -> None:
    """A table of one's own; a key that no row has makes no column."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pa.array([row.get(name) for row in rows], TYPES[name]) for name in names}
    pq.write_table(pa.table(columns), file, row_group_size=group)


def pair(number: int, **values: Any) -> dict[str, Any]:
    return {"url": f"https://example.org/{number}.jpg", "caption": f"image number {number}", **values}


def selected(data: DataConfig, name: str = "own") -> list[dict[str, Any]]:
    """The rows of all parts, which are as long as the record says."""
    folder = Path(data.sources[name].selected)
    selection = read_selection(folder)
    assert selection is not None
    tables = [pq.read_table(file) for file in selection.files(folder)]
    assert len(list(folder.glob("*.parquet"))) == selection.parts
    assert all(len(table) == data.select.rows_per_part for table in tables[:-1])
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == selection.rows
    assert selection.read == selection.rows + sum(selection.counts.values())
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.parquet"))}


FILTERS: dict[str, tuple[list[str], list[dict[str, Any]], set[int], dict[str, int], dict[str, int]]] = {
    "side": (
        ["side_min=256"],
        [
            {"width": 256, "height": 900},
            {"width": 255, "height": 900},
            {"width": 900, "height": 1},
            {"width": 0},
            {"width": 0, "height": 300},
            {"width": 300, "height": None},
        ],
        {0, 3, 4, 5},
        {"side too short": 2},
        {"size": 3},
    ),
    "area": (
        ["area_min=49152"],
        [{"width": 192, "height": 256}, {"width": 191, "height": 257}, {"width": 60000, "height": 60000}],
        {0, 2},
        {"area too small": 1},
        {},
    ),
    "aspect ratio": (
        ["aspect_ratio_min=0.5", "aspect_ratio_max=2.0"],
        [
            {"width": 200, "height": 100},
            {"width": 201, "height": 100},
            {"width": 100, "height": 200},
            {"width": 99, "height": 200},
        ],
        {0, 2},
        {"aspect ratio too large": 1, "aspect ratio too small": 1},
        {},
    ),
    "similarity": (
        ["similarity_min=0.3"],
        [{"similarity": 0.3}, {"similarity": 0.2999}, {"similarity": None}, {"similarity": float("nan")}],
        {0, 2, 3},
        {"similarity too low": 1},
        {"similarity": 2},
    ),
    "similarity, unscored dropped": (
        ["similarity_min=0.3", "unscored=drop"],
        [{"similarity": 0.3}, {"similarity": 0.2999}, {"similarity": None}, {"similarity": float("nan")}],
        {0},
        {"similarity too low": 1, "no value for similarity": 2},
        {},
    ),
    "a score that no file has": (["watermark_max=0.3"], [{}, {}], {0, 1}, {}, {"watermark": 2}),
    "NSFW": (
        ["nsfw_max=0.3"],
        [{"punsafe": 0.3}, {"punsafe": 0.3001}, {"punsafe": None}],
        {0, 2},
        {"NSFW probability too high": 1},
        {"nsfw": 1},
    ),
    "NSFW label": (
        ["nsfw_labels=[NSFW,UNSURE]"],
        [{"nsfw": "UNLIKELY"}, {"nsfw": "nsfw"}, {"nsfw": "UNSURE"}, {"nsfw": None}],
        {0, 3},
        {"NSFW label": 2},
        {},
    ),
    "watermark": (
        ["watermark_max=0.3"],
        [{"pwatermark": 0.3}, {"pwatermark": 0.9}],
        {0},
        {"watermark probability too high": 1},
        {},
    ),
    "aesthetic": (
        ["aesthetic_min=5"],
        [{"aesthetic": 5.0}, {"aesthetic": 4.9}],
        {0},
        {"aesthetic score too low": 1},
        {},
    ),
    "caption": (
        ["caption_characters_min=5", "caption_characters_max=20", "caption_words_min=2"],
        [
            {"caption": "a dog"},
            {"caption": "dogs"},
            {"caption": "doggies"},
            {"caption": "a dog " * 4},
            {"caption": "<b> [x] </b>"},
            {"caption": "  a  cat  "},
            {"caption": None},
            {"caption": ""},
            {"caption": "a cat beside one dog"},
            {"caption": "a cat beside two dogs"},
        ],
        {0, 5, 8},
        {"caption too short": 2, "caption too long": 2, "no caption after cleaning": 1, "no caption": 2},
        {},
    ),
    "URL": (
        [],
        [
            {},
            {"url": None},
            {"url": ""},
            {"url": "ftp://example.org/a"},
            {"url": "http://10.0.0.1/"},
            {"url": "http://127.0.0.1/"},
            {"url": "http://0x7f.1/"},
        ],
        {0},
        {
            "no URL": 2,
            "not http or https": 1,
            "private address": 1,
            "loopback host": 1,
            "address not in its plain form": 1,
        },
        {},
    ),
    "duplicate URL": (
        ["duplicate_urls=drop"],
        [{}, {"url": "https://example.org/0.jpg"}, {"url": "https://example.org/0.JPG"}, {}],
        {0, 2, 3},
        {"duplicate URL": 1},
        {},
    ),
    "duplicate image": (
        ["duplicate_images=drop"],
        [{"phash": "AB"}, {"phash": "ab"}, {"phash": None}, {"phash": None}, {"phash": ""}, {"phash": ""}],
        {0, 2, 3, 4, 5},
        {"duplicate image": 1},
        {},
    ),
    # Of a pair that another filter drops, nothing has come before.
    "a dropped row is no first": (
        ["duplicate_urls=drop", "similarity_min=0.3"],
        [{"url": "https://a.org/1", "similarity": 0.1}, {"url": "https://a.org/1", "similarity": 0.5}],
        {1},
        {"similarity too low": 1},
        {},
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_and_its_counts(tmp_path: Path, name: str) -> None:
    settings, rows, kept, counts, unscored = FILTERS[name]
    rows = [pair(number, **row) for number, row in enumerate(rows)]
    write(tmp_path / "own" / "a.parquet", rows)
    data = own(tmp_path, *(f"data.select.filters.{setting}" for setting in settings))
    select(data)
    assert [row["url"] for row in selected(data)] == [rows[number]["url"] for number in sorted(kept)]
    selection = read_selection(tmp_path / "selected" / "own")
    assert selection is not None
    assert selection.counts == counts
    assert selection.unscored == unscored


def test_a_limit_holds_for_every_column_that_a_set_has_for_it(tmp_path: Path) -> None:
    scores = [(0.3, 0.3), (0.4, 0.1), (0.1, 0.4), (0.1, None), (None, 0.1), (None, None), (None, 0.4)]
    columns = {
        "url": [f"https://example.org/{number}.jpg" for number in range(len(scores))],
        "text": ["a caption"] * len(scores),
        "nsfw_score_opennsfw2": pa.array([one for one, _ in scores], pa.float32()),
        "nsfw_score_gantman": pa.array([other for _, other in scores], pa.float32()),
    }
    (tmp_path / "own").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "own" / "a.parquet")
    data = own(tmp_path, "data.select.filters.nsfw_max=0.3")
    data.sources["own"].schema = "coyo700m"
    select(data)
    assert [row["url"] for row in selected(data)] == [columns["url"][number] for number in (0, 3, 4, 5)]
    selection = read_selection(tmp_path / "selected" / "own")
    assert selection is not None
    assert (selection.counts, selection.unscored) == ({"NSFW probability too high": 3}, {"nsfw": 1})


def test_columns_uid_and_cleaned_captions(tmp_path: Path) -> None:
    write(tmp_path / "own" / "a.parquet", [pair(0, caption="A &amp; B  [1]", width=300, height=400, punsafe=0.25)])
    write(tmp_path / "own" / "b.parquet", [pair(1, license="?")])
    data = own(tmp_path)
    select(data)
    assert selected(data) == [
        {
            "uid": pair_uid("own", "https://example.org/0.jpg", "A & B"),
            "url": "https://example.org/0.jpg",
            "caption": "A & B",
            "license": None,
            "punsafe": 0.25,
            "metadata_width": 300,
            "metadata_height": 400,
        },
        {
            "uid": pair_uid("own", "https://example.org/1.jpg", "image number 1"),
            "url": "https://example.org/1.jpg",
            "caption": "image number 1",
            "license": "?",
            "punsafe": None,
            "metadata_width": None,
            "metadata_height": None,
        },
    ]


def test_the_drawn_set_keeps_all_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["data=shapes", f"data.root={tmp_path}", "data.shapes.images=50", "data.shapes.pixels=32"]
    assert miniature(["draw", *settings]) == 0
    assert main(["select", *settings]) == 0
    printed = capsys.readouterr().out
    assert "laion2b_en: 30 of 30 rows kept (100.0%), in 1 parts" in printed
    assert "coyo700m: 20 of 20 rows kept (100.0%), in 1 parts" in printed
    assert main(["select", *settings, "data.allow_loopback=false"]) == 0
    assert "30 loopback host" in capsys.readouterr().out


def random_rows(generator: random.Random, count: int) -> list[dict[str, Any]]:
    """Rows with many repeated URLs, captions and images, nulls, and URLs that are refused."""
    hosts = ["https://example.org", "http://a.example.com", "http://10.0.0.1", "ftp://example.org", "http://nas.local"]
    captions = ["a red circle", "two  dogs &amp; a cat", "x", "", None, "[photo] of a house.jpg", "caf\u00e9 at night"]

    def score() -> float | None:
        return generator.choice([None, generator.random()])

    return [
        {
            "url": generator.choice([f"{generator.choice(hosts)}/{generator.randrange(count)}", None])
            if generator.random() < 0.1
            else f"https://example.org/{generator.randrange(count)}",
            "caption": generator.choice(captions),
            "width": generator.choice([None, 100, 300, 900]),
            "height": generator.choice([200, 300, 400]),
            "similarity": score(),
            "punsafe": score(),
            "phash": generator.choice([None, f"{generator.randrange(count):04x}"]),
        }
        for _ in range(count)
    ]


def oracle(tables: list[tuple[str, list[dict[str, Any]]]]) -> dict[str, list[tuple[str, str, str]]]:
    """What the settings of `write_sources` keep, (uid, url, caption) by source: with sets, one row after the other."""
    left = []
    for name, rows in tables:
        for row in rows:
            caption = clean_caption(row["caption"] or "")
            size = (row["width"], row["height"])
            if (
                row["url"]
                and url_problem(row["url"], allow_loopback=False) is None
                and len(caption) >= 3
                and (None in size or min(size) >= 200)
                and (row["similarity"] is None or row["similarity"] >= 0.2)
                and (row["punsafe"] is None or row["punsafe"] <= 0.8)
            ):
                left.append((name, row["url"], caption, row["phash"]))
    for key in (1, 3):
        seen, first = set(), []
        for row in left:
            if row[key] is None or row[key] not in seen:
                first.append(row)
            seen.add(row[key])
        left = first
    return {
        name: [(pair_uid(name, url, caption), url, caption) for source, url, caption, _ in left if source == name]
        for name, _ in tables
    }


def write_sources(folder: Path) -> tuple[DataConfig, list[tuple[str, list[dict[str, Any]]]]]:
    """Two sources with three files each, whose row groups differ, and their rows."""
    generator = random.Random(3)
    tables = []
    for name in ("first", "second"):
        rows = random_rows(generator, 1500)
        for number, group in enumerate((1 << 20, 64, 7)):
            write(folder / name / f"{number}.parquet", rows[500 * number : 500 * (number + 1)], group)
        tables.append((name, rows))
    filters = ["side_min=200", "similarity_min=0.2", "nsfw_max=0.8", "caption_characters_min=3"]
    filters += ["duplicate_urls=drop", "duplicate_images=drop"]
    settings = ["data.select.rows_per_part=40", *(f"data.select.filters.{each}" for each in filters)]
    data = config(folder, *settings)
    data.sources = {name: table_source(folder, name) for name, _ in tables}
    return data, tables


def test_against_plain_python_over_files_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.select.scan.BATCH_ROWS", 100)
    data, tables = write_sources(tmp_path)
    select(data, batch_rows=37)
    expected = oracle(tables)
    assert len(expected["first"]) > 100
    assert len(expected["second"]) > 40
    for name, rows in expected.items():
        assert [(row["uid"], row["url"], row["caption"]) for row in selected(data, name)] == rows


def test_the_parts_do_not_depend_on_processes_or_batches(tmp_path: Path) -> None:
    data, _ = write_sources(tmp_path)
    select(data)
    whole = contents(tmp_path / "selected")
    records = [read_selection(Path(source.selected)) for source in data.sources.values()]
    for number, (processes, batch_rows) in enumerate(((1, 13), (3, 100))):
        again = tmp_path / str(number)
        data.select.processes = processes
        data.select.scratch = f"{again}/.scratch"
        for name, source in data.sources.items():
            source.selected = f"{again}/{name}"
        select(data, batch_rows)
        assert contents(again) == whole
        assert [read_selection(Path(source.selected)) for source in data.sources.values()] == records


def test_row_groups_do_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.select.scan.GROUP_ROWS", 16)
    write(tmp_path / "own" / "a.parquet", [pair(number) for number in range(100)], group=9)
    data = own(tmp_path, "data.select.rows_per_part=50")
    for batch_rows in (7, 1000):
        data.sources["own"].selected = f"{tmp_path}/{batch_rows}"
        select(data, batch_rows)
    assert contents(tmp_path / "7") == contents(tmp_path / "1000")
    part = pq.read_metadata(tmp_path / "7" / "00001.parquet")
    assert [part.row_group(number).num_rows for number in range(part.num_row_groups)] == [16, 16, 16, 2]


def test_duplicates_are_found_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.select.scan.MEGABYTES_PER_PROCESS", 30)
    count = 800_000
    numbers = pa.array([number % (count - 1000) for number in range(count)]).cast(pa.string())
    urls = pc.binary_join_element_wise("https://example.org/", numbers, "")
    (tmp_path / "own").mkdir()
    pq.write_table(pa.table({"url": urls, "caption": pa.repeat("a cat", count)}), tmp_path / "own" / "a.parquet")
    data = own(tmp_path, "data.select.filters.duplicate_urls=drop", "data.select.rows_per_part=500000")
    assert select(data)["own"].rows == count - 1000
    parts = [pq.read_table(tmp_path / "selected" / "own" / f"0000{number}.parquet") for number in (0, 1)]
    assert pa.concat_tables(parts)["url"].combine_chunks() == urls[: count - 1000]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def own_settings(folder: Path) -> list[str]:
    """A table of one's own in a configuration of one's own, as docs/data.md says."""
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "mine.yaml").write_text(
        "defaults: [laion2b_en_coyo700m, _self_]\n"
        "name: mine\n"
        "sources:\n"
        "  own: {schema: table, metadata: '${data.root}/own', selected: '${data.root}/selected/own', "
        "shards: '${data.root}/shards/own'}\n"
    )
    settings = [f"hydra.searchpath=[{folder}/conf]", "data=mine", f"data.root={folder}"]
    settings += ["~data.sources.laion2b_en", "~data.sources.coyo700m"]
    return [*settings, "data.select.rows_per_part=1000", "data.download.samples_per_shard=100"]


@pytest.mark.parametrize(
    ("moment", "processes"), [("rows-000001.parquet", 2), ("rows-000007.parquet", 1), ("kept.int64", 2), ("parts", 2)]
)
def test_a_killed_select_starts_again_and_ends_with_the_same_bits(tmp_path: Path, moment: str, processes: int) -> None:
    rows = [pair(number % 19_000, similarity=number % 7 / 7) for number in range(20_000)]
    for number in range(8):
        write(tmp_path / "own" / f"{number}.parquet", rows[2500 * number : 2500 * (number + 1)])
    settings = own_settings(tmp_path)
    data = to_object(compose("data_pipeline", [*settings, "data.select.processes=1"]), DataPipelineConfig).data
    select(data)
    whole = contents(tmp_path / "selected")
    assert len(whole) == 12
    folder, scratch = tmp_path / "selected" / "own", tmp_path / "selected" / ".scratch"
    (folder / "selection.json").unlink()
    (folder / UNFINISHED_FILE).touch()
    for file in folder.glob("*.parquet"):
        file.write_bytes(b"of an earlier select")
    command = [sys.executable, "-m", "data_pipeline", "select", *settings, f"data.select.processes={processes}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    place = folder / "00003.parquet" if moment == "parts" else scratch / "vdtrain_select" / moment
    wait_for(lambda: (place.exists() and scratch.exists()) or process.poll() is not None)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if process.returncode != 0:
        assert read_selection(folder) is None
        assert all(file.read_bytes() == whole[f"own/{file.name}"] for file in folder.glob("*.parquet"))
    select(data)
    assert contents(tmp_path / "selected") == whole
    assert sorted(file.name for file in (tmp_path / "selected").iterdir()) == [".scratch.lock", "own"]
    assert sorted(file.name for file in folder.iterdir()) == [
        *sorted(Path(name).name for name in whole),
        "selection.json",
    ]


def test_stopped_by_the_keyboard(tmp_path: Path) -> None:
    write(tmp_path / "own" / "000.parquet", [pair(number) for number in range(10)])
    for number in range(1, 500):
        shutil.copyfile(tmp_path / "own" / "000.parquet", tmp_path / "own" / f"{number:03d}.parquet")
    command = [sys.executable, "-m", "data_pipeline", "select", *own_settings(tmp_path), "data.select.processes=2"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((tmp_path / "selected" / ".scratch" / "vdtrain_select" / "rows-000000.parquet").exists)
    # As a terminal does: to all its processes.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "stopped by Ctrl-C; run it again to continue\n"
    assert sorted(file.name for file in (tmp_path / "selected").iterdir()) == [".scratch.lock", "own"]
    assert [file.name for file in (tmp_path / "selected" / "own").iterdir()] == [UNFINISHED_FILE]


def test_stopped_by_the_keyboard_while_duplicates_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "own" / "a.parquet", [pair(0)])
    endless = "SELECT row, image FROM ({}), range(1_000_000_000_000) AS numbers WHERE numbers.range < 0"
    monkeypatch.setitem(scan.BY_URL, "keep", endless)
    stop = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    monkeypatch.setattr("data_pipeline.select.select.find_first_rows", lambda *given: stop.start() or find(*given))
    find = scan.find_first_rows
    with pytest.raises(KeyboardInterrupt):
        select(own(tmp_path))
    assert not (tmp_path / "selected" / ".scratch").exists()


def test_too_little_room_for_the_duplicates_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "own" / "a.parquet", [pair(number) for number in range(100_000)])
    monkeypatch.setattr("data_pipeline.select.scan.MEGABYTES_PER_PROCESS", 1)
    with pytest.raises(
        ConfigError, match=r"^data\.select\.scratch=.*: DuckDB cannot find the duplicates .*\); make room"
    ):
        select(own(tmp_path, "data.select.filters.duplicate_urls=drop"))


def test_two_selects_at_once_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "own" / "a.parquet", [pair(0)])
    message = (
        rf"data\.select\.scratch=.*: another select is writing there \(process {os.getpid()} on .*\); wait for it or"
    )
    with locked(tmp_path / "selected" / ".scratch.lock"), pytest.raises(ConfigError, match=message):
        select(own(tmp_path))
    assert select(own(tmp_path))["own"].rows == 1


def test_a_complete_selection_is_not_repeated_and_another_plan_replaces_it_until_there_are_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "own" / "a.parquet", [pair(number, similarity=number / 20) for number in range(20)])
    data = own(tmp_path)
    select(data)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "selected" / "own").iterdir()}
    first = capsys.readouterr().out
    select(data)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "selected" / "own").iterdir()} == before
    assert (
        capsys.readouterr().out.splitlines()
        == first.splitlines()[-1:]
        == ["own: 20 of 20 rows kept (100.0%), in 3 parts"]
    )
    # Neither the number of processes nor the place of what is unfinished decides about rows.
    select(own(tmp_path, "data.select.processes=2", f"data.select.scratch={tmp_path}/elsewhere"))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "selected" / "own").iterdir()} == before

    changed = own(tmp_path, "data.select.filters.similarity_min=0.5", "data.allow_loopback=true")
    (tmp_path / "shards" / "own").mkdir(parents=True)
    select(changed)
    assert len(selected(changed)) == 10
    (tmp_path / "shards" / "own" / "000000.tar").touch()
    select(changed)
    with pytest.raises(
        ConfigError,
        match=r"^data\.allow_loopback, data\.select\.filters\.similarity_min: changed since shards were made",
    ):
        select(data)
    assert len(selected(changed)) == 10
    write(tmp_path / "own" / "b.parquet", [pair(100, similarity=0.9)])
    with pytest.raises(ConfigError, match=r"^data\.sources\.own\.metadata: changed since"):
        select(changed)


def test_a_source_more_leaves_those_before_it_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "own" / "a.parquet", [pair(number) for number in range(10)])
    write(tmp_path / "more" / "a.parquet", [pair(number) for number in range(5, 15)])
    data = own(tmp_path, "data.select.filters.duplicate_urls=drop")
    select(data)
    before = contents(tmp_path / "selected" / "own")
    (tmp_path / "shards" / "own").mkdir(parents=True)
    (tmp_path / "shards" / "own" / "000000.tar").touch()
    data.sources["more"] = table_source(tmp_path, "more")
    select(data)
    assert contents(tmp_path / "selected" / "own") == before
    assert [row["url"] for row in selected(data, "more")] == [pair(number)["url"] for number in range(10, 15)]


def test_what_select_did_not_write_is_not_removed(tmp_path: Path) -> None:
    write(tmp_path / "own" / "a.parquet", [pair(0)])
    write(tmp_path / "selected" / "own" / "precious.parquet", [pair(0)])
    with pytest.raises(ConfigError, match=r"data\.sources\.own\.selected=.*: holds parquet files that select did not"):
        select(own(tmp_path))
    data = own(tmp_path)
    data.sources["own"].selected = f"{tmp_path}/own"
    with pytest.raises(
        ConfigError, match=r"data\.sources\.own\.selected=.*: taken already; give it a folder of its own"
    ):
        select(data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    data = own(tmp_path, f"data.select.scratch={tmp_path}/mine")
    data.sources["own"].selected = f"{tmp_path}/there"
    select(data)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_block_lists(tmp_path: Path) -> None:
    rows = [pair(number, md5=f"{number:032X}", hash=number - 3) for number in range(8)]
    write(tmp_path / "own" / "a.parquet", rows)
    (tmp_path / "urls.txt").write_text("https://example.org/1.jpg\r\n\n  https://example.org/2.jpg  \nhttps://other/\n")
    pq.write_table(pa.table({"address": ["https://example.org/3.jpg"]}), tmp_path / "urls.parquet")
    (tmp_path / "md5.txt").write_text(f"{4:032x}\n")
    (tmp_path / "hash.txt").write_text("-3\n2\n")
    lists = [
        f"data.select.block_lists.url=[{tmp_path}/urls.txt,{tmp_path}/urls.parquet]",
        f"data.select.block_lists.md5=[{tmp_path}/md5.txt]",
        f"data.select.block_lists.hash=[{tmp_path}/hash.txt]",
    ]
    data = own(tmp_path, *lists)
    select(data)
    assert [row["url"] for row in selected(data)] == [pair(number)["url"] for number in (6, 7)]
    selection = read_selection(tmp_path / "selected" / "own")
    assert selection is not None
    assert selection.counts == {"blocked URL": 3, "blocked hash": 2, "blocked md5": 1}
    # A longer list is another plan.
    (tmp_path / "md5.txt").write_text(f"{4:032x}\n{7:032X}\n")
    select(data)
    assert len(selected(data)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data.select.rows_per_part=10", "data.download.samples_per_shard=3"],
            "rows_per_part=10: must be a multiple",
        ),
        (["data.select.processes=0"], "processes=0: must be at least 1"),
        (["data.select.filters.unscored=maybe"], "filters.unscored=maybe: choose from keep, drop"),
        (["data.select.filters.nsfw_max=30"], "filters.nsfw_max=30: must be from 0 to 1; null for no limit"),
        (
            ["data.select.filters.caption_characters_min=9", "data.select.filters.caption_characters_max=8"],
            "caption_characters_min=9: above caption_characters_max=8",
        ),
        (["data.select.block_lists.url=[/nowhere.txt]"], "block_lists.url: /nowhere.txt cannot be read"),
        (
            ["data.select.block_lists.phash=[a]", "data.select.rows_per_part=3"],
            "block_lists.phash: a cannot be read",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(tmp_path: Path, settings: list[str], message: str) -> None:
    write(tmp_path / "own" / "a.parquet", [pair(0)])
    (tmp_path / "a").write_text("x")
    with pytest.raises(ConfigError) as raised:
        select(own(tmp_path, *settings))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "selected" / "own").exists()


def test_an_empty_block_list_and_damaged_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "own" / "a.parquet", [pair(number) for number in range(50)])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"block_lists\.url: .*empty\.txt is empty"):
        select(own(tmp_path, f"data.select.block_lists.url=[{tmp_path}/empty.txt]"))
    data = bytearray((tmp_path / "own" / "a.parquet").read_bytes())
    data[4:200] = b"\xff" * 196
    (tmp_path / "own" / "a.parquet").write_bytes(bytes(data))
    with pytest.raises(ConfigError, match=r"data\.sources\.own\.metadata: .*a\.parquet cannot be read as parquet"):
        select(own(tmp_path))
    write(tmp_path / "own" / "a.parquet", [pair(0)])
    select(own(tmp_path))
    (tmp_path / "selected" / "own" / "selection.json").write_text(json.dumps({"rows": 1}))
    with pytest.raises(ConfigError, match=r"selection\.json: cannot be read"):
        select(own(tmp_path))


def test_metadata_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}), tmp_path / "a")
    data = own(tmp_path, "data.select.filters.duplicate_urls=drop")
    data.sources["own"].metadata = f"{tmp_path}/a"
    assert select(data)["own"].rows == 0
    assert selected(data) == []
