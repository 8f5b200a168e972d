"""What preflight finds, each with its remedy, and that it takes what train takes."""

from __future__ import annotations

import http.server
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.pairs import write_pairs, write_shard
from tests.ranges import Ranges
from tests.tiny_runs import STAGES, STEPS, TinyRuns
from vdtrain.checkpoint.folder import CHECKPOINTS, latest_by_sizes
from vdtrain.checkpoint.store import Verification, latest
from vdtrain.commands.preflight import main, rank_count
from vdtrain.commands.weights import main as weights
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.tracking.wandb_run import _unreachable
from vdtrain.training.checks import checkpoint_size
from vdtrain.training.start import Start

Look = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def earlier(tiny_runs: TinyRuns, tmp_path: Path) -> Path:
    """A copy of stage 1's run."""
    return Path(shutil.copytree(tiny_runs.run(1), tmp_path / STAGES[0]))


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], list[str]]:
    """Exit status, lines on what is well or nearly, lines on what is wrong."""
    status = main(arguments)
    printed = capsys.readouterr()
    good, bad = printed.out.splitlines(), printed.err.splitlines()
    assert all(line.startswith(("ok: ", "warning: ")) for line in good)
    assert all(line.startswith("error: ") for line in bad)
    return status, good, bad


def size_of_checkpoint(tiny_runs: TinyRuns, number: int) -> int:
    newest, _ = latest_by_sizes(tiny_runs.run(number) / CHECKPOINTS)
    assert newest is not None
    return newest.bytes


