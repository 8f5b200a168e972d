"""What to type when a stage is complete: the command of the stage that starts from it, as this one was started."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from vdtrain.command_line import plain_path, shell
from vdtrain.compose import config_folder, options
from vdtrain.config import TrainConfig
from vdtrain.overrides import word_for

# What makes a stage that stage.
OWN_SETTINGS = ("stage", "stage.name", "stage.flows", "stage.gradient_scales", "stage.init_from", "run_dir")
SCRIPTS = "slurm"


def next_stage(stage: str) -> str | None:
    """The stage whose file has it start from the run of `stage`; None after the last one."""
    for name in options("stage"):
        document = OmegaConf.to_container(OmegaConf.load(config_folder() / "stage" / f"{name}.yaml"), resolve=False)
        if isinstance(document, dict) and document.get("init_from") == f"${{runs_dir}}/{stage}":
            return name
    return None


def next_command(config: TrainConfig, overrides: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The command that comes after a complete stage, ready for a shell; after the last one, that which samples.

    The user's overrides stay, but for those that make the stage what it is. Started by sbatch, torchrun or plainly, as
    this process was.

    Args:
        overrides: of the command line.
    """
    name = next_stage(config.stage.name)
    if name is None:
        return shell(_last(config))
    return shell([*_launcher(name, environment), *_overrides(config, name, overrides, environment)])


def _last(config: TrainConfig) -> list[str]:
    flow = next((flow for flow in config.stage.flows if flow.startswith("text-to-")), None)
    if flow is None:
        return ["vdtrain", "status", plain_path(config.run_dir)]
    settings = [f"flow={flow}", f"resolution={config.stage.phases[-1].resolution}", f"device={config.hardware.device}"]
    return ["vdtrain", "sample", plain_path(config.run_dir), "a red circle", *settings]


def _overrides(config: TrainConfig, name: str, given: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    # The batch script names the stage itself.
    words = [] if _script(name, environment) else [f"stage={name}"]
    for override in given:
        key = override.partition("=")[0].lstrip("+~")
        if key not in OWN_SETTINGS and not key.startswith("stage.gradient_scales."):
            words.append(override)
    run_dir = Path(config.run_dir)
    if run_dir != Path(config.runs_dir) / config.stage.name:
        following = _moved(run_dir, config.stage.name, name)
        words += [word_for("stage.init_from", str(run_dir)), word_for("run_dir", str(following))]
    return words


def _moved(run_dir: Path, stage: str, following: str) -> Path:
    """Beside `run_dir`, under the same name but for the stage in it."""
    return run_dir.with_name(run_dir.name.replace(stage, following) if stage in run_dir.name else following)


def _launcher(name: str, environment: Mapping[str, str]) -> list[str]:
    script = _script(name, environment)
    if script is not None:
        flags = {"partition": "PARTITION", "account": "ACCOUNT"}
        given = {flag: environment.get(f"SLURM_JOB_{variable}") for flag, variable in flags.items()}
        return ["sbatch", *(f"--{flag}={value}" for flag, value in given.items() if value), str(script)]
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ["srun"] * ("SLURM_JOB_ID" in environment) + ["vdtrain", "train"]
    processes, nodes = (environment.get(key, "1") for key in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    meeting = ["--standalone"]
    if nodes != "1":
        meeting = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={environment.get('MASTER_ADDR')}"]
    return ["torchrun", *meeting, f"--nproc-per-node={processes}", "-m", "vdtrain.train"]


def _script(name: str, environment: Mapping[str, str]) -> Path | None:
    """The batch script of a stage, from where the running job was submitted."""
    script = Path(SCRIPTS) / f"{name}.sh"
    submitted = Path(environment.get("SLURM_SUBMIT_DIR", "."))
    return script if "SLURM_JOB_ID" in environment and (submitted / script).is_file() else None
