"""A weights folder: the diffuser alone, to start from, to sample from, and to hand on.

weights/versatile_diffusion/
    model-00001-of-00002.safetensors   tensors under the keys of the 2023 release, in their published precision
    model.safetensors.index.json       the file of each tensor; with a single model.safetensors there is no index
    model.yaml                         the model's configuration
    weights.json                       size and SHA-256 of each of these files
    README.md                          the model card, of an export

`checkpoint=tiny` names the folder of the trained model that the package brings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vdtrain.checkpoint.folder import CHECKPOINTS, is_checkpoint
from vdtrain.config.instantiate import read_yaml, recorded_model
from vdtrain.config.schema import ModelConfig
from vdtrain.errors import described, one_line, system_error
from vdtrain.files import SHAPE_ERRORS, FileRecord, damage, read_json, sync, write_text, written_whole
from vdtrain.models.diffuser import layer_group
from vdtrain.models.frozen_weights import ASSETS, WeightsError
from vdtrain.progress import track
from vdtrain.weights.published.checks import check_diffuser
from vdtrain.weights.published.versatile_diffusion import from_released, to_released
from vdtrain.weights.tensor_files import LazyTensors, open_tensors

# By name, the weights folder. `examples/ship_miniature.py` makes it.
SHIPPED = {"tiny": ASSETS / "tiny" / "trained"}


def located(value: str) -> Path:
    """The folder that a setting for a checkpoint names.

    A name in `SHIPPED` is the package's own model, unless that path holds a checkpoint.
    """
    path = Path(value).expanduser()
    if value not in SHIPPED or is_weights_folder(path) or (path / CHECKPOINTS).is_dir() or is_checkpoint(path):
        return path
    return SHIPPED[value]


FORMAT = 1
STEM = "model"
INDEX_FILE = "weights.json"
MODEL_FILE = "model.yaml"
CARD_FILE = "README.md"
# Of a folder for diffusers.
PIPELINE_FILE = "model_index.json"
SHARD_BYTES = 2 * 2**30


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one file, which only its owner can read (see `vdtrain.files.atomic_write`).

    Tensors may share memory; each gets a copy of its own.

    Args:
        metadata: strings for the file's header, beside "format".

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    separate: dict[str, Tensor] = {}
    owners: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if (owner := plain.untyped_storage().data_ptr()) in owners:
            plain = plain.clone()
        owners.add(owner)
        separate[name] = plain
    try:
        # transformers needs "format" in the metadata.
        save_file(separate, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise system_error(error) or OSError(str(error)) from error


def write_shards(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `<stem>.safetensors`, or `<stem>-0000i-of-0000n.safetensors` with `<stem>.safetensors.index.json`.

    At most one file's tensors, about 2 GiB, are in memory.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    drafts: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0

    def write_held() -> None:
        draft = folder / f"{stem}.{len(drafts)}.incomplete"
        write_safetensors(draft, held)
        sync(draft)
        drafts.append((draft, list(held)))

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > SHARD_BYTES:
            write_held()
            held, held_bytes = {}, 0
        held[name] = tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write_held()
    if len(drafts) == 1:
        drafts[0][0].rename(folder / f"{stem}.safetensors")
        return
    places: dict[str, str] = {}
    for number, (draft, names) in enumerate(drafts, start=1):
        file = f"{stem}-{number:05d}-of-{len(drafts):05d}.safetensors"
        draft.rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def is_weights_folder(path: Path) -> bool:
    """Whether a path is a weights folder, whole or damaged."""
    return (path / INDEX_FILE).is_file()


def is_export(path: Path) -> bool:
    """Whether a folder is an export or an import of ours, which another one may replace."""
    return is_weights_folder(path) or (path / PIPELINE_FILE).is_file()


def write_weights_folder(
    path: Path, tensors: Mapping[str, Tensor], model: ModelConfig, overwrite: bool = False, card: str | None = None
) -> None:
    """Write a weights folder. The folder appears when it is whole.

    Args:
        tensors: by our names; each is read once and keeps its dtype.
        model: the model of these tensors.
        overwrite: replace what exists.
        card: text of a model card. It may be edited, so it has no checksum.

    Raises:
        ConfigError: the path exists already, or the folder cannot be written.
    """
    with written_whole(path, f"output={path}", overwrite, is_export) as draft:
        draft.mkdir()
        items = ((to_released(name), tensor) for name, tensor in track(tensors.items(), "writing", "tensors"))
        write_shards(draft, STEM, items)
        write_text(draft / MODEL_FILE, OmegaConf.to_yaml(OmegaConf.structured(model)))
        records = {file.name: asdict(FileRecord.of(file)) for file in sorted(draft.iterdir())}
        write_text(draft / INDEX_FILE, json.dumps({"format": FORMAT, "files": records}, indent=1))
        if card is not None:
            write_text(draft / CARD_FILE, card)


def open_weights_folder(path: Path, setting: str = "checkpoint", hashed: bool = True) -> LazyTensors:
    """The diffuser's tensors by our names. All files are checked; a tensor is read on access.

    Args:
        hashed: verify checksums; False compares only the sizes of files.

    Raises:
        WeightsError: a file is missing, truncated, damaged, or of other weights.
    """
    _check(path, setting, hashed)
    released = open_tensors(path, setting)
    names = {from_released(key): key for key in released}
    if foreign := names.get(None):
        raise WeightsError(f"{setting}={path}: {foreign} is not a key of a diffuser; import the weights again")
    return released.renamed({name: key for name, key in names.items() if name is not None})


def open_checked(path: Path, model: ModelConfig, setting: str) -> LazyTensors:
    """A weights folder whose layer groups are those of a model: all groups, or those that a stage has trained so far.

    Raises:
        WeightsError: the path is not a weights folder, or is of another model.
    """
    if not is_weights_folder(path):
        raise WeightsError(
            f"{setting}={path}: not a weights folder; give the output of `vdtrain weights export safetensors`"
        )
    tensors = open_weights_folder(path, setting)
    check_diffuser(tensors, model, {layer_group(name) for name in tensors}, f"{setting}={path}")
    return tensors


def weights_folder_model(path: Path, setting: str = "checkpoint") -> ModelConfig:
    """The configuration of a weights folder's model.

    Raises:
        WeightsError: the configuration is missing, damaged, or of another version of vdtrain.
    """
    try:
        return recorded_model(read_yaml(path / MODEL_FILE))
    except (OSError, ValueError) as error:
        reason = one_line(error)[:200]
        raise WeightsError(
            f"{setting}={path}: {MODEL_FILE} cannot be read ({reason}); import the weights again"
        ) from error


def _check(path: Path, setting: str, hashed: bool) -> None:
    remedy = "import the weights again"
    try:
        index = read_json(path / INDEX_FILE)
        records = {
            str(name): FileRecord(int(each["bytes"]), str(each["sha256"])) for name, each in index["files"].items()
        }
        written_by = index["format"]
    except (OSError, *SHAPE_ERRORS) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise WeightsError(f"{setting}={path}: {INDEX_FILE} cannot be read ({reason}); {remedy}") from error
    if written_by != FORMAT:
        raise WeightsError(f"{setting}={path}: format {written_by}, and this version of vdtrain reads format {FORMAT}")
    if foreign := {file.name for file in path.glob("*.safetensors*")} - records.keys():
        raise WeightsError(f"{setting}={path}: {min(foreign)} does not belong to it; remove it")
    try:
        damaged = damage(path, records, hashed=hashed)
    except OSError as error:
        raise WeightsError(f"{setting}={path}: {described(error)}") from error
    if damaged:
        raise WeightsError(f"{setting}={path}: {damaged}; {remedy}")
