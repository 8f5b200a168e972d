"""Metadata as other programs leave it on the disk: every file is read, or one line says why not (10 seconds)."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from data_pipeline.__main__ import main
from data_pipeline.select.select import select
from data_pipeline.select.selection import read_selection
from tests.data_pipeline.test_select import config, contents, own, own_settings, pair, selected, table_source, write
from vdtrain.config.compose import ConfigError


def urls(*numbers: int) -> list[str]:
    return [pair(number)["url"] for number in numbers]


def kept(folder: Path, *overrides: str) -> list[str]:
    """The URLs that select keeps of the table below `own`."""
    data = own(folder, *overrides)
    select(data)
    return [row["url"] for row in selected(data)]


def test_a_folder_as_spark_and_others_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = tmp_path / "own"
    write(metadata / "a.snappy.parquet", [pair(0)])
    write(metadata / "b.PARQUET", [pair(1)])
    write(metadata / "c.parquet" / "part-00000.parquet", [pair(2)])
    write(metadata / "d" / "e" / "f.parq", [pair(3)])
    for name in (
        ".hidden.parquet",
        "._a.parquet",
        "_metadata",
        "_SUCCESS",
        ".a.snappy.parquet.crc",
        "d/_temporary/x.parquet",
    ):
        (metadata / name).parent.mkdir(exist_ok=True)
        (metadata / name).write_bytes(b"not parquet")
    (metadata / "g.csv.gz").write_bytes(gzip.compress(b"url,caption\n"))
    (metadata / "h.parquet.part").touch()
    (metadata / "README.md").touch()
    pq.ParquetWriter(metadata / "i.parquet", pa.schema({"url": pa.string(), "caption": pa.string()})).close()
    write(metadata / "j.parquet", [pair(4)])
    pq.write_table(pq.read_table(metadata / "j.parquet").slice(1), metadata / "j.parquet")
    assert main(["select", *own_settings(tmp_path), "data.select.processes=1"]) == 0
    assert "own: 4 of 4 rows kept" in (printed := capsys.readouterr().out)
    assert f"data.sources.own.metadata={metadata}: passed over g.csv.gz, h.parquet.part, as only" in printed
    assert pq.read_table(tmp_path / "selected" / "own" / "00000.parquet")["url"].to_pylist() == urls(0, 1, 2, 3)


def test_links_are_followed_once(tmp_path: Path) -> None:
    """To a file, to a folder on another disk, to a folder twice, and in circles."""
    metadata, disk = tmp_path / "own", tmp_path / "disk"
    write(disk / "parts" / "b.parquet", [pair(1)])
    write(disk / "c.parquet", [pair(2)])
    write(metadata / "real" / "a.parquet", [pair(0)])
    (metadata / "b").symlink_to(disk / "parts")
    (metadata / "c.parquet").symlink_to(disk / "c.parquet")
    (metadata / "also").symlink_to(metadata / "real")
    (metadata / "real" / "circle").symlink_to(metadata)
    (disk / "parts" / "back").symlink_to(disk / "parts")
    assert kept(tmp_path) == urls(1, 2, 0)
    before = contents(tmp_path / "selected"), read_selection(tmp_path / "selected" / "own")
    # Moved to another disk and linked, it is the same metadata.
    shutil.move(metadata, disk / "own")
    (tmp_path / "own").symlink_to(disk / "own")
    (disk / "own" / "real" / "circle").unlink()
    (disk / "own" / "also").unlink()
    select(own(tmp_path))
    assert (contents(tmp_path / "selected"), read_selection(tmp_path / "selected" / "own")) == before


def test_folders_name_columns(tmp_path: Path) -> None:
    for number, (place, label, score) in enumerate(
        [("en/", "UNLIKELY", 0.5), ("en/", "NSFW", 1), ("d%C3%A9/", None, 0.25)]
    ):
        label = label or "__HIVE_DEFAULT_PARTITION__"
        write(tmp_path / "own" / f"lang={place}NSFW={label}/punsafe={score}" / "0.parquet", [pair(number)])
    data = own(tmp_path, "data.select.filters.nsfw_labels=[NSFW]")
    select(data)
    assert [(row["url"], row["nsfw"], row["punsafe"]) for row in selected(data)] == [
        (urls(2)[0], None, 0.25),
        (urls(0)[0], "UNLIKELY", 0.5),
    ]
    write(tmp_path / "own" / "punsafe=low" / "0.parquet", [pair(9)])
    with pytest.raises(ConfigError, match=r"0\.parquet: column punsafe is 'low' in a folder's name, numbers expected"):
        select(data)
    data.sources["own"].columns = {"license": "lang", "punsafe": None}
    (tmp_path / "own" / "punsafe=low" / "0.parquet").unlink()
    select(data)
    assert [row["license"] for row in selected(data)] == ["d\u00e9", "en"]


def test_what_the_pipeline_wrote_is_no_metadata(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [pair(0)])
    data = own(tmp_path)
    data.sources["own"].metadata = str(tmp_path)
    for overrides in ([], ["data.select.filters.side_min=9"]):
        data.select = own(tmp_path, *overrides).select
        select(data)
        assert len(selected(data)) == 1
    write(tmp_path / "shards" / "own" / "00000" / "00000.parquet", [pair(1)])
    select(data)


def broken(folder: Path, name: str) -> None:
    """A table below `folder` that cannot be read."""
    file = folder / "a.parquet"
    folder.mkdir(exist_ok=True)
    if name == "empty":
        file.touch()
    elif name == "cut":
        write(file, [pair(0)])
        file.write_bytes(file.read_bytes()[:-20])
    elif name == "csv":
        file.write_bytes(b"url,caption\nhttp://a.org/,a cat\n")
    elif name == "other formats":
        for other in ("a.csv", "b.csv.gz", "c.parquet.gz", "d.arrow"):
            (folder / other).touch()
    elif name == "no ending":
        write(folder / "part-00000", [pair(0)])
    elif name == "dangling file":
        file.symlink_to("/mnt/away/a.parquet")
    elif name == "dangling folder":
        write(file, [pair(0)])
        (folder / "more").symlink_to("/mnt/away")
    elif name == "circle":
        file.symlink_to(file)
    elif name == "delta":
        write(file, [pair(0)])
        (folder / "_delta_log").mkdir()
        (folder / "_delta_log" / "0.json").touch()
    elif name == "no columns":
        pq.write_table(pa.table({}), file)
    elif name == "nested":
        pq.write_table(pa.table({"url": ["u"], "caption": pa.array([{"en": "a cat"}])}), file)
    elif name == "list":
        pq.write_table(pa.table({"url": ["u"], "caption": [["a cat", "a pet"]]}), file)
    elif name == "time":
        pq.write_table(pa.table({"url": ["u"], "caption": ["c"], "width": pa.array([1], pa.timestamp("s"))}), file)
    elif name == "twins":
        pq.write_table(pa.table([["u"], ["u"], ["c"]], ["url", "url", "caption"]), file)
    elif name == "encrypted":
        encrypt(file, plain_footer=False)
    elif name == "encrypted columns":
        encrypt(file, plain_footer=True)


class Wrapping(pe.KmsClient):
    """Keys that are no secret."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return key_bytes.hex().encode()

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return bytes.fromhex(wrapped_key.decode())


