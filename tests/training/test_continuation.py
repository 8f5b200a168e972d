"""A run taken up again with other settings: it goes on where that has a meaning, and else ends with one line.

The commands run as a user types them, each start in processes of its own where it trains.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from tests import settings
from tests.pairs import write_pairs
from tests.tiny_runs import BATCH, HIGH, LOW, STAGES, STEPS, TinyRuns, overrides
from tests.training.forks import Case, Ending, run_cases
from vdtrain.checkpoint.folder import CHECKPOINTS, INDEX_FILE, index_checksum, latest_by_sizes
from vdtrain.checkpoint.format import Checkpoint, Index
from vdtrain.commands.preflight import main as preflight
from vdtrain.commands.train import main as train
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.errors import ConfigError
from vdtrain.models.frozen_weights import ASSETS
from vdtrain.run import distributed
from vdtrain.tracking.metrics import read_metrics
from vdtrain.training.continuation import CONFIG, TrainState, _longer, changes, stage_steps
from vdtrain.training.start import Start, _patience, check_frozen, model_of

LONGER = 5
VAE = "model.modalities.image.vae.weights"


def phases(*each: tuple[int, int]) -> str:
    return settings.phases(BATCH, *each)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def complete(tiny_runs: TinyRuns, tmp_path: Path) -> list[str]:
    """What starts a copy of stage 1's run, which is complete, again."""
    shutil.copytree(tiny_runs.run(1), tmp_path / "run")
    return [f"stage={STAGES[0]}", *tiny_runs.overrides, f"run_dir={tmp_path}/run"]


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which training and preflight both refuse."""
    assert train(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert preflight(arguments) == 2
    assert line in capsys.readouterr().err.splitlines()
    return line


def rewrite(checkpoint: Path, change: Any) -> None:
    """Change a checkpoint's trainer state, as another version of vdtrain would have written it."""
    document = json.loads((checkpoint / INDEX_FILE).read_text())
    change(document["checkpoint"]["trainer"])
    document["sha256"] = index_checksum(document["checkpoint"])
    (checkpoint / INDEX_FILE).write_text(json.dumps(document))


def newest(run: Path) -> Path:
    found, _ = latest_by_sizes(run / CHECKPOINTS)
    assert found is not None
    return found.path


@dataclass(frozen=True)
class Drill:
    """A run that became longer beside one that was long from the beginning, and runs whose VAE's file moved."""

    folder: Path
    endings: dict[str, Ending]


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    folder = tmp_path_factory.mktemp("continuation")
    write_pairs(folder / "data")
    original = ASSETS / "tiny" / "image_vae.safetensors"
    for place in ("before", "after", "other"):
        (folder / place).mkdir()
        shutil.copy(original, folder / place / f"vae-{place}.safetensors")
    other = load_file(original)
    save_file({name: value * 1.01 for name, value in other.items()}, folder / "other" / "vae-other.safetensors")

    common = [f"stage={STAGES[0]}", *overrides(folder)]
    long = phases((32, LOW), (64, HIGH + LONGER))
    stopped = ["data.stream._target_=tests.tiny_runs.EndingStream", "+data.stream.name=SIGTERM", "+data.stream.at=1"]

    def vae(place: str) -> str:
        return f"{VAE}={folder}/{place}/vae-{place}.safetensors"

    starts = {
        "short": [f"run_dir={folder}/short"],
        "scaled": [f"run_dir={folder}/short", "stage.samples_scale=2"],
        "lengthened": [f"run_dir={folder}/short", f"stage.phases.1.samples={(HIGH + LONGER) * BATCH}"],
        "long": [f"run_dir={folder}/long", long],
        "stopped": [f"run_dir={folder}/moved", vae("before"), *stopped],
        "with another VAE": [f"run_dir={folder}/moved", vae("other")],
        "with its VAE elsewhere": [f"run_dir={folder}/moved", vae("after"), "ema.decay=0.99"],
        "next stage": [f"stage={STAGES[1]}", f"run_dir={folder}/next", f"stage.init_from={folder}/moved", vae("other")],
    }
    endings = run_cases(folder / "cases", [Case(1, [*common, *own]) for own in starts.values()])
    return Drill(folder, dict(zip(starts, endings, strict=True)))


