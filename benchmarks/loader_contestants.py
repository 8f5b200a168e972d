"""The loaders that benchmarks/loader.py compares, each run by itself in a process of its own.

python benchmarks/loader_contestants.py '{"contestant": "vdtrain", "workers": 2, ...}'        # prints a line of JSON

All deliver batches of images at the resolution and of CLIP's token ids. Streaming runs in another environment than
the rest: what only one contestant needs is imported by that one alone.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vdtrain.data.decode import decode

LENGTH = 77
CENTRE = (0.5, 0.5)
# Samples of the buffers that WebDataset shuffles with: open_clip's, and one that is common elsewhere.
OPEN_CLIP_BUFFER, BUFFER = 5000, 1000


def fast_tokenizer(folder: Path) -> Callable[[str], torch.Tensor]:
    """CLIP's ids of one caption, int64 [77], by the `tokenizers` library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.get_vocab_size() - 1

    def ids(caption: str) -> torch.Tensor:
        row = torch.full((LENGTH,), end, dtype=torch.int64)
        row[0] = end - 1
        kept = tokenizer.encode(caption, add_special_tokens=False).ids[: LENGTH - 2]
        row[1 : 1 + len(kept)] = torch.tensor(kept)
        return row

    return ids


def vdtrain(folder: Path, task: dict[str, Any]) -> Iterator[Any]:
    """The trainer's own stream, its captions tokenised beside it as training does."""
    from vdtrain.data.loading import Prefetcher
    from vdtrain.data.stream import PairStream
    from vdtrain.models.tokenizers import ClipTokenizer, EncoderTokenizer

    tokenizers: dict[str, Callable[[list[str]], torch.Tensor]] = {"clip": ClipTokenizer(None, LENGTH)}
    if task.get("bert"):
        tokenizers["bert"] = EncoderTokenizer(str(folder / "bert.json"), LENGTH)

    def prepare(samples: Mapping[str, Any]) -> dict[str, Any]:
        return {**samples, **{name: tokenize(samples["text"]) for name, tokenize in tokenizers.items()}}

    stream = PairStream(
        folder / "manifest",
        seed=0,
        resolution=task["resolution"],
        global_batch_size=task["batch"],
        workers=task["workers"],
    )
    return iter(Prefetcher(stream, prepare))


def webdataset_plain(folder: Path, task: dict[str, Any]) -> Iterator[Any]:
    """WebDataset with the trainer's decoder and the fast tokenizer."""
    tokenize = fast_tokenizer(folder)
    resolution = task["resolution"]

    def image(data: bytes) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(decode(data, resolution, CENTRE)))

    def text(data: bytes) -> torch.Tensor:
        return tokenize(data.decode())

    import webdataset as wds

    steps = [wds.to_tuple("jpg", "txt"), wds.map_tuple(image, text)]
    return _webdataset(folder, task, BUFFER, steps)


def open_clip_style(folder: Path, task: dict[str, Any]) -> Iterator[Any]:
    """open_clip's pipeline for training: its steps, its image transform, its tokenizer."""
    import webdataset as wds
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import image_transform

    tokenizer = SimpleTokenizer()
    transform = image_transform(task["resolution"], is_train=True)

    def text(caption: str) -> torch.Tensor:
        row: torch.Tensor = tokenizer(caption)[0]
        return row

    steps = [
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=text),
        wds.to_tuple("image", "text"),
    ]
    return _webdataset(folder, task, OPEN_CLIP_BUFFER, steps)


def _webdataset(folder: Path, task: dict[str, Any], buffer: int, steps: list[Any]) -> Iterator[Any]:
    import webdataset as wds

    shards = sorted(map(str, (folder / "shards").glob("*.tar")))
    # Shards are drawn anew without end, and buffers are full from the start: the rate is that of a long run.
    pipeline = wds.DataPipeline(
        wds.ResampledShards(shards, deterministic=True),
        wds.tarfile_to_samples(),
        wds.shuffle(buffer, initial=buffer),
        *steps,
        wds.batched(task["batch"], partial=False),
    )
    loader = wds.WebLoader(
        pipeline, batch_size=None, shuffle=False, num_workers=task["workers"], persistent_workers=task["workers"] > 0
    )
    return iter(loader)


