"""Hydra composition for every command: overrides in, a configuration out, and one line for every mistake."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

import omegaconf.errors
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vdtrain.config.command_line import SETTING_FORM
from vdtrain.config.overrides import Override, escaped, list_items
from vdtrain.config.schema import (
    BenchConfig,
    BlendConfig,
    DataPipelineConfig,
    EditConfig,
    EvaluateConfig,
    LatentsConfig,
    PlanConfig,
    PreflightConfig,
    SampleConfig,
    StatusConfig,
    TrainConfig,
    WeightsConfig,
)
from vdtrain.config.settings import apply, complete, explained, unknown
from vdtrain.errors import ConfigError as ConfigError
from vdtrain.errors import described, not_utf8, printable

Schema = TypeVar("Schema")
SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "plan": PlanConfig,
    "bench": BenchConfig,
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
# The one table with named values that is not a group: the noise schedule.
SCHEDULE, SCHEDULES = "model.schedule", "model/schedule"
SEARCH_PATH = "hydra.searchpath"


def config_folder() -> Path:
    """The `conf/` folder: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/ folder beside or inside {package}: install vdtrain from its repository")


def compose(config_name: str, overrides: Sequence[str | Override]) -> DictConfig:
    """Compose `conf/<config_name>.yaml` with overrides, strictly against its schema.

    Hydra composes the options of groups and the settings below `hydra.`: `hydra.searchpath=[FOLDER]` adds a folder with
    options of the user's own. All other overrides are applied here one after another, so that an error names its word.
    At the end, a leading `~` of every path becomes the home folder.

    Raises:
        ConfigError: unknown key or group option, wrong type, malformed override.
    """
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
    GlobalHydra.instance().clear()
    schema = SCHEMAS[config_name]
    given = [each if isinstance(each, Override) else parsed(each) for each in overrides]
    words = [each for override in given for each in _by_name(override)]
    choices = [each for each in words if is_choice(each)]
    config = _composed(config_name, [_choice_word(each, config_name) for each in choices], schema)
    for override in words:
        if not is_choice(override):
            apply(config, override, schema)
    complete(config, schema)
    return config


def parsed(word: str) -> Override:
    """The word as an override.

    Raises:
        ConfigError: it does not have the form of an override.
    """
    override = Override.parse(word)
    if override is None:
        hint = next((f"did you mean {group}={word}?" for group in groups() if word in options(group)), SETTING_FORM)
        raise ConfigError(f"{printable(word) or repr(word)}: has no value; {hint}")
    return override


def is_choice(override: Override) -> bool:
    """Whether Hydra composes it: an option of a group, or one of Hydra's own settings."""
    # A table for a group changes settings inside it.
    named = override.key in groups() and not (override.text or "").lstrip().startswith("{")
    return named or override.key.startswith("hydra.")


def _choice_word(override: Override, config_name: str) -> str:
    """The word for Hydra."""
    key, text = override.key, override.text or ""
    if key == SEARCH_PATH:
        items = list_items(text)
        folders = [os.path.expanduser(each) for each in ([text] if items is None else items)]
        quoted = ", ".join(QuotedString(escaped(each), Quote.single).with_quotes() for each in folders)
        return f"{SEARCH_PATH}=[{quoted}]"
    if key.startswith("hydra."):
        return override.word
    if key not in dict(command_groups(config_name)):
        raise unknown(key, SCHEMAS[config_name])
    if override.sign:
        raise ConfigError(f"{override.shown}: a run has exactly one {key}; write {key}=OPTION")
    if not re.fullmatch(r"[\w./-]+", text):
        raise _no_option(key, printable(text))
    # In quotes, so that true is a name and not a truth value.
    return f"{key}='{text}'"


