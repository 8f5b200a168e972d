"""The loaders that benchmarks/loader.py compares, each run by itself in a process of its own.

python benchmarks/loader_contestants.py '{"contestant": "vdtrain", "workers": 2, ...}'        # prints a line of JSON

All deliver batches of images at the resolution and of CLIP's token ids. Streaming runs in another environment than
the rest: what only one contestant needs is imported by that one alone.
"""

from __future__ import annotations

import json
import math
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

from vdtrain.data.decode import decode_into

LENGTH = 77
CENTRE = (0.5, 0.5)
# Samples of the buffers that WebDataset shuffles with: open_clip's, and one that is common elsewhere.
OPEN_CLIP_BUFFER, BUFFER = 5000, 1000


class Collate:
    """Encoded pairs to a batch: images uint8 [b, R, R, 3], decoded into their place, and CLIP's ids int64 [b, 77].

    In a worker process the images are decoded into shared memory, so that nobody copies them on the way out.
    """

    def __init__(self, folder: Path, resolution: int) -> None:
        self.file, self.resolution = str(folder / "tokenizer.json"), resolution
        self.tokenizer: Any = None

    def __call__(self, pairs: list[tuple[bytes, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tokenizer is None:  # made in the worker: a tokenizer does not survive a fork
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(self.file)
            self.end = self.tokenizer.get_vocab_size() - 1
        shape = (len(pairs), self.resolution, self.resolution, 3)
        images = torch.empty(0, dtype=torch.uint8)
        if torch.utils.data.get_worker_info() is not None:
            images = images.new(images.untyped_storage()._new_shared(math.prod(shape)))
        images.resize_(shape)
        for place, (data, _) in zip(images.numpy(), pairs, strict=True):
            decode_into(place, data, CENTRE)
        rows = np.full((len(pairs), LENGTH), self.end, np.int64)
        rows[:, 0] = self.end - 1
        captions = self.tokenizer.encode_batch_fast([caption for _, caption in pairs], add_special_tokens=False)
        for row, caption in zip(rows, captions, strict=True):
            ids = caption.ids[: LENGTH - 2]
            row[1 : 1 + len(ids)] = ids
        return images, torch.from_numpy(rows)


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


def webdataset_expert(folder: Path, task: dict[str, Any]) -> Iterator[Any]:
    """WebDataset as an expert writes it: no JSON is read, bytes are shuffled, batches are decoded into their place."""
    import webdataset as wds

    def pair(sample: dict[str, bytes]) -> tuple[bytes, str]:
        return sample["jpg"], sample["txt"].decode()

    steps = [wds.map(pair), wds.batched(task["batch"], collation_fn=Collate(folder, task["resolution"]), partial=False)]
    return _webdataset(folder, task, BUFFER, steps, lambda name: not name.endswith(".json"))


class IndexedPairs(torch.utils.data.Dataset[Any]):
    """A map-style data set over tar files: offsets found once, a batch's bytes read at them."""

    def __init__(self, shards: list[Path]) -> None:
        import tarfile

        self.paths, self.files, self.places, self.captions = shards, {}, [], []
        for number, path in enumerate(shards):
            with tarfile.open(path) as tar:
                members = {member.name: member for member in tar}
                for name in sorted(name for name in members if name.endswith(".jpg")):
                    self.places.append((number, members[name].offset_data, members[name].size))
                    text = tar.extractfile(members[name.replace(".jpg", ".txt")])
                    self.captions.append(text.read().decode())  # type: ignore[union-attr]

    files: dict[int, int]
    places: list[tuple[int, int, int]]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, indices: list[int]) -> list[tuple[bytes, str]]:
        if not self.files:  # opened in the worker
            self.files = {number: os.open(path, os.O_RDONLY) for number, path in enumerate(self.paths)}
        places = [self.places[index] for index in indices]
        data = [os.pread(self.files[shard], size, offset) for shard, offset, size in places]
        return list(zip(data, [self.captions[index] for index in indices], strict=True))


def indexed(folder: Path, task: dict[str, Any]) -> Iterator[Any]:
    """PyTorch's loader over an indexed reader of forty lines."""
    dataset = IndexedPairs(sorted((folder / "shards").glob("*.tar")))
    workers, count = task["workers"], (task["warm"] + task["batches"] + 16) * task["batch"]
    # One epoch holds all that is read, so that no worker waits for another epoch.
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=count)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=task["batch"],
        sampler=sampler,
        num_workers=workers,
        collate_fn=Collate(folder, task["resolution"]),
    )
    return iter(loader)


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
        wds.batched(task["batch"], partial=False),
    ]
    return _webdataset(folder, task, OPEN_CLIP_BUFFER, steps)


def _webdataset(
    folder: Path, task: dict[str, Any], buffer: int, steps: list[Any], files: Callable[[str], bool] | None = None
) -> Iterator[Any]:
    import webdataset as wds

    shards = sorted(map(str, (folder / "shards").glob("*.tar")))
    # Shards are drawn anew without end, and buffers are full from the start: the rate is that of a long run.
    pipeline = wds.DataPipeline(
        wds.ResampledShards(shards, deterministic=True),
        wds.tarfile_to_samples(select_files=files),
        wds.shuffle(buffer, initial=buffer),
        *steps,
    )
    loader = wds.WebLoader(
        pipeline, batch_size=None, shuffle=False, num_workers=task["workers"], persistent_workers=task["workers"] > 0
    )
    return iter(loader)


def streaming(folder: Path, task: dict[str, Any]) -> Iterator[Any]:
    """MosaicML Streaming over the same images in its format; batches are decoded into their place."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Pairs(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[bytes, str]:
            sample = super().__getitem__(at)
            return sample["jpg"], sample["caption"]

    dataset = Pairs(
        local=str(folder / "mds"),
        shuffle=True,
        batch_size=task["batch"],
        # One epoch holds all that is read: its beginning is not measured again and again.
        epoch_size=(task["warm"] + task["batches"] + 16) * task["batch"],
    )
    workers = task["workers"]
    collate = Collate(folder, task["resolution"])
    return iter(DataLoader(dataset, batch_size=task["batch"], num_workers=workers, collate_fn=collate))


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
    "webdataset": webdataset_expert,
    "indexed": indexed,
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
