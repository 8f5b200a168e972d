"""The command that fills the latent cache: killed, shared, run again, and what it refuses.

Some seconds on two free cores.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from data_pipeline.__main__ import main
from data_pipeline.index.index import index
from data_pipeline.latents.encoding import STALE_SECONDS
from tests.data.test_remote_shards import Server
from tests.evaluation.test_evaluate import stop_until_end_of
from tests.pairs import overwrite, write_shard
from tests.programs import Ending as RanksEnding
from tests.programs import run_ranks
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import ModalityConfig, TrainConfig
from vdtrain.config.validation import check, latent_encoder
from vdtrain.data.decode import DecodeError
from vdtrain.data.latents import DESCRIPTION_FILE, LatentFolder, LatentShards
from vdtrain.data.manifest import Manifest

SHARDS, COUNT, BATCH = 5, 21, 8
BATCHES = 3  # of each shard
OPTIMUS = "vdtrain.models.optimus.Optimus"


def overrides(data: Path, folder: Path, *more: str) -> list[str]:
    return [
        "model=tiny",
        "data=shapes",
        "hardware=cpu",
        f"data.manifest={data}/manifest",
        f"data.latent_cache.folder={folder}",
        "data.latent_cache.resolutions=[32]",
        f"data.latent_cache.batch_size={BATCH}",
        *more,
    ]


def write_data(folder: Path) -> Path:
    """Shards of images of 64 pixels, the last of them of 24."""
    (folder / "shards").mkdir(parents=True)
    for number in range(SHARDS + 1):
        write_shard(folder / "shards" / f"{number:05d}.tar", COUNT, number, pixels=64 if number < SHARDS else 24)
    index({"drawn": folder / "shards"}, folder / "manifest")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def endings(data: Path) -> dict[str, Ending]:
    folders = {name: data / name for name in ("alone", "killed", "shared")}
    cases = {
        "alone": Case(1, overrides(data, folders["alone"]), folders["alone"]),
        # In the second shard.
        "killed": Case(1, overrides(data, folders["killed"]), folders["killed"], kill_at=BATCHES + 2),
        "resumed": Case(1, overrides(data, folders["killed"]), folders["killed"]),
        "again": Case(1, overrides(data, folders["killed"]), folders["killed"]),
        "shared": Case(2, overrides(data, folders["shared"]), folders["shared"]),
        "half": Case(2, overrides(data, data / "half"), data / "half", kill_at=1),
    }
    return {name: case.run(data / name) for name, case in cases.items()}


def kill_at(batch: int) -> None:
    """End this process, if it is the first one, without a word when it encodes so many batches."""
    from vdtrain.models.image_vae import ImageVAE

    encode = ImageVAE.moments
    seen: list[int] = []

    def counting(self: Any, images: Any) -> Any:
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(1)
        return encode(self, images)

    if os.environ["RANK"] == "0":
        ImageVAE.moments = counting  # type: ignore[method-assign]


@dataclass(frozen=True)
class Ending(RanksEnding):
    """Of a case, with the names of its folder's files, and their inodes."""

    files: dict[str, int]


