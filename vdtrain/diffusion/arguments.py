"""Arguments of the Python interface: diffusers' names beside ours, values of the wrong type, seeds of generators."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from vdtrain.config.command_schema import SamplingConfig
from vdtrain.config.fields import NAMES, SettingType
from vdtrain.errors import ConfigError
from vdtrain.media import OUTPUT_TYPES

Method = TypeVar("Method", bound=Callable[..., Any])

# diffusers' name -> ours, one of which a method has.
DIFFUSERS = {
    "prompt": ("inputs",),
    "image": ("inputs", "images"),
    "num_inference_steps": ("steps",),
    "num_images_per_prompt": ("samples_per_input", "count"),
    "strength": ("fidelity",),
}
RESOLUTION = "resolution"
SETTINGS = (*(field.name for field in fields(SamplingConfig)), RESOLUTION)
SEED_END = 2**31
# What PyTorch takes.
FIRST_SEED, LAST_SEED = -(2**63), 2**64 - 1


def accepts_names_of_diffusers(method: Method) -> Method:
    """Let a method of `**settings` take diffusers' names; any other unknown name is a ConfigError."""
    places = [*inspect.signature(method).parameters][1:]
    own = {*places, *SETTINGS} - {"settings"}

    @wraps(method)
    def renaming(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return method(self, *arguments, **renamed(keywords, own, places[: len(arguments)]))

    return cast(Method, renaming)


def renamed(keywords: Mapping[str, Any], own: set[str], taken: Sequence[str] = ()) -> dict[str, Any]:
    """Keywords under the names that a method has.

    Args:
        own: names that the method has.
        taken: those that are given by place.

    Raises:
        ConfigError: a name is unknown, or two of them mean the same.
    """
    found: dict[str, Any] = {}
    for name, value in keywords.items():
        ours = name if name in own else next((each for each in DIFFUSERS.get(name, ()) if each in own), None)
        if ours is None:
            (nearest,) = difflib.get_close_matches(name, sorted(own), n=1) or ("",)
            hint = f"did you mean {nearest!r}?" if nearest else f"there are {', '.join(sorted(own))}"
            raise ConfigError(f"{name}: no such argument; {hint}")
        if ours in found or ours in taken or (ours != name and ours in keywords):
            raise ConfigError(f"{name}: given together with {ours}, which means the same; leave one out")
        found[ours] = 1 - value if name == "strength" and isinstance(value, int | float) else value
    return found


def typed_settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingConfig` in the types that it has; `resolution` becomes the height and width not given.

    Raises:
        ConfigError: a value of another type.
    """
    types = SettingType(SamplingConfig).fields or {}
    found: dict[str, Any] = {}
    for name, value in changes.items():
        wanted = types["height" if name == RESOLUTION else name]
        value = value.item() if getattr(value, "shape", None) == () else value
        accepted = (int, float) if wanted.type is float else wanted.type
        if isinstance(value, bool) or not isinstance(value, accepted):
            if value is None and wanted.optional:
                continue
            raise ConfigError(f"{name}={value!r:.60}: give {NAMES[wanted.type]}")
        found[name] = value
    side = found.pop(RESOLUTION, None)
    return found if side is None else {"height": side, "width": side, **found}


def check_output_type(given: str) -> None:
    """Refuse what is none of `OUTPUT_TYPES`; a ConfigError."""
    if given not in OUTPUT_TYPES:
        raise ConfigError(f"output_type={given!r:.60}: choose one of {', '.join(OUTPUT_TYPES)}")


def whole(name: str, value: Any, least: int = 1) -> int:
    """A value that must be a whole number of at least `least`; else a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r:.60}: give a whole number of at least {least}")
    return value


def check_number(name: str, value: Any) -> None:
    """Refuse what is no number; a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r:.60}: give a number")


def drawn_seeds(generator: Any, given: Mapping[str, Any], chosen: SamplingConfig, count: int) -> list[int]:
    """`seeds_of` the settings chosen; a ConfigError if a generator and a seed are both given."""
    if generator is not None and "seed" in given:
        raise ConfigError("generator: given together with seed; leave one out")
    return seeds_of(generator, chosen.seed, count)


def seeds_of(generator: Any, seed: int, count: int) -> list[int]:
    """The seeds of `count` samples.

    Args:
        generator: None for `seed` and its successors; a torch.Generator, from which the first seed is drawn; or a list
            of one for each sample.

    Raises:
        ConfigError: it is something else, or no generator takes such a seed.
    """
    if generator is None:
        if not FIRST_SEED <= seed <= LAST_SEED - count:
            raise ConfigError(f"seed={seed}: PyTorch's generators do not take it; give one of 0 to {SEED_END - 1}")
        return list(range(seed, seed + count))
    if isinstance(generator, torch.Generator):
        first = _drawn(generator)
        return list(range(first, first + count))
    if (
        not isinstance(generator, Sequence)
        or len(generator) != count
        or not all(isinstance(each, torch.Generator) for each in generator)
    ):
        raise ConfigError(f"generator={generator!r:.60}: give a torch.Generator, or a list of one for each of {count}")
    return [_drawn(each) for each in generator]


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(SEED_END, (), generator=generator, device=generator.device))