def streaming(folder: Path, task: dict[str, Any]) -> Iterator[Any]:
    """MosaicML Streaming over the same images in its format, with the trainer's decoder and the fast tokenizer."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    tokenize = fast_tokenizer(folder)
    resolution = task["resolution"]

    class Pairs(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            image = np.ascontiguousarray(decode(sample["jpg"], resolution, CENTRE))
            return torch.from_numpy(image), tokenize(sample["caption"])

    dataset = Pairs(
        local=str(folder / "mds"),
        shuffle=True,
        batch_size=task["batch"],
        # One epoch holds all that is read: its beginning is not measured again and again.
        epoch_size=(task["warm"] + task["batches"] + 16) * task["batch"],
    )
    workers = task["workers"]
    return iter(DataLoader(dataset, batch_size=task["batch"], num_workers=workers, persistent_workers=workers > 0))


def decode_only(folder: Path, task: dict[str, Any]) -> Iterator[Any]:
    """The limit: libjpeg-turbo at half scale on bytes in memory, as many threads as workers, nothing else."""
    import simplejpeg

    from vdtrain.data.manifest import Manifest

    manifest = Manifest(folder / "manifest")
    images: list[bytes] = []
    for shard in range(len(manifest.shards)):
        rows = manifest.rows(shard)
        data = Path(manifest.shards[shard]).read_bytes()
        images += [data[at : at + size] for at, size in zip(rows.offset, rows.size, strict=True)]
    side = task["resolution"]

    def decode_all(chunk: list[bytes]) -> None:
        for data in chunk:
            simplejpeg.decode_jpeg(data, "RGB", min_height=side, min_width=side)

    pool = ThreadPoolExecutor(max(1, task["workers"]))
    size = task["batch"] // max(1, task["workers"])
    endless = cycle(images)

    def batches() -> Iterator[Any]:
        pending = [pool.submit(decode_all, list(islice(endless, size))) for _ in range(4 * task["workers"])]
        while True:
            for _ in range(max(1, task["workers"])):
                pending.pop(0).result()
                pending.append(pool.submit(decode_all, list(islice(endless, size))))
            yield None

    return batches()


CONTESTANTS: dict[str, Callable[[Path, dict[str, Any]], Iterator[Any]]] = {
    "vdtrain": vdtrain,
    "webdataset": webdataset_plain,
    "open_clip": open_clip_style,
    "streaming": streaming,
    "limit": decode_only,
}


def write_mds(folder: Path) -> None:
    """The images and captions of the tar shards in Streaming's own format."""
    import tarfile

    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "caption": "str"}) as writer:
        for path in sorted((folder / "shards").glob("*.tar")):
            with tarfile.open(path) as tar:
                samples: dict[str, dict[str, Any]] = {}
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
            for sample in samples.values():
                writer.write({"jpg": sample["jpg"], "caption": sample["txt"].decode()})


def cpu_seconds() -> float:
    """Of this process, with all its threads, and of its children, alive or not."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Rates of one contestant over its measured batches."""
    torch.set_num_threads(1)
    batches = CONTESTANTS[task["contestant"]](Path(task["folder"]), task)
    for _ in range(task["warm"]):
        next(batches)
    before, began = cpu_seconds(), time.perf_counter()
    for _ in range(task["batches"]):
        next(batches)
    images = task["batches"] * task["batch"]
    wall, used = time.perf_counter() - began, cpu_seconds() - before
    if hasattr(batches, "close"):
        batches.close()
    return {"images_per_cpu_second": round(images / used, 1), "images_per_second": round(images / wall, 1)}


def main() -> None:
    task = json.loads(sys.argv[1])
    if task["contestant"] == "mds":
        write_mds(Path(task["folder"]))
        return
    print("RATES " + json.dumps(measure(task)), flush=True)


if __name__ == "__main__":
    main()
