"""Which of a folder's files hold its weights: published folders have them in several forms and precisions beside."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# In the order of preference.
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
VARIANTS = ("", "fp16", "bf16")
INDEX = re.compile(r"\.index(\.\w+)?\.json$")
# model.safetensors, model.fp16.safetensors, model-00001-of-00002.fp16.safetensors, model.fp16-00001-of-2.safetensors
WEIGHTS = re.compile(r"[^.]+(?:\.(\w+))?(-\d+-of-\d+)?(?:\.(\w+))?(\.\w+)")
# model.safetensors.index.json, model.safetensors.index.fp16.json, model.fp16.safetensors.index.json
INDICES = re.compile(r"[^.]+(?:\.(\w+))?(\.\w+)\.index(?:\.(\w+))?\.json")


@dataclass(frozen=True)
class Choice:
    """One form of the weights.

    Attributes:
        index: that names the files, if there is one.
        files: of the weights; with an index, those beside it of the same form.
    """

    index: str | None
    files: list[str]

    @property
    def sharded(self) -> bool:
        """Whether the files are parts of a whole."""
        return all(re.search(r"-\d+-of-\d+", name) for name in self.files)


def choose(names: Iterable[str]) -> Choice | None:
    """The form to read: full precision before variants of it ("model.fp16.bin"), safetensors before pickles.

    None where there are no weights.
    """
    files: dict[tuple[str, str], list[str]] = {}
    indices: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        if match := INDICES.fullmatch(name):
            indices.setdefault((match[1] or match[3] or "", match[2]), name)
        elif name.endswith(SUFFIXES):
            match = WEIGHTS.fullmatch(name)
            variant, suffix = (match[1] or match[3] or "", match[4]) if match else ("", name[name.rindex(".") :])
            files.setdefault((variant, suffix), []).append(name)
    for form in sorted(files.keys() | indices.keys(), key=_preference):
        return Choice(indices.get(form), files.get(form, []))
    return None


def _preference(form: tuple[str, str]) -> tuple[int, str, int]:
    variant, suffix = form
    rank = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
    return rank, variant, SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES)
