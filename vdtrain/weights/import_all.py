"""`vdtrain weights import all`: everything that training at full size starts from, each part by its own import."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vdtrain.config.command_schema import WeightsConfig
from vdtrain.config.suggestions import meant
from vdtrain.errors import ConfigError
from vdtrain.files import SHAPE_ERRORS, check_output, read_json
from vdtrain.weights.hub import PREFIX
from vdtrain.weights.imports import ADDRESSES, FOLDERS, SOURCES

START = "stable_diffusion"
# By the kind of its model.
TOKENIZERS = {"WordPiece": "bert_tokenizer", "BPE": "gpt2_tokenizer"}


def import_all(given: Sequence[str], config: WeightsConfig) -> int:
    """Import the frozen parts and the start of stage 1; what is there is left as it is. Returns the exit status.

    A part that fails does not keep the others back, and the same command makes what is missing then.

    Args:
        given: SOURCE:PATH for each source that is not to be fetched from its address, or paths alone: their content
            tells the source.

    Raises:
        ConfigError: a path cannot be used, nothing can be written, or a part could not be imported.
    """
    if config.output:
        raise ConfigError(f"output={config.output}: every part goes where the model reads it; leave it out")
    targets = _targets(config)
    paths = _paths(given, targets)
    for source, files in targets.items():
        for file in files:
            check_output(file.parent, f"{source}, {file}")
    failures = []
    for source, files in targets.items():
        if all(file.exists() for file in files) and not config.overwrite:
            print(f"{', '.join(map(str, files))}  (there already; overwrite=true makes it again)", flush=True)
            continue
        path = paths.get(source, ADDRESSES[source])
        print(f"{source}: from {path}", file=sys.stderr, flush=True)
        try:
            for made in SOURCES[source](path, replace(config, output=str(files[0]) if source in FOLDERS else None)):
                made.write()
                print(f"{made.path}  ({made.summary})", flush=True)
        except ConfigError as error:
            failures.append(f"{source}: {error}")
    if failures:
        raise ConfigError(
            f"import all: {len(failures)} of {len(targets)} failed, and the same command tries them again; "
            f"{' | '.join(failures)}"
        )
    return 0


def _targets(config: WeightsConfig) -> dict[str, list[Path]]:
    """The files or folders that the import of each source makes."""
    from vdtrain.weights.frozen_parts import PARTS

    found = {}
    reasons = []
    for part in PARTS:
        try:
            found[part.source] = [target.path for target in part.targets(config.model)]
        except ConfigError as error:
            reasons.append(str(error))
    if not found:
        raise ConfigError(f"import all: model={config.model.name} reads no imported file ({reasons[0]})")
    base = config.model.base_weights
    if base is not None:
        found[START] = [Path(base).expanduser()]
    return found


def _paths(given: Sequence[str], targets: dict[str, list[Path]]) -> dict[str, str]:
    """The path of each source that has one of its own."""
    found: dict[str, str] = {}
    for word in given:
        source, colon, path = word.partition(":")
        if not colon or f"{source}:" == PREFIX or Path(word).expanduser().exists():
            paths = _recognised(word, targets)
        elif source not in targets:
            names = ", ".join(targets)
            raise ConfigError(f"{word}: {source} is not among {names}; write SOURCE:PATH{meant(source, targets)}")
        else:
            paths = {source: path}
        for each, place in paths.items():
            if each in found:
                raise ConfigError(f"{word}: {each} is given twice, as {found[each]} too; leave one out")
            found[each] = place
        for place in paths.values():
            if not place.startswith(PREFIX) and not Path(place).expanduser().exists():
                raise ConfigError(f"{word}: no such file or folder; give an existing path, or leave {word} out")
    return found


def _recognised(word: str, targets: dict[str, list[Path]]) -> dict[str, str]:
    """The sources that a path without a name holds: one, or those of the files and folders in it."""
    from vdtrain.weights.published.layouts import pipeline_source

    path = Path(word).expanduser()
    if not path.exists():
        raise ConfigError(f"{word}: no such file or folder; write SOURCE:PATH with one of {', '.join(targets)}")
    inside: dict[str | None, Path] = {}
    # The folder of a pipeline holds parts of one source.
    if path.is_dir() and pipeline_source(path) is None:
        inside = {source: each for each in sorted(path.iterdir()) if (source := _source_of(each))}
    found = inside if len(inside) > 1 else {_source_of(path): path}
    known = {source: str(each) for source, each in found.items() if source is not None and source in targets}
    if not known:
        raise ConfigError(f"{word}: none of {', '.join(targets)} is recognised there; write SOURCE:PATH")
    return known


def _source_of(path: Path) -> str | None:
    """The source of a file or folder, by what it holds; None if it is not known."""
    from vdtrain.models.frozen_weights import WeightsError
    from vdtrain.weights.published.layouts import is_published, pipeline_source, recognised
    from vdtrain.weights.tensor_files import open_tensors

    if path.is_dir() and (source := pipeline_source(path)) is not None:
        return source
    names = {each.name for each in path.iterdir()} if path.is_dir() else {path.name}
    try:
        if is_published(path):
            return next((each.source for each in recognised(list(open_tensors(path, "path")))), None)
        if "tokenizer.json" in names:
            file = path / "tokenizer.json" if path.is_dir() else path
            return TOKENIZERS.get(read_json(file)["model"]["type"])
    except (WeightsError, OSError, *SHAPE_ERRORS):
        return None
    return "bert_tokenizer" if "vocab.txt" in names else "gpt2_tokenizer" if "merges.txt" in names else None