def test_more_samples_on_a_complete_run_extend_its_last_phase_to_the_bit(drill: Drill) -> None:
    assert drill.endings["short"].statuses == drill.endings["long"].statuses == [0]
    ending = drill.endings["lengthened"]
    assert ending.statuses == [0], ending
    was, becomes = HIGH * BATCH, (HIGH + LONGER) * BATCH
    assert f"warning: stage.phases.1.samples={becomes}: was {was} until now" in ending.logs[0].splitlines()
    one, other = (
        load_file(newest(drill.folder / run) / "rank-00000-of-00001.safetensors") for run in ("short", "long")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    losses = [[(each["step"], each["loss"]) for each in read_metrics(drill.folder / run)] for run in ("short", "long")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS + LONGER


def test_a_scale_that_moves_trained_phases_is_refused_with_what_trains_as_long(drill: Drill) -> None:
    ending = drill.endings["scaled"]
    assert ending.statuses == [2]
    (line,) = ending.logs[0].splitlines()
    # The two phases again, all of it at the end: what the next start in the drill was given.
    assert f"restore it and train as long with stage.phases.1.samples={(HIGH + LONGER) * BATCH}" in line
    assert LONGER == STEPS


def test_a_moved_vae_file_resumes_and_another_one_does_not(drill: Drill) -> None:
    assert drill.endings["stopped"].statuses == [75]
    refused = drill.endings["with another VAE"]
    assert refused.statuses == [2]
    assert refused.logs[0].count("\n") == 1
    assert (
        f"error: {VAE}={drill.folder}/other/vae-other.safetensors: contents differ from those that run_dir="
        in refused.logs[0]
    )
    moved = drill.endings["with its VAE elsewhere"]
    assert moved.statuses == [0], moved
    warnings = [line for line in moved.logs[0].splitlines() if line.startswith("warning: ")]
    assert "warning: ema.decay=0.99: was null until now" in warnings
    assert not any("vae" in line for line in warnings)


def test_a_stage_with_another_vae_than_the_one_before_says_so(drill: Drill) -> None:
    ending = drill.endings["next stage"]
    assert ending.statuses == [0], ending
    assert (
        f"warning: {VAE}={drill.folder}/other/vae-other.safetensors: contents differ from those that stage.init_from="
        in (ending.logs[0])
    )


def test_the_same_path_with_other_contents_is_refused_by_preflight(
    drill: Drill, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(drill.folder / "moved", tmp_path / "run")
    shutil.copy(drill.folder / "other" / "vae-other.safetensors", tmp_path / "vae.safetensors")
    own = [
        f"stage={STAGES[0]}",
        *overrides(drill.folder),
        f"run_dir={tmp_path}/run",
        f"{VAE}={tmp_path}/vae.safetensors",
    ]
    assert preflight(own) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"error: {VAE}={tmp_path}/vae.safetensors: contents differ from those that run_dir={tmp_path}/run was trained"
        in line
    )
    shutil.copy(drill.folder / "before" / "vae-before.safetensors", tmp_path / "vae.safetensors")
    assert preflight(own) == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("stage.samples_scale=0.5", f"stage.samples_scale=0.5: was 1.0; run_dir=RUN has trained all {LOW} steps"),
        ("stage.phases.0.samples=24", f"stage.phases.0.samples=24: was {LOW * BATCH}; run_dir=RUN"),
        pytest.param(
            f"stage.phases.1.samples={BATCH}",
            f"stage.phases.1.samples={BATCH}: was {HIGH * BATCH}; run_dir=RUN",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "stage.phases.1.resolution=32",
            "stage.phases.1.resolution=32: run_dir=RUN has trained",
            marks=pytest.mark.slow,
        ),
        # One in front, one between, one less.
        (phases((64, 1), (32, LOW), (64, HIGH)), "stage.phases.0.resolution=64: run_dir=RUN has trained"),
        pytest.param(
            phases((32, LOW), (32, 1), (64, HIGH)),
            "stage.phases.1.resolution=32: run_dir=RUN has trained",
            marks=pytest.mark.slow,
        ),
        (phases((32, LOW)), "stage.phases: has 1 phases, but run_dir=RUN has trained 2"),
        pytest.param(
            "model.schedule.beta_end=0.02",
            "model.schedule.beta_end=0.02: run_dir=RUN has 0.012",
            marks=pytest.mark.slow,
        ),
        ("model.schedule=paper", "model.schedule.beta_start=8.5e-05: run_dir=RUN has 0.00085"),
        ("stage.flows=[text-to-image]", "stage.flows=[text-to-image]: run_dir=RUN has [image-to-image]"),
        pytest.param(
            "model.schedule.steps=500", "model.schedule.steps=500: run_dir=RUN has 1000", marks=pytest.mark.slow
        ),
        pytest.param("model.diffuser.heads=2", "model.diffuser.heads=2: run_dir=RUN has 4", marks=pytest.mark.slow),
        (
            "+model.modalities.image.vae.latent_scale=0.5",
            "model.modalities.image.vae.latent_scale=0.5: run_dir=RUN has unset",
        ),
        pytest.param("stage.name=another", f"stage.name=another: run_dir=RUN has {STAGES[0]}", marks=pytest.mark.slow),
        ("seed=1", "seed=1: run_dir=RUN has 0"),
    ],
)
def test_what_has_no_meaning_for_the_run_is_refused(
    complete: list[str], tmp_path: Path, change: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((tmp_path / "run").rglob("*"))
    line = refusal(capsys, [*complete, change])
    assert line.startswith("error: " + expected.replace("RUN", f"{tmp_path}/run"))
    assert "restore" in line
    assert "another run_dir" in line
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_what_comes_after_the_position_may_change(
    tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within the first phase: it becomes longer, the second is of another size, a third is new."""
    shutil.copytree(tiny_runs.run(2), tmp_path / "run")
    position = json.loads((newest(tmp_path / "run") / INDEX_FILE).read_text())["checkpoint"]["trainer"]["state"]
    assert position["phase"] == 0
    more = phases((32, LOW + 1), (32, 7), (64, 1))
    arguments = [f"stage={STAGES[1]}", *tiny_runs.overrides, f"run_dir={tmp_path}/run", more]
    changed = ["stage.learning_rate=3e-5", "data.stream.lanes=2", "hardware.precision=bf16", "ema.enabled=false"]
    changed += ["+objective.flow_weights.text-to-image=2", "log_every_steps=7", "checkpoint.keep=4"]
    changed += ["stage.init_from=null"]
    assert preflight([*arguments, *changed]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    again = "; in this epoch some samples repeat and others are missed"
    assert sorted(lines) == sorted(
        f"warning: {line}"
        for line in (
            "stage.learning_rate=3e-05: was 0.0001 until now",
            f"stage.init_from=null: was {tiny_runs.run(1)} until now; no effect, because the run has its own weights",
            f"data.stream.lanes=2: was 64 until now{again}",
            f"data.stream._target_=vdtrain.data.stream.PairStream: was tests.tiny_runs.EndingStream until now{again}",
            "data.stream.name=unset: was SIGUSR1 until now",
            "data.stream.at=unset: was 2 until now",
            "hardware.precision=bf16: was fp32 until now",
            "ema.enabled=false: was true until now",
            "objective.flow_weights.text-to-image=2: was unset until now",
            f"stage.phases.0.samples={(LOW + 1) * BATCH}: was {LOW * BATCH} until now",
            "stage.phases.1.resolution=32: was 64 until now",
            f"stage.phases.1.samples={7 * BATCH}: was {HIGH * BATCH} until now",
            "stage.phases.2.resolution=64: was unset until now",
            f"stage.phases.2.samples={BATCH}: was unset until now",
        )
    )


def test_a_stage_keeps_the_noise_schedule_of_the_one_before(
    tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"stage={STAGES[1]}", *tiny_runs.overrides, f"run_dir={tmp_path}/new", "model.schedule.beta_end=0.02"]
    line = refusal(capsys, arguments)
    assert f"model.schedule.beta_end=0.02: stage.init_from={tiny_runs.run(1)} was trained with 0.012" in line
    (remedy,) = re.findall(r"set (model\.schedule\.\S+),", line)
    assert preflight([*arguments, remedy]) == 0
    assert not (tmp_path / "new").exists()


def test_a_run_of_a_version_that_kept_no_record_of_the_frozen_parts_goes_on(
    complete: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told by the old file, where it is still there; else taken for the same."""
    checkpoint, moved = newest(tmp_path / "run"), tmp_path / "moved.safetensors"
    (tmp_path / "run" / "saved.json").unlink()
    rewrite(checkpoint, lambda trainer: trainer.pop("frozen"))
    shutil.copy(ASSETS / "tiny" / "image_vae.safetensors", moved)
    assert preflight(complete) == 0
    assert "warning" not in capsys.readouterr().out
    gone = tmp_path / "gone.safetensors"

    def at_a_path(trainer: dict[str, Any]) -> None:
        trainer["config"]["model"]["modalities"]["image"]["vae"]["weights"] = str(gone)

    rewrite(checkpoint, at_a_path)
    assert preflight([*complete, f"{VAE}={moved}"]) == 0
    assert f"warning: {VAE}={moved}: was {gone}; assumed to be the same file" in capsys.readouterr().out
    save_file({"something": torch.zeros(1)}, gone)
    assert preflight([*complete, f"{VAE}={moved}"]) == 2
    assert "contents differ" in capsys.readouterr().err


def compare_with_a_file_of_one_node(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    home = folder / f"node{distributed.rank()}"
    home.mkdir()
    if distributed.rank() == 1:
        save_file({"something": torch.zeros(1)}, home / "old.safetensors")
    os.environ["HOME"] = str(home)
    document = compose("train", [f"stage={STAGES[0]}", *settings.TINY, f"run_dir={folder}/run"])
    before = OmegaConf.to_container(document, resolve=True)
    OmegaConf.update(document, VAE, str(ASSETS / "tiny" / "image_vae.safetensors"))
    assert isinstance(before, dict)
    before["model"]["modalities"]["image"]["vae"]["weights"] = "~/old.safetensors"
    index = Index(1, 2, 1, "fp32", 1, None, {CONFIG: before}, (), {})
    start = Start(resume=Checkpoint(folder, index))
    report({"lines": check_frozen(start, to_object(document, TrainConfig))})


def test_the_old_file_that_one_node_has_makes_no_process_leave_alone(tmp_path: Path, run_on_ranks: Any) -> None:
    first, second = run_on_ranks(compare_with_a_file_of_one_node, 2, tmp_path)
    assert first == second
    assert "was ~/old.safetensors; assumed to be the same file" in first["lines"][0]


def test_a_run_of_the_first_release_goes_on_without_the_settings_that_are_no_longer_there(
    complete: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def as_it_was(trainer: dict[str, Any]) -> None:
        trainer["config"]["hardware"]["offload_optimizer"] = False
        inspect = trainer["config"]["data"]["inspect"]
        inspect["pictures"] = inspect.pop("images")

    rewrite(newest(tmp_path / "run"), as_it_was)
    assert preflight([*complete, "hardware.offload_optimizer=false"]) == 0
    shown = capsys.readouterr()
    assert "warning" not in shown.out
    assert shown.err.startswith("warning: hardware.offload_optimizer: removed")
    assert train(complete) == 0


def test_a_run_whose_phases_were_changed_by_a_version_that_let_them_is_refused(
    complete: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(newest(tmp_path / "run"), lambda trainer: trainer["state"].update(phase_step=HIGH - 1))
    assert "its phases were changed on the way" in refusal(capsys, complete)


def content_of(words: list[str], state: TrainState) -> dict[str, Any]:
    """A checkpoint's trainer state."""
    return {"config": OmegaConf.to_container(compose("train", words), resolve=False), "state": asdict(state)}


def changed(*words: str, step: int = 1) -> tuple[list[str], list[str]]:
    """The lines on these settings in a run that has trained `step` steps of two times eight without them."""
    plain = ["stage=stage3_four_flow", *settings.TINY, "stage.init_from=null", "stage.global_batch_size=4"]
    plain.append("stage.phases=[{resolution:32,samples:32},{resolution:64,samples:32}]")
    raw = compose("train", [*plain, *words])
    content = content_of(plain, TrainState(step=step, phase_step=step))
    return changes(content, raw, to_object(raw, TrainConfig).stage, "RUN")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=1"], "seed=1: run_dir=RUN has 0"),
        (["stage.name=other"], "stage.name=other: run_dir=RUN has stage3_four_flow"),
        # As many steps of twice the samples.
        (
            ["stage.global_batch_size=8", "stage.samples_scale=2"],
            "stage.global_batch_size=8: run_dir=RUN has 4",
        ),
        (["model.diffuser.heads=2"], "model.diffuser.heads=2: run_dir=RUN has 4"),
        (["model.latent_downsampling=16"], "model.latent_downsampling=16: run_dir=RUN has 8"),
        (["lora.rank=4"], "lora.rank=4: run_dir=RUN has null"),
    ],
)
def test_settings_that_define_the_weights_and_the_position_are_fixed(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        changed(*words)
    assert str(refused.value).startswith(expected)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stage.learning_rate=0.5", True),
        ("optimizer.weight_decay=0.5", True),
        ("objective.context_dropout=0.5", True),
        ("ema.decay=0.5", True),
        ("data.flip=true", True),
        ("log_every_steps=7", False),
        ("checkpoint.keep=7", False),
        ("hardware.threads=7", False),
    ],
)
def test_what_changes_the_training_is_told_from_the_rest(word: str, said: bool) -> None:
    lines, others = changed(word)
    assert len(lines) + len(others) == 1, (lines, others)
    assert (lines if said else others)[0].startswith(f"{word}: was ")


@pytest.mark.parametrize(("phase", "resolution"), [(0, 32), (1, 64), (2, 64)])
def test_a_checkpoints_model_has_the_resolution_of_its_latest_phase(phase: int, resolution: int) -> None:
    words = ["stage=stage3_four_flow", *settings.TINY, "stage.global_batch_size=4"]
    words.append("stage.phases=[{resolution:32,samples:32},{resolution:64,samples:32}]")
    content = content_of(words, TrainState(step=8 * phase, phase=phase))
    index = Index(8 * phase, 1, 1, "fp32", 0, None, content, groups=(), files={})
    assert model_of(Checkpoint(Path("run"), index), "weights").resolution == resolution


@pytest.mark.parametrize(("limit", "seconds"), [("null", 120.0), ("100", 25.0), ("10000", 120.0)])
def test_a_start_waits_for_a_disk_less_than_its_watchdog_does(limit: str, seconds: float) -> None:
    assert _patience(to_object(compose("train", [f"watchdog_seconds={limit}"]), TrainConfig)) == seconds


def test_the_remedy_of_a_shorter_phase_trains_as_long() -> None:
    """Rounding of the scale may not leave it a step short."""
    for scale in (0.3, 0.7, 0.9):
        stage = to_object(compose("train", ["stage=stage3_four_flow", "stage.global_batch_size=12"]), TrainConfig).stage
        stage.samples_scale = scale
        for steps in (1, 7, 1001):
            setting, _, samples = _longer(stage, steps).partition("=")
            stage.phases[-1].samples = int(samples)
            assert setting == f"stage.phases.{len(stage.phases) - 1}.samples"
            assert stage_steps(stage)[-1] == steps


def test_a_position_between_phases_is_at_the_end_of_the_one_before() -> None:
    """Where the save at the end of a phase failed, and that before leaving did not."""
    for between in (TrainState(step=7, phase=1, phase_step=0), TrainState(step=7, phase=0, phase_step=7)):
        assert between.done([7, 5]) == [7]
        assert between.settled([7, 5]) == TrainState(step=7, phase=0, phase_step=7)
        assert not between.completes([7, 5])
    assert TrainState(step=12, phase=2, phase_step=0).settled([7, 5]) == TrainState(step=12, phase=1, phase_step=5)
    assert TrainState(step=12, phase=2, phase_step=0).completes([7, 5])
    assert TrainState().done([7, 5]) == [0]
    for muddled in (
        TrainState(step=7, phase=0, phase_step=6),
        TrainState(step=12, phase=3),
        TrainState(step=13, phase=2),
    ):
        with pytest.raises(ValueError, match=r"step \d+ is not"):
            muddled.done([7, 5])