def encrypt(file: Path, plain_footer: bool) -> None:
    table = pa.table({"url": ["u"], "caption": ["c"]})
    settings = pe.EncryptionConfiguration("k", column_keys={"k": ["url"]}, plaintext_footer=plain_footer)
    factory = pe.CryptoFactory(lambda _: Wrapping())
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(file, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


MESSAGES = {
    "empty": r" \S+a\.parquet cannot be read as parquet \(Parquet file size is 0 bytes\); fetch it again, or rem",
    "cut": r"a\.parquet cannot be read as parquet \(.*\); fetch it again, or remove it",
    "csv": r"a\.parquet cannot be read as parquet \(.*\); convert it to parquet, e\.g\. in DuckDB by COPY",
    "other formats": r"no parquet file there, only a\.csv, b\.csv\.gz, c\.parquet\.gz and 1 more; convert it",
    "no ending": r"no parquet file there, only part-00000; put the metadata there or",
    "dangling file": r"a\.parquet leads to /mnt/away/a\.parquet, which does not exist\); mount its disk, or ",
    "dangling folder": r"more leads to /mnt/away, which does not exist\); mount its disk, or remove the link",
    "circle": r"its links form a circle",
    "delta": r"a Delta table, whose log says which rows are deleted; export",
    "no columns": r"a\.parquet has no URL column \(url or image_url\), only no columns",
    "nested": r"column caption is of type struct<en: string>, text expected; convert or drop it, or name another by",
    "list": r"column caption is of type list<.*>, text expected; convert or drop it, or name another by data\.s",
    "time": r"column width is of type timestamp\[ms\], numbers expected",
    "twins": r"a\.parquet has url and url; leave one of them$",
    "encrypted": r"a\.parquet cannot be read as parquet \(.*\); it is encrypted: decrypt it",
    "encrypted columns": r"a\.parquet cannot be read as parquet \(.*\); it is encrypted: decrypt it",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    broken(tmp_path / "own", name)
    with pytest.raises(ConfigError, match=r"^data\.sources\.own\.metadata[=:][^\n]*" + MESSAGES[name]) as raised:
        select(own(tmp_path))
    assert "\n" not in str(raised.value)


def test_one_dangling_link_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "own").symlink_to("/mnt/away")
    with pytest.raises(
        ConfigError, match=r"own\.metadata=\S+: cannot be read \(\S+ leads to /mnt/away, which does not"
    ):
        select(own(tmp_path))


def img2dataset_output(file: Path, **columns: list[Any]) -> None:
    """What img2dataset writes beside its shards: three good images, and two that did not arrive."""
    original, resized = [600, 500, 640, None, None], [256, 256, 256, None, None]
    table = {
        **{name: [pair(number)[name] for number in range(5)] for name in ("url", "caption")},
        "key": [f"{number:09d}" for number in range(5)],
        "status": ["success", "success", None, "failed_to_download", "failed_to_resize"],
        "error_message": [None, None, None, "HTTP Error 404: Not Found", "Image decoding error"],
        **{"width": resized, "height": resized, "original_width": original, "original_height": original},
        **{"exif": ["{}"] * 5, "sha256": ["0" * 64] * 5, **columns},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), file)


