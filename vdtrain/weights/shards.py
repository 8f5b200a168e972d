"""Safetensors in the form of Hugging Face's libraries: one file, or several of bounded size with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vdtrain.files import sync

SHARD_BYTES = 2 * 2**30


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file. Names may share memory, as the contexts that start from one attention do; each gets its copy.

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
    path.touch()
    mode = path.stat().st_mode
    try:
        # transformers reads the framework from the metadata.
        save_file(separate, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # The library's files can be read by their owner alone, and weights are shared.
    path.chmod(mode)


def write_shards(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `<stem>.safetensors`, or `<stem>-0000i-of-0000n.safetensors` with `<stem>.safetensors.index.json`.

    No more than one file's tensors, about 2 GiB, are held at a time.

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
