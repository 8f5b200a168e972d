"""Every remedy that an error names is tried: its cause is made, the command names it, the remedy is done, and it works.

A row of the table is a cause, what the command then says, and what its message asks for.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cases import with_slow
from tests.programs import program
from tests.world import DATA, IMAGES, INDEX, LATENTS, SAMPLER, TRAIN, WRITERS, World, one_line, quoted, with_output
from vdtrain.data.manifest import SHARDS_FILE, Manifest, read_shards
from vdtrain.data.stream import PairStream, StreamError

# --- folders for results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_is_a_file_or_below_one_is_said_before_work(world: World, name: str) -> None:
    if name in ("select", "selected"):
        assert world.type("python", "-m", "miniature", "draw", *DATA, *IMAGES)[0] == 0
    (world / "in the way").write_text("mine")
    before = sorted(world.folder.rglob("*"))
    for place in ("FOLDER/in the way", "FOLDER/in the way/deeper"):
        status, said = world.type(*with_output(name, place))
        line = one_line(said)
        assert status == 2, line
        assert f"{world / 'in the way'} is a file, not a folder); move {world / 'in the way'} away, or choose " in line
        assert sorted(world.folder.rglob("*")) == before
    assert (world / "in the way").read_text() == "mine"
    (world / "in the way").rename(world / "away")
    status, said = world.type(*with_output(name, "FOLDER/in the way/deeper"))
    assert status == 0, said


def full(world: World) -> str:
    world.mount(world / "disk", "size=16k")
    (world / "disk" / "fill").write_bytes(bytes(12 << 10))
    with pytest.raises(OSError, match="No space"), (world / "disk" / "more").open("wb") as file:
        file.write(bytes(1 << 20))
    return "No space left on device); make room, or choose another place"


def make_room(world: World, line: str) -> None:
    world.shell(f"mount -o remount,size=1g '{world / 'disk'}'")


def without_inodes(world: World) -> str:
    world.mount(world / "disk", "size=1g,nr_inodes=3")
    for name in "ab":
        (world / "disk" / name).touch()
    return "no more files fit on its disk, whatever their size); remove files there (`df -i"


def remove_files(world: World, line: str) -> None:
    world.shell(quoted(line)[0])
    world.shell("rm disk/a disk/b; mount -o remount,nr_inodes=1000 disk")


def read_only(world: World) -> str:
    world.mount(world / "disk", "size=1g,ro")
    return "its file system is read-only); mount it for writing (`mount -o remount,rw "


def protected(world: World) -> str:
    world.protect(world / "disk")
    return f"{world / 'disk'} is protected); remove the protection (`lsattr -d {world / 'disk'}`, `chattr -ia "


def unmounted(world: World) -> str:
    (world / "disk").symlink_to(world / "scratch")
    return f"{world / 'disk'} leads to {world / 'scratch'}, which does not exist); mount its disk, or remove the link"


def in_a_circle(world: World) -> str:
    (world / "disk").symlink_to(world / "disk")
    return "its links form a circle); fix the links (`namei -l"


def typed(world: World, line: str) -> None:
    world.type_all(line)


def mend(world: World, line: str) -> None:
    (world / "disk").unlink()


# Cause, and remedy, of a folder called disk.
FOLDERS: dict[str, tuple[Callable[[World], str], Callable[[World, str], None]]] = {
    "full": (full, make_room),
    "no inodes": (without_inodes, remove_files),
    "read-only": (read_only, typed),
    "protected": (protected, typed),
    "unmounted": (unmounted, lambda world, line: (world / "scratch").mkdir()),
    "circle": (in_a_circle, mend),
}


@pytest.mark.parametrize("cause", FOLDERS)
@pytest.mark.parametrize("name", ["shapes", "preflight"])
def test_each_cause_of_a_folder_that_cannot_be_written_has_its_own_remedy(world: World, cause: str, name: str) -> None:
    make, remedy = FOLDERS[cause]
    expected = make(world)
    status, said = world.type(*with_output(name, "FOLDER/disk/out"))
    line = one_line(said)
    assert status == 2
    assert expected in line
    assert ("make room" in line) == (cause == "full")
    remedy(world, line)
    status, said = world.type(*with_output(name, "FOLDER/disk/out"))
    assert status == 0, said


def test_a_folder_of_another_user_asks_for_access(world: World) -> None:
    if os.geteuid() != 0:
        pytest.skip("permissions are another user's only where this one can become it")
    with tempfile.TemporaryDirectory() as folder:
        # Where nobody may look, all the way down from /tmp.
        place = Path(folder) / "private"
        place.mkdir(mode=0o755)
        Path(folder).chmod(0o755)
        words = [*with_output("shapes", f"{place}/out"), f"data.root={place}"]
        os.seteuid(65534)
        try:
            status, said = world.type(*words)
            line = one_line(said)
        finally:
            os.seteuid(0)
        assert status == 2
        assert re.search(r"permission denied to user \w+\); give that user access \(`ls -ld ", line)
        assert "make room" not in line
        typed(world, line)
        place.chmod(0o777)
        os.seteuid(65534)
        try:
            status, said = world.type(*words)
        finally:
            os.seteuid(0)
        assert status == 0, said


def test_another_place_and_a_shorter_name_are_remedies(world: World) -> None:
    status, said = world.type(*with_output("shapes", "FOLDER/" + "n" * 300))
    assert status == 2
    assert "too long for the name of a file or folder; give a shorter one" in one_line(said)
    # A name that is short enough itself, and not with what is added while it is written.
    words = ["vdtrain", "weights", "export", "safetensors", "checkpoint=FOLDER/model"]
    status, said = world.type(*words[:4], "FOLDER/" + "n" * 250, *words[4:])
    assert status == 2
    assert "cannot be written (the name is too long); choose a shorter name, or choose another place" in one_line(said)
    assert world.type(*with_output("shapes", "FOLDER/" + "n" * 30))[0] == 0


def test_a_disk_that_fills_while_results_are_written_is_one_line_and_leaves_nothing(world: World) -> None:
    world.mount(world / "disk", "size=200k")
    words = ["vdtrain", "weights", "export", "safetensors", "FOLDER/disk/out", "checkpoint=FOLDER/model"]
    status, said = world.type(*words)
    assert status == 2
    assert "output=" in one_line(said)
    assert "No space left on device); make room, or choose another place" in said
    assert list((world / "disk").iterdir()) == []
    make_room(world, said)
    assert world.type(*words)[0] == 0


# --- data ------------------------------------------------------------------------------------------------------------


def shard(world: World) -> Path:
    return world / "shards/laion2b_en/00000.tar"


def remove_shard(world: World) -> None:
    shard(world).rename(world / "moved.tar")


def bring_back(world: World, line: str) -> None:
    (world / "moved.tar").rename(shard(world))


def index_again(world: World, line: str) -> None:
    assert "python -m data_pipeline index" in quoted(line)
    assert world.type(*INDEX)[0] == 0


def unmount_shards(world: World) -> None:
    (world / "shards").rename(world / "elsewhere")


def mount_shards(world: World, line: str) -> None:
    (world / "elsewhere").rename(world / "shards")


def shorten_shard(world: World) -> None:
    with tarfile.open(shard(world)) as tar:
        members = [(each, tar.extractfile(each)) for each in tar.getmembers()[:6]]
        with tarfile.open(world / "short.tar", "w") as short:
            for member, content in members:
                short.addfile(member, content)
    (world / "short.tar").replace(shard(world))
    (world / "shards/laion2b_en/00000_stats.json").write_text('{"status_dict": {"success": 2}}')


def make_manifest_anew(world: World, line: str) -> None:
    assert f"move the folder {world / 'manifest'} away and make it again" in line
    (world / "manifest").rename(world / "away")
    index_again(world, line)


def cut_manifest(world: World) -> None:
    file = world / "manifest" / SHARDS_FILE
    file.write_bytes(file.read_bytes()[:-20])


def older_manifest(world: World) -> None:
    table = read_shards(world / "manifest").drop_columns(["sides"])
    pq.write_table(table, world / "manifest" / SHARDS_FILE)


def lose_samples(world: World) -> None:
    next((world / "manifest").glob("samples-*.parquet")).unlink()


def make_latents(world: World) -> Path:
    assert world.type(*LATENTS)[0] == 0
    return next((world / "latents/32").glob("*.safetensors"))


def damage_description(world: World) -> None:
    make_latents(world)
    (world / "latents/32/latents.json").write_text("{")


def remove_latents(world: World, line: str) -> None:
    assert f"remove {world / 'latents/32'}" in line
    shutil.rmtree(world / "latents/32")


MANIFEST = "data.manifest=FOLDER/manifest: "
DATA_CASES: dict[str, tuple[Callable[[World], object], str, Callable[[World, str], None]]] = {
    "a shard is gone, and comes back": (
        remove_shard,
        "00000.tar: is not there; bring it back, or index the shards again",
        bring_back,
    ),
    "a shard is gone": (remove_shard, "00000.tar: is not there; bring it back, or index the shards again", index_again),
    "the shards' disk is not mounted": (
        unmount_shards,
        "folder FOLDER/shards does not exist); mount its disk, or restore the folder",
        mount_shards,
    ),
    "a shard was made anew, shorter": (
        shorten_shard,
        "00000.tar: made anew since the index",
        index_again,
    ),
    "there is no manifest": (
        lambda world: shutil.rmtree(world / "manifest"),
        f"{MANIFEST}shards.parquet is not there; make it with `python -m data_pipeline index`",
        index_again,
    ),
    "the manifest is damaged": (cut_manifest, f"{MANIFEST}shards.parquet cannot be read", make_manifest_anew),
    "the manifest is of another layout": (
        older_manifest,
        f"{MANIFEST}shards.parquet has another",
        make_manifest_anew,
    ),
    "a file of samples is gone": (lose_samples, f"{MANIFEST}samples-00000.parquet is not there; run `", index_again),
    "latents are of nobody knows what": (
        damage_description,
        "latents.json cannot be used",
        remove_latents,
    ),
}


@pytest.mark.parametrize("name", DATA_CASES)
def test_the_index_is_the_remedy_only_where_shards_changed(world: World, name: str) -> None:
    cause, expected, remedy = DATA_CASES[name]
    cause(world)
    status, said = world.type(*LATENTS)
    line = one_line(said)
    assert status == 2
    assert expected.replace("FOLDER", str(world.folder)) in line
    remedy(world, line)
    status, said = world.type(*LATENTS)
    assert status == 0, said


def test_a_manifest_that_is_a_file_is_asked_for_as_a_folder(world: World) -> None:
    words = ["vdtrain", "evaluate", *SAMPLER, *DATA, "samples=2", "part_samples=2", "flows=[text-to-text]"]
    words.append("loader_workers=1")
    status, said = world.type(*words, "data.manifest=FOLDER/manifest/shards.parquet")
    assert status == 2
    assert one_line(said).endswith("shards.parquet: is a file; give the folder that holds shards.parquet")
    assert world.type(*words, "data.manifest=FOLDER/manifest")[0] == 0


def test_too_many_open_files_is_no_matter_of_the_index(world: World) -> None:
    def opened() -> PairStream:
        stream = PairStream(world / "manifest", seed=0, resolution=32, global_batch_size=4, workers=1)
        for number in range(len(stream.manifest.shards)):
            stream._samples(number)  # the manifest is read before files run out
        return stream

    stream = opened()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    spare = [os.dup(0) for _ in range(highest)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
    try:
        with pytest.raises(StreamError) as failure:
            next(iter(stream))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)
        stream.close()
    line = str(failure.value)
    assert re.search(r"00000\.tar: cannot be read \(too many open files, the limit is \d+\); raise the limit", line)
    (command,) = quoted(line)
    assert "index" not in line
    world.shell(f"{command} && exec 50</dev/null")
    again = opened()
    assert len(next(iter(again)).positions) == 4
    again.close()


def overwrite_images(world: World, keep_time: bool) -> None:
    """Zeros where the images of a shard were, as a disk leaves them."""
    found = Manifest(world / "manifest")
    number = found.paths.index(next(path for path in found.paths if "laion2b_en" in path))
    rows, status = found.rows(number), shard(world).stat()
    with shard(world).open("r+b") as file:
        for offset, size in zip(rows.offset.tolist(), rows.size.tolist(), strict=True):
            file.seek(offset)
            file.write(bytes(size))
    if keep_time:
        os.utime(shard(world), ns=(status.st_atime_ns, status.st_mtime_ns))


EVALUATE = ["vdtrain", "evaluate", *SAMPLER, *DATA, "samples=24", "part_samples=24", "flows=[text-to-text]"]


@pytest.mark.parametrize(
    "kind", with_slow({kind: kind for kind in ("written since", "not decoded", "decoded")}, ["decoded"])
)
def test_images_that_cannot_be_decoded_name_the_index_only_where_it_looks_again(world: World, kind: str) -> None:
    words = [*EVALUATE, "loader_workers=1", "output_dir=FOLDER/out"]
    good = shard(world).read_bytes()
    if kind == "decoded":
        assert world.type(*INDEX, "data.index.decode=true")[0] == 0
    overwrite_images(world, keep_time=kind != "written since")
    status, said = world.type(*words)
    line = one_line(said)
    assert status == 1
    assert ("10 samples in a row" in line) == (kind != "written since")
    if kind == "written since":
        assert "made anew since the index; index the shards again" in line
        # The headers are gone too, so that the index sees what has become of the shard.
        index_again(world, line)
    elif kind == "not decoded":
        assert quoted(line) == ["python -m data_pipeline index data.index.decode=true"]
        assert world.type(*INDEX, "data.index.decode=true")[0] == 0
    else:
        # An index would pass over what it has seen and decoded.
        assert world.type(*INDEX, "data.index.decode=true")[0] == 0
        assert one_line(world.type(*words)[1]) == line
        assert "its disk may have changed the shard: put a whole copy in its place, and index again" in line
        shard(world).write_bytes(good)
        assert world.type(*INDEX)[0] == 0
    status, said = world.type(*words, "samples=16", "part_samples=16", "output_dir=FOLDER/other")
    assert status == 0, said


SELECT = ["python", "-m", "data_pipeline", "select", *DATA]
DOWNLOAD = ["python", "-m", "data_pipeline", "download", *DATA, "data.download.parts=[]"]


def lose_part(world: World) -> None:
    (world / "selected/coyo700m/00000.parquet").unlink()


def damage_record(world: World) -> None:
    (world / "selected/coyo700m/selection.json").write_bytes(b"\xff{")


def lose_record(world: World) -> None:
    shutil.rmtree(world / "selected")


def select_again(world: World, line: str) -> None:
    if "remove the folder" in line:
        shutil.rmtree(world / "selected/coyo700m")
    assert "python -m data_pipeline select" in quoted(line)
    assert world.type(*SELECT)[0] == 0


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (lose_record, "no selection.json there; run `"),
        (lose_part, "00000.parquet is missing; run `"),
        (damage_record, "selection.json: cannot be read"),
    ],
)
def test_what_is_lost_of_a_selection_is_selected_again(
    world: World, cause: Callable[[World], None], expected: str
) -> None:
    assert world.type("python", "-m", "miniature", "draw", *DATA, *IMAGES)[0] == 0
    assert world.type(*SELECT)[0] == 0
    before = {file.name: file.read_bytes() for file in (world / "selected/coyo700m").glob("*.parquet")}
    cause(world)
    words = [word for word in DOWNLOAD if "parts" not in word] if cause is lose_part else DOWNLOAD
    status, said = world.type(*words, "data.download.python=/bin/true")
    assert status == 2
    line = one_line(said)
    assert expected in line
    select_again(world, line)
    # What was selected is as it was, so that shards that were made of it stay good.
    assert {file.name: file.read_bytes() for file in (world / "selected/coyo700m").glob("*.parquet")} == before
    status, said = world.type(*DOWNLOAD)
    assert status == 0, said


def test_where_no_shards_are_the_download_comes_first(world: World) -> None:
    (world / "shards").rename(world / "made")
    shutil.rmtree(world / "manifest")
    status, said = world.type(*INDEX)
    assert status == 1
    assert quoted(one_line(said)) == ["python -m data_pipeline download"]
    (world / "made").rename(world / "shards")
    assert world.type(*INDEX)[0] == 0


def test_records_of_a_pipeline_that_are_damaged_are_made_again(world: World) -> None:
    drawing = ["python", "-m", "miniature", "draw", *DATA, *IMAGES]
    assert world.type(*drawing)[0] == 0
    (marker,) = (path for path in (world / "images").glob("*.json"))
    marker.write_bytes(b"\xff")
    (world / "selected/.scratch").mkdir(parents=True)
    (world / "selected/.scratch/plan.json").write_text("{")
    assert world.type(*drawing)[0] == 0
    assert world.type(*SELECT)[0] == 0


# --- runs ------------------------------------------------------------------------------------------------------------

SHORT = ["stage=stage1_single_flow", "stage.global_batch_size=2", "hardware.micro_batch_size={32:1,64:1}"]
SHORT += ["stage.phases=[{resolution:32,samples:4}]", "checkpoint.every_steps=1", "log_every_steps=1"]


def start(world: World, *words: str, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """`vdtrain train` in a process of its own."""
    given = [word.replace("FOLDER", str(world.folder)) for word in (*SHORT, *TRAIN, *words)]
    environment = {**os.environ, **(variables or {}), "OMP_NUM_THREADS": "1"}
    command = [program("python"), "-m", "vdtrain", "train", *given]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_run_whose_disk_is_full_asks_for_room_and_goes_on_with_it(world: World) -> None:
    world.mount(world / "disk", "size=10m")
    first = start(world, "run_dir=FOLDER/disk/run")
    said = first.communicate()[1]
    assert first.returncode == 1
    line = one_line(said)
    assert "the checkpoint of step 2 was not saved: process 0: cannot be written (No space left on device)" in line
    assert line.endswith("; make room, then run the same command again")
    make_room(world, line)
    second = start(world, "run_dir=FOLDER/disk/run")
    assert second.wait() == 0, second.communicate()[1]


def test_a_port_that_is_taken_is_named_and_another_one_is_the_remedy(world: World) -> None:
    def launch(rank: int, port: int) -> subprocess.Popen[str]:
        place = ("RANK", str(rank)), ("LOCAL_RANK", str(rank)), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")
        return start(world, "run_dir=FOLDER/run", variables={**dict(place), "MASTER_PORT": str(port)})

    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        other = free.getsockname()[1]
        first = launch(0, taken.getsockname()[1])
        said = first.communicate()[1]
        assert first.returncode == 1
        expected = (
            f"error: process 0: MASTER_PORT={taken.getsockname()[1]}: another program listens there; give another"
        )
        assert one_line(said).startswith(expected)
        assert "lost" not in said
    both = [launch(rank, other) for rank in range(2)]
    assert [each.communicate()[1] for each in both] == ["", ""]
    assert [each.returncode for each in both] == [0, 0]