@pytest.mark.parametrize("schema", ["table", "laion2b_en", "coyo700m", "datacomp"])
def test_the_size_is_that_of_the_published_picture(tmp_path: Path, schema: str) -> None:
    img2dataset_output(tmp_path / "own" / "a.parquet", WIDTH=[1] * 5, uid=list("abcde"))
    data = own(tmp_path, "data.select.filters.side_min=512")
    data.sources["own"].schema = schema
    select(data)
    rows = selected(data)
    assert [row["url"] for row in rows] == urls(0, 2)
    assert [(row["metadata_width"], row["metadata_height"]) for row in rows] == [(600, 600), (640, 640)]
    assert not {"status", "metadata_status"} & set(rows[0])
    selection = read_selection(tmp_path / "selected" / "own")
    assert selection is not None
    assert selection.counts == {"status of a failed download": 2, "side too short": 1}
    # Whoever wants to try those again says so.
    data.sources["own"].columns = {"status": None}
    select(data)
    assert [row["url"] for row in selected(data)] == urls(0, 2, 3, 4)


def test_width_and_height_are_of_one_picture(tmp_path: Path) -> None:
    rows = {"url": urls(0), "caption": ["a cat"], "original_width": [600], "width": [256], "height": [200]}
    (tmp_path / "own").mkdir()
    pq.write_table(pa.table({**rows, "status": [200]}), tmp_path / "own" / "a.parquet")
    data = own(tmp_path)
    select(data)
    assert [(row["metadata_width"], row["metadata_height"]) for row in selected(data)] == [(256, 200)]


