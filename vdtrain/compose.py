"""Hydra composition for every verb: overrides in, a checked dataclass out, and one line for whatever is wrong."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import vdtrain.config
import vdtrain.evaluation_config
from vdtrain.config import (
    BlendConfig,
    DataPipelineConfig,
    EditConfig,
    LatentsConfig,
    PlanConfig,
    PreflightConfig,
    SampleConfig,
    StatusConfig,
    TrainConfig,
    WeightsConfig,
)
from vdtrain.evaluation_config import EvaluateConfig

Schema = TypeVar("Schema")
SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "plan": PlanConfig,
    "preflight": PreflightConfig,
    "status": StatusConfig,
    "sample": SampleConfig,
    "blend": BlendConfig,
    "edit": EditConfig,
    "evaluate": EvaluateConfig,
    "weights": WeightsConfig,
    "data_pipeline": DataPipelineConfig,
    "latents": LatentsConfig,
}


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the setting, its value and the remedy."""


def config_folder() -> Path:
    """The `conf/` folder: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/ folder beside or inside {package}: install vdtrain from its repository")


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose `conf/<config_name>.yaml` with Hydra overrides, strictly against its schema.

    `hydra.searchpath=[FOLDER]` finds group options in a user's own folder too.

    Raises:
        ConfigError: unknown key or group option, wrong type, malformed override.
    """
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())), warnings.catch_warnings():
            warnings.filterwarnings("error", message="provider=hydra.searchpath")
            config = hydra_compose(config_name, overrides=list(overrides))
        # Missing values and broken interpolations surface here rather than in the middle of a run.
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    except UserWarning as warning:
        folder = re.sub(r".*path=(.*) is not available.*", r"\1", str(warning))
        raise ConfigError(
            f"hydra.searchpath={folder}: no such folder; give one that holds model/, stage/ ..."
        ) from warning
    return config


def to_object(config: DictConfig, schema: type[Schema]) -> Schema:
    """The composed configuration as its dataclass, interpolations resolved."""
    return cast(Schema, OmegaConf.to_object(config))


def options(group: str) -> list[str]:
    """Names that a config group offers, e.g. the stages."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def run_verb(
    usage: str,
    config_name: str,
    schema: type[Schema],
    action: Callable[[Schema, DictConfig], int],
    argv: Sequence[str],
    speaks: bool = True,
) -> int:
    """Parse a verb's command line, compose its configuration, call `action`, and return the exit status.

    `--help` prints `usage` and the config groups; `--cfg job` prints the configuration (`--resolve` with its
    interpolations filled in) and stops. A ConfigError becomes one line on stderr (of the process that `speaks`, where
    several find the same mistake) and status 2.
    """
    flags = [argument for argument in argv if argument.startswith("-")]
    overrides = [argument for argument in argv if not argument.startswith("-") and argument != "job"]
    if "--help" in flags or "-h" in flags:
        print(usage + _groups_text(config_name))
        return 0
    known = {"--cfg", "-c", "--cfg=job", "--resolve"}
    try:
        for flag in flags:
            if flag not in known:
                raise ConfigError(f"unknown flag {flag}: settings are Hydra overrides such as stage.learning_rate=3e-5")
        config = compose(config_name, overrides)
        if {"--cfg", "-c", "--cfg=job"} & set(flags):
            print(OmegaConf.to_yaml(config, resolve="--resolve" in flags), end="")
            return 0
        return action(to_object(config, schema), config)
    except ConfigError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return 2


def _groups_text(config_name: str) -> str:
    folder = config_folder()
    text = (folder / f"{config_name}.yaml").read_text()
    groups = re.findall(r"^ +- (\w+): (\w+)", text, flags=re.MULTILINE)
    if not groups:
        return ""
    lines = [f"  {group + '=':<10} {', '.join(options(group))} (default: {default})" for group, default in groups]
    return "\nGroups:\n" + "\n".join(lines) + "\n"


def _one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's several lines as one, with the nearest known name where a key does not exist."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(str(cause).split())
    key = getattr(cause, "full_key", None) or ""
    missing = re.search(r"Could not find '([^']+)' Available options in '([^']+)': (.+)$", " ".join(str(error).split()))
    if missing:
        option, group = missing.group(1).split("/")[-1], missing.group(2)
        known = missing.group(3).partition(" Config search path:")[0].split()
        return f"{group}={option}: no such option; choose one of {', '.join(known)}"
    if "not in '" in text or "not in struct" in text:
        nearest = difflib.get_close_matches(key.split(".")[-1], _setting_names(), n=1)
        hint = (
            f"did you mean {nearest[0]!r}?" if nearest else "--cfg job shows all; a new table entry needs a + before it"
        )
        return f"{key or text}: no such setting; {hint}"
    text = re.sub(r" full_key: \S+| object_type=\S+| reference_type=\S+", "", text)
    return f"{key}: {text}" if key and key not in text else text


def _setting_names() -> list[str]:
    """Every field name in the schema."""
    values = [*vars(vdtrain.config).values(), *vars(vdtrain.evaluation_config).values()]
    groups = [value for value in values if isinstance(value, type) and is_dataclass(value)]
    return [item.name for group in groups for item in fields(group)]
