"""Hydra composition for every command: overrides in, a configuration out, and one line for every mistake."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
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

from vdtrain.config import command_schema
from vdtrain.config.command_line import SETTING_FORM
from vdtrain.config.overrides import Override, escaped, list_items
from vdtrain.config.schema import BenchConfig, PlanConfig, PreflightConfig, TrainConfig
from vdtrain.config.settings import apply, complete, explained, unknown
from vdtrain.config.suggestions import meant
from vdtrain.errors import ConfigError as ConfigError
from vdtrain.errors import described, not_utf8, printable

Schema = TypeVar("Schema")
SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "plan": PlanConfig,
    "bench": BenchConfig,
    "preflight": PreflightConfig,
    "status": command_schema.StatusConfig,
    "report": command_schema.ReportConfig,
    "sample": command_schema.SampleConfig,
    "blend": command_schema.BlendConfig,
    "edit": command_schema.EditConfig,
    "app": command_schema.AppConfig,
    "evaluate": command_schema.EvaluateConfig,
    "compare": command_schema.CompareConfig,
    "weights": command_schema.WeightsConfig,
    "data_pipeline": command_schema.DataPipelineConfig,
    "latents": command_schema.LatentsConfig,
}
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
    choices = [each for each in given if is_choice(each)]
    # Hydra composes an option of a table inside a group by itself, so that it replaces a user's own table.
    words = [(each, _choice_word(each, config_name)) for each in choices]
    config = _composed(config_name, [word for each, word in words if "/" not in _group(each)], schema)
    searched = [word for each, word in words if each.key == SEARCH_PATH]
    for each, word in words:
        if "/" in _group(each):
            _replace(config, _group(each), _composed(None, [*searched, word], schema))
    for override in given:
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
    if override is None and "=" in word:
        key, _, text = word.partition("=")
        dotted = re.sub(r"\[(\w+)\]", r".\1", key)
        hint = SETTING_FORM if dotted == key else f"write {printable(dotted)}={printable(text)}"
        raise ConfigError(f"{printable(word)}: {printable(key)!r} is no name of a setting; {hint}")
    if override is None:
        hint = next(
            (f"did you mean {group.replace('/', '.')}={option}?" for group, option in _options_like(word)), SETTING_FORM
        )
        raise ConfigError(f"{printable(word) or repr(word)}: has no value; {hint}")
    return override


def _options_like(word: str) -> Iterator[tuple[str, str]]:
    """Groups with an option of that name; after them those with one like it."""
    own = [(group, option) for group in groups() for option in options(group)]
    yield from (each for each in own if each[1] == word)
    near = difflib.get_close_matches(word, {option for _, option in own}, n=1, cutoff=0.8)
    yield from (each for each in own if each[1] in near)


def is_choice(override: Override) -> bool:
    """Whether Hydra composes it: an option of a group, or one of Hydra's own settings."""
    # A table for a group changes settings inside it.
    named = _group(override) in groups() and not (override.text or "").lstrip().startswith("{")
    return named or override.key.startswith("hydra.")


def _group(override: Override) -> str:
    """The group that an override names, if it names one: `data.stream` and `data/stream` are `data/stream`."""
    return override.key if override.key.startswith("hydra.") else override.key.replace(".", "/")


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
    group = _group(override)
    if group.partition("/")[0] not in dict(command_groups(config_name)):
        raise unknown(key, SCHEMAS[config_name])
    if override.sign:
        raise ConfigError(f"{override.shown}: a run has exactly one {key}; write {key}=OPTION")
    if not re.fullmatch(r"[\w./-]+", text):
        raise _no_option(group, printable(text))
    # In quotes, so that true is a name and not a truth value.
    return f"+{group}='{text}'" if "/" in group else f"{group}='{text}'"


def _composed(config_name: str | None, words: list[str], schema: type) -> DictConfig:
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
        file = error.missing_cfg_file or ""
        inside = [each for each in groups() if file.startswith(f"{each}/")]
        group = max(inside, key=len) if inside else file.rpartition("/")[0]
        raise _no_option(group, file.removeprefix(f"{group}/"), error.options) from error
    # Hydra passes on the errors of YAML, of the disk and of OmegaConf, beside its own.
    except UnicodeDecodeError as error:
        raise ConfigError(_undecodable(error, words)) from error
    except Exception as error:
        raise _not_composed(error, printable(" ".join(words)) or str(config_name), schema) from error


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
    key = group.replace("/", ".")
    return ConfigError(f"{key}={option}: no such option; choose from {', '.join(names)}{meant(option, names)}")


def _replace(config: DictConfig, group: str, option: DictConfig) -> None:
    """Set a table to an option of its group. Of a table without fields in the schema, no entry stays."""
    key = group.replace("/", ".")
    if OmegaConf.get_type(OmegaConf.select(config, key)) is dict:
        OmegaConf.update(config, key, {}, merge=False)
    OmegaConf.update(config, key, OmegaConf.select(option, key), force_add=True)


def to_object(config: DictConfig, schema: type[Schema]) -> Schema:
    """The composed configuration as its dataclass, interpolations resolved."""
    return cast(Schema, OmegaConf.to_object(config))


def groups() -> list[str]:
    """Names of the groups of settings that have options; `data/stream` is a table inside a group."""
    folder = config_folder()
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir())


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