def test_columns_are_named_by_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {
        "Link": urls(0, 1),
        "my_text": ["a cat", "a dog"],
        "WIDTH": [100, 900],
        "width": [900, 100],
        "h": [600, 600],
    }
    (tmp_path / "own").mkdir()
    pq.write_table(pa.table({**table, "score": [0.5, 0.1]}), tmp_path / "own" / "a.parquet")
    settings = [*own_settings(tmp_path), "data.select.processes=1"]
    names = {"url": "link", "caption": "my_text", "width": "WIDTH", "height": "h", "similarity": "score"}

    def typed(**columns: str | None) -> tuple[int, str]:
        given = ", ".join(f"{role}: {name or 'null'}" for role, name in columns.items())
        status = main(
            ["select", *settings, f"data.sources.own.columns={{{given}}}", "data.select.filters.similarity_min=0"]
        )
        return status, capsys.readouterr().err

    assert typed(**names) == (0, "")
    part = pq.read_table(tmp_path / "selected" / "own" / "00000.parquet")
    assert (part["url"].to_pylist(), part["metadata_width"].to_pylist()) == (urls(1), [900])
    assert part["similarity"].to_pylist() == pytest.approx([0.1])
    for changed, message in (
        (
            {"captoin": "my_text"},
            "columns.captoin=my_text: the schema table has no such column (nearest: caption); choose",
        ),
        (
            {"caption": "my_txet"},
            "a.parquet has no such column (nearest: my_text); it has Link, my_text, WIDTH, width, h",
        ),
        (
            {"width": "Width"},
            "has WIDTH and width; leave one of them, or name one by data.sources.own.columns={width: ",
        ),
        ({"url": "[link]"}, "columns.url=['link']: must be the name of a column, or null"),
        (
            {"url": None},
            "has no URL column (url or image_url), only Link, my_text, WIDTH",
        ),
    ):
        status, error = typed(**{**names, **changed})
        assert (status, error.count("\n")) == (2, 1)
        assert error.startswith("error: data.sources.own.")
        assert message in error
    names.pop("width")
    assert (
        "has WIDTH and width; leave one of them, or name one by data.sources.own.columns={width: width}"
        in typed(**names)[1]
    )


def test_datacomp(tmp_path: Path) -> None:
    table = {
        **{"uid": ["f" * 32] * 2, "url": urls(0, 1), "text": ["a cat", "a dog"], "sha256": ["0" * 64] * 2},
        **{"original_width": [600, 600], "original_height": [500, 500]},
        **{"clip_b32_similarity_score": [0.35, 0.25], "clip_l14_similarity_score": [0.1, 0.9]},
        "face_bboxes": [[[0.1, 0.2, 0.3, 0.4]], []],
    }
    (tmp_path / "own").mkdir()
    pq.write_table(pa.table(table), tmp_path / "own" / "a.parquet")
    data = own(tmp_path, "data.select.filters.similarity_min=0.3")
    data.sources["own"].schema = "datacomp"
    select(data)
    (row,) = selected(data)
    assert row.pop("uid") != "f" * 32
    assert row.pop("clip_b32_similarity_score") == pytest.approx(0.35)
    assert row.pop("clip_l14_similarity_score") == pytest.approx(0.1)
    assert row == {
        **{"url": urls(0)[0], "caption": "a cat", "datacomp_uid": "f" * 32, "metadata_sha256": "0" * 64},
        **{"metadata_width": 600, "metadata_height": 500},
    }


