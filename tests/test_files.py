"""What is written whole is never seen half, and what was there before is not lost."""

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.settings import own_time
from vdtrain.config.compose import ConfigError
from vdtrain.files import FileRecord, LockedError, atomic_write, damage, draft_of, locked, written_whole


def write(path: Path, text: str, overwrite: bool = False, fail: bool = False) -> None:
    with written_whole(path, f"output={path}", overwrite, lambda folder: (folder / "content").exists()) as draft:
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


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    kept = tmp_path / "photos" / "a.png"
    kept.parent.mkdir()
    kept.write_text("an image")
    with pytest.raises(ConfigError, match="photos holds other files, which are not replaced; give another folder"):
        write(tmp_path / "photos", "two", overwrite=True)
    with (
        pytest.raises(ConfigError, match=r"photos is a folder, not a file\); move .*photos away"),
        written_whole(tmp_path / "photos", "output=photos", overwrite=True) as draft,
    ):
        draft.write_text("a file")
    assert kept.read_text() == "an image"
    (tmp_path / "empty").mkdir()
    with written_whole(tmp_path / "empty", "output=empty", True, lambda folder: False) as draft:
        draft.mkdir()
        (draft / "content").touch()
    assert (tmp_path / "empty" / "content").exists()


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


def test_a_lock_is_refused_at_once_while_its_holder_lives(tmp_path: Path) -> None:
    place = tmp_path / "new folder" / "a.lock"
    for _ in range(2):
        began = time.monotonic()
        with (
            locked(place),
            pytest.raises(LockedError, match=rf"a\.lock is held by process {os.getpid()} on {os.uname().nodename}$"),
            locked(place, wait_seconds=60),
        ):
            pytest.fail("two hold the lock")
        assert time.monotonic() - began < 10


def hold(place: Path, holder: str) -> int:
    """Lock a file as a process does that `locked` was not called in; returns the descriptor."""
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.write(descriptor, holder.encode())
    return descriptor


def test_a_lock_is_waited_for_if_only_children_of_a_dead_holder_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.lock"
    descriptor = hold(place, f"{2**22 + 1} on {os.uname().nodename}")
    with pytest.raises(LockedError), locked(place, wait_seconds=0.2):
        pytest.fail("two hold the lock")
    monkeypatch.setattr("vdtrain.files.time", own_time(sleep=lambda seconds: os.close(descriptor)))
    with locked(place, wait_seconds=60) as held:
        assert place.read_text() == f"{os.getpid()} on {os.uname().nodename}"
        # A process that the holder starts takes the lock as well, and keeps others out.
        child = hold(place, "")
        fcntl.flock(held, fcntl.LOCK_UN)
        with pytest.raises(LockedError), locked(place):
            pytest.fail("two hold the lock")
        os.close(child)


def test_a_holder_on_another_machine_counts_as_alive(tmp_path: Path) -> None:
    descriptor = hold(tmp_path / "a.lock", "1 on elsewhere")
    with pytest.raises(LockedError, match="1 on elsewhere"), locked(tmp_path / "a.lock", wait_seconds=60):
        pytest.fail("two hold the lock")
    os.close(descriptor)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("vdtrain.files.fcntl.flock", refuse)
    message = r"a\.lock: cannot be locked .*; choose a file system with locks"
    with pytest.raises(ConfigError, match=message), locked(tmp_path / "a.lock"):
        pytest.fail("the lock is held")


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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "folder") as draft:
            draft.mkdir()
            save_file({"tensor": torch.zeros(2)}, draft / "model.safetensors")
            (draft / "model.json").touch()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "folder").iterdir()} == {mode}
