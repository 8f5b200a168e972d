"""What is written whole is never seen half, and what was there before is not lost."""

from pathlib import Path

import pytest

from vdtrain.config.compose import ConfigError
from vdtrain.files import FileRecord, damage, written_whole


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