def _composed(config_name: str, words: list[str], schema: type) -> DictConfig:
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())), warnings.catch_warnings():
            warnings.filterwarnings("error", message="provider=hydra.searchpath")
            return hydra_compose(config_name, overrides=words)
    except UserWarning as warning:
        folder = re.sub(r".*path=(.*) is not available.*", r"\1", str(warning), flags=re.DOTALL)
        raise ConfigError(
            f"{SEARCH_PATH}={folder}: no such folder; give one that holds model/, stage/ ..."
        ) from warning
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        raise _no_option(group, option, error.options) from error
    # Hydra passes on the errors of YAML, of the disk and of OmegaConf, beside its own.
    except UnicodeDecodeError as error:
        raise ConfigError(_undecodable(error, words)) from error
    except Exception as error:
        raise _not_composed(error, printable(" ".join(words)) or config_name, schema) from error


def _undecodable(error: UnicodeDecodeError, words: Sequence[str]) -> str:
    """Which YAML file of the user's folders is not UTF-8."""
    given = "".join(word.partition("=")[2] for word in words if word.startswith(SEARCH_PATH))
    for folder in list_items(given) or []:
        for file in sorted(Path(folder.removeprefix("file://")).rglob("*.yaml")):
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError as found:
                return f"{file} {not_utf8(found, file)}"
    return f"{printable(' '.join(words))}: one of its files is not UTF-8 ({error}); convert it"


def _not_composed(error: Exception, words: str, schema: type) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return ConfigError(f"{mark.name}: invalid YAML in line {mark.line + 1}; correct that file")
    if isinstance(error, OSError):
        return ConfigError(f"{words}: {described(error)}")
    if re.search(r"(^| )[+~]*hydra\.(?!searchpath=)", words):
        return ConfigError(f"{words}: no such setting or value; below hydra, only {SEARCH_PATH} can be set")
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key, what = explained(cause, schema)
    # Here Hydra keeps only the class, the text and the key of the error.
    inside = re.match(
        r"In '([^']+)': (\w+) raised while composing config:.*?(?:full_key: (\S+)|$)", str(error), re.DOTALL
    )
    if inside is None:
        return ConfigError(f"{words}: {key}{': ' if key else ''}{what}")
    made = getattr(omegaconf.errors, inside[2], OmegaConfBaseException)("")
    made.full_key = inside[3]
    key, what = explained(made, schema)
    return ConfigError(f"{inside[1]}.yaml: {key}{': ' if key else ''}{what}")


def _no_option(group: str, option: str, known: Sequence[str] | None = None) -> ConfigError:
    names = [Path(name).stem for name in known or options(group)]
    return ConfigError(f"{group}={option}: no such option; choose from {', '.join(names)}")


def _by_name(override: Override) -> list[Override]:
    """`model.schedule=NAME` as the settings in `conf/model/schedule/NAME.yaml`; any other override unchanged.

    Raises:
        ConfigError: no such schedule.
    """
    name = (override.text or "").strip()
    if override.key != SCHEDULE or override.sign or name.startswith("{"):
        return [override]
    names = options(SCHEDULES)
    if name not in names:
        raise ConfigError(f"{override.shown}: choose from {', '.join(names)}, or set its beta_start and beta_end")
    loaded = OmegaConf.load(config_folder() / SCHEDULES / f"{name}.yaml")
    return [parsed(f"{SCHEDULE}.{setting!s}={value}") for setting, value in loaded.items()]


def to_object(config: DictConfig, schema: type[Schema]) -> Schema:
    """The composed configuration as its dataclass, interpolations resolved."""
    return cast(Schema, OmegaConf.to_object(config))


def groups() -> list[str]:
    """Names of the groups of settings that have options."""
    return sorted(path.name for path in config_folder().iterdir() if path.is_dir())


def options(group: str) -> list[str]:
    """Names of the options of a group, e.g. the stages."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


@cache
def command_groups(config_name: str) -> list[tuple[str, str]]:
    """The groups of settings that `conf/<config_name>.yaml` has, each with its default option."""
    loaded = OmegaConf.to_container(OmegaConf.load(config_folder() / f"{config_name}.yaml"))
    assert isinstance(loaded, dict)
    found: list[tuple[str, str]] = []
    for each in loaded.get("defaults", []):
        if isinstance(each, dict):
            found += [(group.removeprefix("optional "), str(option)) for group, option in each.items()]
        elif (config_folder() / f"{each}.yaml").is_file():
            found += command_groups(each)
    return found