def test_block_lists_are_files_folders_and_links(tmp_path: Path) -> None:
    large = 2**64 - 3
    rows = [pair(number, hash=number - 5) for number in range(7)]
    rows[6]["url"] = "HTTP://Example.org/caf%C3%A9 \u00fc.jpg#top"
    write(tmp_path / "own" / "a.parquet", rows)
    lists, disk = tmp_path / "lists", tmp_path / "disk"
    disk.mkdir()
    lists.mkdir()
    (disk / "a.txt").write_text(f"{urls(0)[0]}\nhttps://example.org/caf\u00e9%20\u00fc.jpg\n")
    with gzip.open(lists / "b.txt.gz", "wt") as file:
        file.write(urls(1)[0].replace("https:", ""))
    (lists / "disk").symlink_to(disk)
    (lists / ".hidden").write_bytes(b"\xff")
    pq.write_table(pa.table({"h": pa.array([large], pa.uint64())}), tmp_path / "h.PARQUET")
    settings = [f"data.select.block_lists.url=[{lists}]", f"data.select.block_lists.hash=[{tmp_path}/h.PARQUET]"]
    assert kept(tmp_path, *settings) == urls(3, 4, 5)
    (disk / "more.txt").write_text(urls(5)[0])
    assert kept(tmp_path, *settings) == urls(3, 4)
    pq.write_table(pa.table({"u": pa.array([["x"]])}), lists / "c.parquet")
    with pytest.raises(ConfigError, match=r"^data\.select\.block_lists\.url: \S+c\.parquet cannot be read \("):
        kept(tmp_path, *settings)
    (lists / "c.parquet").unlink()
    (lists / "d").symlink_to("/mnt/away")
    with pytest.raises(
        ConfigError, match=r"^data\.select\.block_lists\.url: \S+lists: \S+d cannot be read \(\S+ leads to"
    ):
        kept(tmp_path, *settings)


def test_the_forms_of_an_address_are_one(tmp_path: Path) -> None:
    forms = [
        *(
            "http://example.org/caf\u00e9 1.jpg",
            " HTTP://EXAMPLE.ORG:80/caf%C3%A9%201.jpg#a\n",
            "http:\\\\example.org\\caf\u00e9 1.jpg",
        ),
        *("//example.org/./caf\u00e9%201.jpg", "http://example.org/caf\u00e9%202.jpg"),
    ]
    write(tmp_path / "own" / "a.parquet", [pair(number, url=url) for number, url in enumerate(forms)])
    # The parts have the URL as it was published.
    assert kept(tmp_path, "data.select.filters.duplicate_urls=drop") == [forms[0], forms[4]]
    for form in forms[:2]:
        (tmp_path / "list.txt").write_text(form.strip())
        assert kept(tmp_path, f"data.select.block_lists.url=[{tmp_path}/list.txt]") == [forms[4]]


def test_a_plan_is_as_before(tmp_path: Path) -> None:
    """An earlier finished selection is not made anew: its plan has these settings and no others."""
    write(tmp_path / "own" / "a.parquet", [pair(0)])
    data = own(tmp_path)
    select(data)
    selection = read_selection(tmp_path / "selected" / "own")
    assert selection is not None
    others = {
        name for name in selection.plan if not name.startswith(("data.select.filters.", "data.select.block_lists."))
    }
    assert others == {
        *("data.select.rows_per_part", "data.allow_loopback", "the rules of select"),
        *("data.sources.own.schema", "data.sources.own.metadata"),
    }
    assert selection.plan["the rules of select"] == 1
    assert [name for name, _ in selection.plan["data.sources.own.metadata"]] == ["a.parquet"]
    assert len([name for name in selection.plan if name.startswith("data.select.filters.")]) == 15


def test_sources_that_share_a_table(tmp_path: Path) -> None:
    """Two sources may name different columns of the same files."""
    (tmp_path / "own").mkdir()
    table = {"url": urls(0), "en": ["a cat"], "de": ["eine Katze"]}
    pq.write_table(pa.table(table), tmp_path / "own" / "a.parquet")
    data = config(tmp_path)
    data.sources = {name: table_source(tmp_path, name) for name in ("en", "de")}
    for name, source in data.sources.items():
        source.metadata, source.columns = f"{tmp_path}/own", {"caption": name}
    select(data)
    assert [selected(data, name)[0]["caption"] for name in data.sources] == ["a cat", "eine Katze"]
