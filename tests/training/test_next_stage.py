"""The command that a finished stage names runs, and trains the stage that comes next from it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.tiny_runs import ROOT, STAGES, TinyRuns
from vdtrain.cli import main
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.tracking.summary import next_command, next_stage

SLURM = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}


def words_after(overrides: list[str], environment: dict[str, str]) -> list[str]:
    config = to_object(compose("train", overrides), TrainConfig)
    return shlex.split(next_command(config, overrides, environment))


def test_stages_in_their_order() -> None:
    assert [next_stage(stage) for stage in STAGES] == [*STAGES[1:], None]


def test_a_finished_stage_says_what_comes_next(tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    """The first run was in a job, as its environment says; it is the second stage's command that trained the second."""
    (log,) = tiny_runs.endings[0].logs
    shown = re.search(r"^stage1_single_flow is complete; next: (.*)$", log, flags=re.MULTILINE)
    assert shown is not None
    words = shlex.split(shown[1])
    script = ROOT / "slurm" / f"{STAGES[1]}.sh"
    if script.is_file():
        assert words[:3] == ["sbatch", "--partition=gpu", f"slurm/{STAGES[1]}.sh"]
        given = [f"stage={STAGES[1]}", *words[3:]]
    else:
        assert words[:3] == ["srun", "vdtrain", "train"]
        given = words[3:]
    expected = [f"stage={STAGES[1]}", *tiny_runs.overrides, "tracking=offline"]
    assert compose("train", given) == compose("train", expected)
    assert main(["preflight", *given]) == 0
    assert f"continues from step 2, {tiny_runs.run(2)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "beginning"),
    [
        ({}, "vdtrain train stage=stage2_dual_flow"),
        (TORCHRUN, "torchrun --standalone --nproc-per-node=8 -m vdtrain train stage=stage2_dual_flow"),
        (
            {**TORCHRUN, "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "n1"},
            "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=n1 --nproc-per-node=8 -m vdtrain train "
            "stage=stage2_dual_flow",
        ),
        ({"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/nowhere"}, "srun vdtrain train stage=stage2_dual_flow"),
    ],
)
def test_it_starts_as_the_stage_before_it_did(environment: dict[str, str], beginning: str) -> None:
    words = words_after(["stage=stage1_single_flow", "model=tiny", "data=shapes", "hardware=cpu"], environment)
    assert words == [*beginning.split(), "model=tiny", "data=shapes", "hardware=cpu"]


def test_it_is_the_batch_script_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "stage3_four_flow.sh").touch()
    environment = {**SLURM, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ACCOUNT": "vision"}
    words = words_after(["stage=stage2_dual_flow", "hardware=h100"], environment)
    assert words == ["sbatch", "--account=vision", "slurm/stage3_four_flow.sh", "hardware=h100"]


def test_overrides_stay_but_for_those_that_make_the_stage(tmp_path: Path) -> None:
    kept = [
        "seed=3",
        "stage.samples_scale=0.01",
        "stage.global_batch_size=64",
        "+objective.flow_weights.image-to-image=2",
    ]
    own = ["stage.flows=[image-to-image]", "stage.gradient_scales.global=0.5", "stage.init_from=null"]
    words = words_after(["stage=stage1_single_flow", *own, *kept], {})
    assert words == ["vdtrain", "train", "stage=stage2_dual_flow", *kept]


@pytest.mark.parametrize(
    ("run_dir", "following"),
    [
        ("/scratch/stage1_single_flow-b", "/scratch/stage2_dual_flow-b"),
        ("/scratch/my first run", "/scratch/stage2_dual_flow"),
    ],
)
def test_a_run_folder_of_ones_own_is_where_the_next_stage_starts(run_dir: str, following: str) -> None:
    words = words_after(["stage=stage1_single_flow", f"run_dir={run_dir}"], {})
    assert words == ["vdtrain", "train", f"stage={STAGES[1]}", f"stage.init_from={run_dir}", f"run_dir={following}"]
    config = to_object(compose("train", words[2:]), TrainConfig)
    assert (config.stage.init_from, config.run_dir) == (run_dir, following)


def test_after_the_last_stage_one_samples(tiny_runs: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_after(["stage=stage3_four_flow", *tiny_runs.overrides], {})
    assert words[:4] == ["vdtrain", "sample", str(tiny_runs.run(3)), "a red circle"]
    assert {"flow=text-to-image", "resolution=64"} <= set(words)
    assert main([*words[1:], "--cfg", "job"]) == 0
    # A stage of images alone has no captions to sample from.
    words = words_after(["stage=stage3_four_flow", *tiny_runs.overrides, "stage.flows=[image-to-image]"], {})
    assert words == ["vdtrain", "status", str(tiny_runs.run(3))]


def test_a_model_with_classes_of_ones_own_is_sampled_with_trust_in_them() -> None:
    target = "model.modalities.image.vae._target_=mine.vaes.ImageVAE"
    words = words_after(["stage=stage3_four_flow", "model=tiny", target], {})
    assert words[:2] == ["vdtrain", "sample"]
    assert words[-1] == "trust=[mine.vaes]"