def test_a_stage_that_is_ready(tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [f"stage={STAGES[1]}", *tiny_runs.overrides, f"run_dir={tmp_path}/new", "ranks=2"]
    own += ["hardware.micro_batch_size={32:2,64:1}", "tracking=offline"]
    status, good, bad = found(capsys, *own)
    assert (status, bad) == (0, [])
    assert good[:4] == [
        f"ok: {STAGES[1]}: 2 x cpu, {STEPS} steps of 4 pairs",
        f"ok: data.manifest={tiny_runs.folder}/data/manifest: 2 shards, loader workers: 2",
        f"ok: data.manifest={tiny_runs.folder}/data/manifest: 2 of 2 shards were looked at and are as indexed",
        f"ok: stage.init_from={tiny_runs.run(1)}: {tiny_runs.run(1)}/checkpoints/step-{STEPS:09d}",
    ]
    assert "3 checkpoints of 0.04 GB to come" in good[4]
    assert (
        good[5] == f"ok: tracking.mode=offline: send the run to W&B by `wandb sync {tmp_path}/new/wandb/offline-run-*`"
    )
    assert len(good) == 6
    assert not (tmp_path / "new").exists()


def test_a_run_that_goes_on(tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    status, good, bad = found(capsys, f"stage={STAGES[1]}", *tiny_runs.overrides)
    assert (status, bad) == (0, [])
    assert f"ok: run_dir={tiny_runs.run(2)}: continues from step " in good[3]
    assert good[-1].startswith("ok: tracking.mode=disabled: ")


def test_a_run_that_goes_on_does_not_wait_for_wandb(tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a new one, the same is a mistake that is seen to before weeks are spent."""
    overrides = [each for each in tiny_runs.overrides if not each.startswith("tracking=")]
    status, good, bad = found(capsys, f"stage={STAGES[1]}", *overrides, "tracking=wandb")
    assert (status, bad) == (0, [])
    assert good[-1].startswith("warning: tracking.mode=online: no API key for ")
    assert f"its figures are in {tiny_runs.run(2)}/metrics.jsonl, and a later start sends them" in good[-1]
    new = ["tracking=wandb", f"run_dir={tiny_runs.folder}/new"]
    status, _, bad = found(capsys, f"stage={STAGES[1]}", *overrides, *new)
    assert (status, len(bad)) == (2, 1)
    assert bad[0].startswith("error: tracking.mode=online: no API key for ")


def test_a_stage_that_starts_from_an_unfinished_one(tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    status, good, bad = found(capsys, f"stage={STAGES[2]}", *tiny_runs.overrides)
    assert (status, bad) == (0, [])
    (warning,) = (line for line in good if line.startswith("warning: "))
    assert f"stage.init_from={tiny_runs.run(2)}: {STAGES[1]} stopped there at step" in warning


def test_the_size_of_a_first_checkpoint_is_that_of_the_real_one(
    tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a stage that carries along layers that it does not train, too."""
    for number, run in ((1, None), (2, tiny_runs.run(1))):
        arguments = [f"stage={STAGES[number - 1]}", *tiny_runs.overrides]
        config = to_object(compose("train", arguments), TrainConfig)
        start = Start() if run is None else Start(weights=latest(run / CHECKPOINTS, Verification.SIZES))
        assert checkpoint_size(config, start) == pytest.approx(size_of_checkpoint(tiny_runs, number), rel=0.01)


def test_everything_that_is_wrong_is_said(
    tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [
        "ranks=3",
        "ema.decay=2",
        "stage.flows=[image-to-sound]",
        "stage.phases.0.resolution=40",
        f"runs_dir={tmp_path}",
        "tracking=wandb",
    ]
    overrides = [each for each in tiny_runs.overrides if not each.startswith(("runs_dir=", "tracking="))]
    status, good, bad = found(capsys, f"stage={STAGES[1]}", *overrides, *wrong)
    assert status == 2
    (warning,) = good
    assert "2 shards, fewer than 3 processes x hardware.loader_workers=1: several read the same shard" in warning
    expected = [
        "ema.decay=2: must be at least 0 and below 1; null sets no limit",
        "stage.flows: image-to-sound needs modality 'sound'",
        "stage.phases.0.resolution=40: not a multiple of 16",
        "hardware.micro_batch_size: no entry for resolution 40",
        "stage.global_batch_size=4: does not divide over 3 processes; choose 3 or 6",
        f"stage.init_from={tmp_path}/{STAGES[0]}: does not exist; train that stage first",
        "tracking.mode=online: no API key for",
    ]
    assert len(bad) == len(expected)
    for line, part in zip(bad, expected, strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["stage.phases=[{resolution:128,samples:64}]", "+hardware.micro_batch_size={128:4}", "run_dir=FOLDER/new"],
            "none of 80 images",
        ),
        (["data.manifest=FOLDER/data"], "python -m data_pipeline index"),
        (["seed=1"], "seed=1: run_dir="),
        # More than any disk has.
        (
            ["stage.samples_scale=1e9", "checkpoint.keep=100000000", "run_dir=FOLDER/new"],
            "make room, or choose another folder",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(
    tiny_runs: TinyRuns, overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [each.replace("FOLDER", str(tiny_runs.folder)) for each in overrides]
    status, _, bad = found(capsys, f"stage={STAGES[0]}", *tiny_runs.overrides, *given)
    assert status == 2
    assert len(bad) == 1
    assert expected in bad[0]


@pytest.fixture
def look(tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Look:
    """What preflight says of the shards of `tmp_path`/manifest, and whether it finds the stage ready."""
    write_pairs(tmp_path, shards=12, count=2)
    capsys.readouterr()

    def look(*settings: str) -> tuple[int, str]:
        own = [f"stage={STAGES[0]}", *tiny_runs.overrides, f"data.manifest={tmp_path}/manifest"]
        status, good, bad = found(capsys, *own, f"run_dir={tmp_path}/new", *settings)
        (line,) = (line for line in (*good, *bad) if "looked at" in line)
        return status, line

    return look


def test_shards_that_are_gone_or_made_anew_are_said(look: Look, tmp_path: Path) -> None:
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    manifest = f"data.manifest={tmp_path}/manifest"
    assert look() == (0, f"ok: {manifest}: 6 of 12 shards were looked at and are as indexed")
    for shard in shards:
        shard.touch()
    status, line = look()
    assert (status, line.startswith("warning: ")) == (0, True)
    assert "6 of 6 shards that were looked at have another time" in line
    for shard in shards[:6]:
        shard.unlink()
    status, line = look()
    assert status == 2
    assert line.startswith(f"error: {manifest}: 3 of 6 shards that were looked at cannot be used: {shards[0]}: is not ")
    for shard in shards:
        write_shard(shard, 2, seed=99, pixels=96)
    assert f"6 of 6 shards that were looked at cannot be used: {shards[0]}: made anew" in look()[1]


def test_a_shard_root_that_is_not_there_is_said(look: Look, tmp_path: Path) -> None:
    status, line = look(f"data.stream.shard_root={tmp_path}/nowhere/manifest")
    assert status == 2
    assert line.startswith(f"error: data.stream.shard_root={tmp_path}/nowhere/manifest: 6 of 6 shards ")
    assert f"{tmp_path}/nowhere/shards/000000.tar: cannot be read (folder {tmp_path}/nowhere does not exist)" in line


def test_a_store_is_looked_at_within_seconds(look: Look, tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert look(f"data.stream.shard_root={address}/manifest")[0] == 0
        status, line = look(f"data.stream.shard_root=http://me:word@127.0.0.1:{server.server_port}/else/manifest")
        server.shutdown()
    assert status == 2
    assert f"data.stream.shard_root={address}/else/manifest: 6 of 6 shards that were looked at cannot be used" in line
    assert line.endswith("/else/shards/000000.tar: is not there; check data.stream.shard_root, or put the shards there")
    status, line = look(f"data.stream.shard_root={address}/manifest")
    assert status == 2
    assert "onnect" in line
    with socket.create_server(("127.0.0.1", 0)) as silent:
        root = f"data.stream.shard_root=http://127.0.0.1:{silent.getsockname()[1]}/manifest"
        status, line = look(root, "data.stream.timeout=0.5")
    assert status == 2
    assert "no whole answer within data.stream.timeout=0.5 seconds; check" in line


def test_less_to_keep_is_what_fits(tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free, size = shutil.disk_usage(tmp_path).free, size_of_checkpoint(tiny_runs, 1)
    kept = 2 * free // size
    settings = [f"run_dir={tmp_path}/new", "stage.samples_scale=1e9", f"checkpoint.keep={kept}"]
    status, _, bad = found(capsys, f"stage={STAGES[0]}", *tiny_runs.overrides, *settings)
    assert status == 2
    fits = int(bad[0].partition("set checkpoint.keep=")[2].partition(",")[0])
    assert 0.7 * free < fits * size < 1.1 * free


def test_what_the_stage_starts_from_is_damaged(
    tiny_runs: TinyRuns, earlier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [f"stage={STAGES[1]}", *tiny_runs.overrides, f"run_dir={tmp_path}/new"]
    first, last = sorted((earlier / "checkpoints").glob("step-*"))
    (last / "rank-00000-of-00001.safetensors").write_bytes(b"half of it")
    status, good, bad = found(capsys, *own, f"stage.init_from={earlier}")
    assert (status, bad) == (0, [])
    assert any(line.startswith(f"warning: {last}/rank-00000") and "passed over" in line for line in good)
    assert any(line == f"ok: stage.init_from={earlier}: {first}" for line in good)
    # Named itself, it is not passed over; and with the other one damaged there is none left.
    status, _, bad = found(capsys, *own, f"stage.init_from={last}")
    assert (status, len(bad)) == (2, 1)
    assert "10 bytes instead of" in bad[0]
    (first / "rank-00000-of-00001.safetensors").unlink()
    status, _, bad = found(capsys, *own, f"stage.init_from={earlier}")
    assert (status, len(bad)) == (2, 1)
    assert "holds no complete checkpoint" in bad[0]


def test_weights_of_another_model(tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [f"stage={STAGES[1]}", *tiny_runs.overrides, f"run_dir={tmp_path}/new", "model.diffuser.heads=1"]
    status, _, bad = found(capsys, *own)
    assert (status, len(bad)) == (2, 1)
    assert "its model has" in bad[0]


def test_how_many_processes_will_train() -> None:
    assert rank_count(None, {}) == 1
    assert rank_count(None, {"SLURM_NTASKS": "16"}) == 16
    assert rank_count(None, {"SLURM_NTASKS": "16", "WORLD_SIZE": "8"}) == 8
    assert rank_count(4, {"SLURM_NTASKS": "16"}) == 4
    with pytest.raises(ConfigError, match="SLURM_NTASKS must be a positive integer, got many"):
        rank_count(None, {"SLURM_NTASKS": "many"})
    with pytest.raises(ConfigError, match="ranks must be a positive integer, got 0"):
        rank_count(0, {})


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    """Answers everything with 501."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_server_that_answers_is_told_from_one_that_does_not(server: http.server.HTTPServer) -> None:
    assert _unreachable(f"http://127.0.0.1:{server.server_port}") is None
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert "refused" in str(_unreachable(f"http://127.0.0.1:{nobody.getsockname()[1]}"))


def test_each_file_that_is_missing_has_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The full-size configuration in an empty folder, as somebody has it who begins."""
    monkeypatch.chdir(tmp_path)
    status, _, bad = found(capsys, f"stage={STAGES[0]}", "hardware=h100", "ranks=8", "tracking=none")
    assert status == 2
    for file, source in (
        ("weights/kl-f8.safetensors", "image_vae"),
        ("weights/optimus-vae.safetensors", "text_vae"),
        ("weights/clip-vit-l-14.safetensors", "clip"),
        ("weights/bert-base-cased.json", "bert_tokenizer"),
        ("weights/gpt2.json", "gpt2_tokenizer"),
        ("weights/stable_diffusion_v1", "stable_diffusion"),
    ):
        lines = [line for line in bad if file in line]
        assert lines
        assert all(f"`vdtrain weights import {source}`" in line for line in lines)
        assert weights(["import", source, "--cfg", "job"]) == 0
