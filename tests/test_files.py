"""What is written whole is never seen half, and what was there before is not lost."""

import os
from pathlib import Path

import pytest

from vdtrain.config.compose import ConfigError
from vdtrain.files import FileRecord, atomic_write, damage, draft_of, written_whole


def write(path: Path, text: str, overwrite: bool = False, fail: bool = False) -> None:
    with written_whole(path, f"output={path}", overwrite) as draft:
        draft.mkdir()
        (draft / "content").write_text(text)
        assert not path.exists() or (path / "content").read_text() != text
        if fail:
            raise OSError("disk full")


def test_a_folder_appears_whole_and_is_replaced_only_on_request(tmp_path: Path) -> None:
    write(tmp_path / "a", "one")
    with pytest.raises(ConfigError, match="exists already; overwrite=true replaces it"):
        write(tmp_path / "a", "two")
    write(tmp_path / "a", "two", overwrite=True)
    assert (tmp_path / "a" / "content").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "one")
    with pytest.raises(ConfigError, match=r"cannot be written \(disk full\)"):
        write(tmp_path / "a", "two", overwrite=True, fail=True)
    assert (tmp_path / "a" / "content").read_text() == "one"

    def refuse(self: Path, target: Path) -> Path:
        raise OSError("the file system went away")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ConfigError, match="went away"):
        write(tmp_path / "a", "two", overwrite=True)
    assert (tmp_path / "a" / "content").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("content")
    records = {"f": FileRecord.of(file)}
    assert damage(tmp_path, records) is None
    file.write_text("Content")
    assert "its checksum does not match" in str(damage(tmp_path, records))
    file.write_text("cont")
    assert "4 bytes instead of 7" in str(damage(tmp_path, records))
    file.unlink()
    assert "cannot be read" in str(damage(tmp_path, records))


def test_two_writers_of_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with written_whole(path, "output=f") as first:
        first.write_text("first")
        with written_whole(path, "output=f") as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_only_drafts_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "f[1]"
    gone, alive, other = (draft_of(path, 2**30), draft_of(path, os.getppid()), draft_of(tmp_path / "f", 2**30))
    for draft in (gone, alive, other):
        draft.write_text("half")
    with atomic_write(path) as draft:
        draft.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([alive, other, path])