@dataclass(frozen=True)
class Case:
    """A start of the command, and the batch at which its first process is killed, if one is."""

    ranks: int
    arguments: list[str]
    folder: Path  # whose files are listed afterwards
    kill_at: int | None = None  # from 0

    def run(self, log: Path) -> Ending:
        start = ["-m"]
        if self.kill_at is not None:
            start = ["-m", "tests.programs.after", f"{__name__}:kill_at", str(self.kill_at)]
        words = [*start, "data_pipeline", "latents", *self.arguments]
        logs = [log.with_name(f"{log.name}-{rank}.log") for rank in range(self.ranks)]
        ending = run_ranks([words] * self.ranks, logs, 300)
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        inodes = {str(path.relative_to(self.folder)): path.stat().st_ino for path in files}
        return Ending(ending.statuses, ending.logs, inodes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_is_made(data: Path, endings: dict[str, Ending]) -> None:
    ending = endings["alone"]
    assert ending.statuses == [0], ending.logs
    total = SHARDS * COUNT
    expected = f"alone/32: {total} latents of {SHARDS} shards, 0.0 MB, 0 shards missing; this process encoded {total} "
    assert expected in ending.logs[0]
    assert len(ending.files) == SHARDS + 1
    LatentShards(data / "alone", Manifest(data / "manifest"), 32)


def test_a_killed_run_goes_on_where_it_was(data: Path, endings: dict[str, Ending]) -> None:
    killed, resumed, again = (endings[name] for name in ("killed", "resumed", "again"))
    assert killed.statuses == [-9]
    names = {name for name in killed.files if not name.endswith(DESCRIPTION_FILE)}
    assert len(names) == 1
    assert resumed.statuses == [0], resumed.logs
    assert f"this process encoded {(SHARDS - 1) * COUNT} images of {SHARDS - 1} shards" in resumed.logs[0]
    for name in names:
        assert resumed.files[name] == killed.files[name]
    assert contents(data / "killed") == contents(data / "alone")
    assert again.files == resumed.files
    assert "this process encoded 0 images of 0 shards" in again.logs[0]


def test_two_processes_make_the_same_files(data: Path, endings: dict[str, Ending]) -> None:
    ending = endings["shared"]
    assert ending.statuses == [0, 0], ending.logs
    assert f"this process encoded {3 * COUNT} images of 3 shards" in ending.logs[0]
    assert ending.logs[1] == ""
    assert contents(data / "shared") == contents(data / "alone")


def test_the_share_of_a_killed_process_is_made_by_the_next_run(data: Path, endings: dict[str, Ending]) -> None:
    ending = endings["half"]
    assert ending.statuses == [-9, 1], ending.logs
    assert "error: process 1: lost the connection to process 0, which has ended" in ending.logs[1]
    found = Manifest(data / "manifest")
    assert LatentFolder(data / "half", 32).missing(found, 32) == [0, 2, 4]
    assert main(["latents", *overrides(data, data / "half")]) == 0
    assert contents(data / "half") == contents(data / "alone")


def stand_still(given: tuple[str, str]) -> None:
    """Let the second process stand still in its second batch: asleep, or stopped until the first one has ended.

    Args:
        given: how, and a file for the number of the first process.
    """
    from vdtrain.models.image_vae import ImageVAE

    what, file = given[0], Path(given[1])
    encode, seen = ImageVAE.moments, []

    def hang(self: Any, images: Any) -> Any:
        seen.append(1)
        if len(seen) == 2 and what == "stopped":
            stop_until_end_of(file)
        if len(seen) == 2:
            time.sleep(3600)
        return encode(self, images)

    if os.environ["RANK"] == "1":
        ImageVAE.moments = hang  # type: ignore[method-assign]
    else:
        file.write_text(str(os.getpid()))


# An evaluation shows the other one in `make test`.
@pytest.mark.parametrize("what", [pytest.param("asleep", marks=pytest.mark.slow), "stopped"])
def test_a_process_that_stands_still_ends_the_others(data: Path, endings: dict[str, Ending], what: str) -> None:
    """As in training. A process that waits sees the other one end, or ends by its own watchdog at that moment."""
    given = overrides(data, data / what, "watchdog_seconds=10")
    how = json.dumps([what, f"{data}/{what}.pid"])
    words = ["-m", "tests.programs.after", f"{__name__}:stand_still", how, "data_pipeline", "latents"]
    ending = run_ranks([[*words, *given]] * 2, [data / f"{what}-{rank}.log" for rank in range(2)], 300)
    expected = [(1, 124), (124,)] if what == "asleep" else [(124,), (-9,)]
    assert all(status in each for status, each in zip(ending.statuses, expected, strict=True)), ending
    line = [line for line in ending.logs[expected.index((124,))].splitlines() if line.startswith("error")][-1]
    place = "at: encoding .*; see" if what == "asleep" else "at: waiting for process 1; process 1 did"
    assert re.search(f"stood still for [0-9]+ s, longer than watchdog_seconds=10, {place}", line)
    assert "Traceback" not in "".join(ending.logs)
    # What the others made stays.
    assert LatentFolder(data / what, 32).missing(Manifest(data / "manifest"), 32) == [1, 3]


def test_a_shard_that_one_process_cannot_read_ends_all_and_names_it(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    (data / "shards" / "00001.tar").unlink()
    words = ["-m", "data_pipeline", "latents", *overrides(data, tmp_path / "latents")]
    ending = run_ranks([words] * 2, [tmp_path / f"{rank}.log" for rank in range(2)], 300)
    assert ending.statuses == [1, 1], ending
    assert re.search(r"error: process 1: /\S*00001.tar: is not there; bring it back", ending.logs[1])
    assert "error: process 0: lost the connection to process 1" in ending.logs[0]


def test_only_old_drafts_of_other_machines_are_removed(data: Path, tmp_path: Path) -> None:
    folder = LatentFolder(tmp_path, 32)
    folder.path.mkdir()
    fresh, old = (folder.path / f"{name}.safetensors.elsewhere-1-0.incomplete" for name in ("fresh", "old"))
    fresh.touch()
    old.touch()
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    assert main(["latents", *overrides(data, tmp_path)]) == 0
    assert folder.missing(Manifest(data / "manifest"), 32) == []
    assert fresh.exists()
    assert not old.exists()


def test_a_shard_cache_is_made_as_in_training(data: Path, endings: dict[str, Ending], tmp_path: Path) -> None:
    with Server(data) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"data.stream.shard_root={server.address}/manifest"
        cache = f"+data.stream.cache={{folder: {tmp_path}/new/cache, gigabytes: 1}}"
        assert main(["latents", *overrides(data, tmp_path / "latents"), root, cache]) == 0
        server.shutdown()
    assert list((tmp_path / "new" / "cache").glob("*.tar"))
    assert contents(tmp_path / "latents") == contents(data / "alone")


def train_config(data: Path, folder: Path, *more: str) -> TrainConfig:
    settings = [setting for setting in overrides(data, folder) if "resolutions" not in setting]
    phases = "stage.phases=[{resolution:32,samples:32}]"
    batch = ["stage.global_batch_size=8", "hardware.micro_batch_size={32:8,64:8}", "stage.init_from=null"]
    return to_object(compose("train", [*settings, "tracking=none", phases, *batch, *more]), TrainConfig)


def test_training_asks_for_the_latents_at_once(data: Path, endings: dict[str, Ending], tmp_path: Path) -> None:
    cached = "data.latents=cached"
    check(train_config(data, data / "alone", cached), 1)
    check(train_config(data, tmp_path, "data.latents=inline"), 1)
    for settings, message in (
        ([tmp_path, cached], r"no latents of resolution 32; make them with .*latents data\.latent_cache\.resolutions"),
        ([data / "alone", "data.latents=cache"], r"data\.latents=cache: choose from inline, cached"),
        (
            [data / "alone", cached, "stage.phases=[{resolution:32,samples:32},{resolution:64,samples:32}]"],
            "no latents of resolution 64",
        ),
        (
            [data / "alone", cached, "+model.modalities.image.vae.latent_scale=0.2"],
            r"built with VAE \w+, but the model's",
        ),
        ([data / "alone", cached, "model.modalities.image.vae.weights=null"], "random weights"),
        (
            [data / "alone", cached, "data.stream.min_side=16"],
            r"built with min_side=32, but .*min_side=16",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check(train_config(data, *settings), 1)  # type: ignore[arg-type]
    model = replace(train_config(data, tmp_path).model, modalities={"image": ModalityConfig(vae={"_target_": OPTIMUS})})
    with pytest.raises(ConfigError, match=r"model\.modalities\.image\.vae has no moments that can be cached"):
        latent_encoder(model, "image")


def test_shards_that_are_made_anew_are_encoded_anew(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    folder = LatentFolder(tmp_path / "latents", 32)
    assert main(["latents", *overrides(data, tmp_path / "latents")]) == 0
    before = contents(folder.path)
    write_shard(data / "shards" / "00001.tar", COUNT, seed=99)
    index({"drawn": data / "shards"}, data / "manifest")
    with pytest.raises(ConfigError, match=r"lacks the latents of 1 of 6 shards \(1 of them have changed since"):
        check(train_config(data, tmp_path / "latents", "data.latents=cached"), 1)
    assert main(["latents", *overrides(data, tmp_path / "latents")]) == 0
    after = contents(folder.path)
    assert len(after) == len(before)
    assert len({name for name in before if before[name] == after.get(name)}) == SHARDS
    check(train_config(data, tmp_path / "latents", "data.latents=cached"), 1)


def test_bad_images_have_a_place_and_a_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data")
    found = Manifest(data / "manifest")
    rows = found.rows(2)
    overwrite(Path(found.shards[2]), int(rows.offset[5]), int(rows.size[5]))
    assert main(["latents", *overrides(data, tmp_path / "latents")]) == 0
    assert f"{SHARDS * COUNT} images, 1 of them bad" in capsys.readouterr().out
    shards = LatentShards(tmp_path / "latents", found, 32)
    out = torch.empty(shards.shape)
    with pytest.raises(DecodeError, match="no latent: its image could not be decoded"):
        shards.read(2, 5, out)
    for row in (4, 6):
        shards.read(2, row, out)
    moments = load_file(LatentFolder(tmp_path / "latents", 32).path_of(found, 2))["moments"]
    assert not moments[5].any()
    assert np.isfinite(moments).all()
    assert all(moments[row].any() for row in range(COUNT) if row != 5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.latent_cache.resolutions=[]", "resolutions=[]: empty"),
        ("data.latent_cache.resolutions=[36]", "data.latent_cache.resolutions=36: not a multiple of"),
        ("data.latent_cache.resolutions=[128]", "no image has a side of 128 pixels or more; take 128 out"),
        ("data.latent_cache.batch_size=0", "data.latent_cache.batch_size=0: must be at least 1"),
        ("hardware.precision=fp16", "hardware.precision=fp16: choose from bf16, fp32"),
        ("hardware.precision=bf16", "was built with precision=fp32, but this run asks for precision=bf16"),
        ("hardware.device=tpu", "hardware.device=tpu: choose from cuda, cpu"),
        ("data.stream.min_side=48", "was built with min_side=32, but this run asks for min_side=48"),
        ("+model.modalities.image.vae.latent_scale=0.2", "was built with vae="),
        ("model.modalities.image.vae.weights=null", "random weights"),
        ("model.modalities.image.vae.weights=no.safetensors", "no such file"),
        ("data.manifest=nowhere", "data.manifest=nowhere: shards.parquet is not there"),
        ("data.latent_cache.folder=/proc/latents", "data.latent_cache.folder=/proc/latents: cannot be written"),
        ("+data.stream.cache={folder: x}", "data.stream.cache={'folder': 'x'}: give {folder: ..., gigabytes: ...}"),
        ("+data.stream.cache={folder: /proc/x, gigabytes: 1}", "data.stream.cache.folder=/proc/x: cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    data: Path, endings: dict[str, Ending], capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    before = contents(data / "alone")
    assert main(["latents", *overrides(data, data / "alone"), setting]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert contents(data / "alone") == before


def test_a_description_of_another_layout_is_refused(
    data: Path, endings: dict[str, Ending], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "alone", tmp_path / "copy")
    description = tmp_path / "copy" / "32" / DESCRIPTION_FILE
    for text, reason in (("{}", "'layout'"), ('{"layout": 1}', "its layout is 1, this version reads layout 2")):
        description.write_text(text)
        assert main(["latents", *overrides(data, tmp_path / "copy")]) == 2
        error = capsys.readouterr().err
        assert f"cannot be used ({reason}); remove {description.parent} and encode again with `python -m data" in error
        assert error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latents", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: python -m data_pipeline latents" in text
    assert "hardware=" in text
