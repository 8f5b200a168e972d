"""Tar shards to a manifest: every new shard is read once and checked, and its complete samples are listed.

A damaged shard is reported and left out. A shard that is listed already is not read again, so that a run after an
interruption, or with new shards, reads only what is missing.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa

from data_pipeline.index.builder import ManifestBuilder, Task
from data_pipeline.index.find import OWN, Found, Source, find
from data_pipeline.index.repeated import left_out, repeated_images, repeated_uids
from data_pipeline.index.samples import Endings
from data_pipeline.index.shard_reading import ShardError, ShardScan, read_shard
from data_pipeline.workers import alone, workers
from vdtrain.data.manifest import Manifest, read_shards
from vdtrain.data.tar_samples import IMAGES, METADATA, TEXTS
from vdtrain.errors import ConfigError, NothingError
from vdtrain.progress import Progress

logger = logging.getLogger(__name__)

# Shards whose samples share a file.
FILE_SHARDS = 100
# Names in a line about many shards.
NAMED = 5
# Fields of a JSON in a line.
FIELDS = 12


def index(
    sources: Mapping[str, Path],
    manifest: Path,
    *,
    own: Sequence[Path] = (),
    caption: str | None = None,
    processes: int = 1,
    decode: bool = False,
    drop_repeated: int | None = None,
    members: Mapping[str, Sequence[str]] = MappingProxyType({}),
    file_shards: int = FILE_SHARDS,
) -> None:
    """Update a manifest to the shards in the sources' folders; the number of processes does not change the result.

    Args:
        sources: folders of the shards that `download` makes.
        own: folders of tars that another program made, or such tars.
        caption: field of the samples' JSON that holds the captions; None for members of text, or else "caption" or
            "text". Shards that were indexed with another field are read again.
        decode: decode every image; shards that were indexed without decoding are read again.
        drop_repeated: leave out all samples of an image that comes more often; None for none.
        members: by modality beside images and captions, the endings of its files. Two of an image, a caption and such
            files then make a sample. Shards that were indexed with other ones are read again.
        file_shards: shards whose samples share a file. The manifest is written after each such file, or less often if
            that takes long.

    Raises:
        ConfigError: another run is at work, or an ending is taken twice, or belongs to images or captions.
        NothingError: no source has a shard, or no shard has a sample.
        ShardError: shards are damaged or missing (the manifest then lists all the others).
        ManifestError: the existing manifest cannot be read.
    """
    every = [Source(name, [folder]) for name, folder in sources.items()]
    if own and OWN in sources:
        raise ShardError(f"data.sources.{OWN}: is the name of the source of data.shards; give the source another name")
    if own:
        every.append(Source(OWN, own, own=True))
    _check_folders(every)
    endings = endings_of(members)
    lock = manifest.with_name(manifest.name + ".lock")
    with alone("index", lock, f"data.manifest={manifest}"):
        before = read_shards(manifest)
        found = find(every, manifest, decode, caption, endings)
        _check_found(every, manifest, before, found)
        builder = ManifestBuilder(manifest, before, found.tasks, caption, drop_repeated is not None, endings)
        damaged = 0
        fields: tuple[str, ...] = ()
        new = builder.missing()
        with (
            builder,
            workers(processes, "data.index.processes", lock) as run,
            Progress("index", sum(task.bytes for task in new) / 1e6, "MB") as progress,
        ):
            for number, (task, scan) in enumerate(zip(new, run(_read, new, ""), strict=True), start=1):
                progress.note = f"{number:,} of {len(new):,} shards"
                progress.advance(task.bytes / 1e6)
                if isinstance(scan, str):
                    logger.warning("left out: %s", scan)
                    damaged += 1
                    builder.drop(task)
                    continue
                if scan.damage:
                    logger.warning("damaged: %s: %s; its whole samples are listed", task.path, scan.damage)
                fields = fields or scan.fields
                builder.add(task, scan)
                if builder.waiting == file_shards:
                    builder.write(last=False)
            builder.write()
        _leave_out_repeated(manifest, builder, drop_repeated, changed=bool(new or builder.dropped))
        broken = _report(manifest, builder, found, len(new) - damaged)
    if not sum(builder.listed()["samples"].to_pylist()):
        reasons = [f"{damaged:,} shards as said above"] * bool(damaged) + [_counted(broken)] * bool(broken)
        raise NothingError(
            f"{manifest}: no sample in {len(found.tasks):,} shards; left out: {', '.join(reasons) or 'none'}; "
            f"{_remedy(broken, fields, endings)}"
        )
    if damaged:
        raise ShardError(
            f"{manifest}: {damaged:,} of {len(found.tasks):,} shards are left out, each named above with what to "
            "do; then index again"
        )


def endings_of(members: Mapping[str, Sequence[str]]) -> Endings:
    """The modality of each ending, in small letters without a dot; a ConfigError if an ending is taken already."""
    found: dict[str, str] = {}
    for modality, endings in members.items():
        setting = f"data.index.members.{modality}"
        if modality in ("image", "text"):
            raise ConfigError(f"{setting}: images and captions are always indexed; name another modality")
        if not endings:
            raise ConfigError(f"{setting}: empty; name the endings of its files, such as [wav, flac]")
        for given in endings:
            ending = given.lower().lstrip(".")
            if not ending or "/" in ending or ending in (*IMAGES, *TEXTS, METADATA):
                raise ConfigError(
                    f"{setting}: {given!r} is no ending of another modality's files; give one such as wav or "
                    f"{modality}.png"
                )
            if ending in found:
                raise ConfigError(f"{setting}: {given!r} is an ending of {found[ending]} too; give each its own")
            found[ending] = modality
    return found


def _leave_out_repeated(manifest: Path, builder: ManifestBuilder, allowed: int | None, changed: bool) -> None:
    """Tell of images that are listed more than once, and leave out those that come more often than allowed."""
    content = Manifest(manifest)
    if not (changed or allowed is not None or content.left_out.any()):
        return
    repeated = repeated_images(content, allowed)
    builder.leave_out(repeated.above)
    if repeated.images and changed:
        remedy = "" if allowed is not None else "; data.index.drop_repeated=N leaves out those that come more often"
        print(f"one image more than once: {repeated.text(content)}{remedy}")


def _read(task: Task) -> ShardScan | str:
    """Read a shard; returns an error message if it is damaged."""
    try:
        return read_shard(task.path, task.source, task.name, task.decode, task.caption, task.own, task.endings)
    except ShardError as error:
        return str(error)


def _check_folders(sources: Sequence[Source]) -> None:
    """Raise a ShardError if one's own shards are not there, or if a tar would belong to two sources."""
    places = [(source, root, root.resolve()) for source in sources for root in source.roots]
    for source, root, _ in places:
        if source.own and not os.path.exists(root):
            where = f"leads to {os.readlink(root)}, which does not exist" if root.is_symlink() else "is not there"
            raise NothingError(f"{source.setting(root)}: {where}; mount its disk, or give the folder of your tars")
    for (source, root, place), (other, outer, around) in itertools.permutations(places, 2):
        if source is not other and place.is_relative_to(around):
            raise ShardError(
                f"{source.setting(root)}: lies in {other.setting(outer)}; give each source a folder of its own"
            )


def _check_found(sources: Sequence[Source], manifest: Path, before: pa.Table, found: Found) -> None:
    """Raise a ShardError if there is no shard, or if listed ones are missing as on a disk that is not mounted."""
    listed = Counter(before["source"].to_pylist())
    names = before["path"].to_pylist()

    def below(place: Path) -> int:
        """Number of listed shards in a place."""
        name = os.path.relpath(place, manifest)
        return sum(each == name or each.startswith(f"{name}/") for each in names)

    for link in found.dangling:
        if lost := below(link):
            raise ShardError(
                f"{link}: leads to {os.readlink(link)}, which does not exist, and {manifest} lists {lost:,} shards "
                "there; mount its disk"
            )
        logger.warning("passed over: %s: leads to %s, which does not exist", link, os.readlink(link))
    for source, root in ((each, root) for each in sources for root in each.roots):
        # A disk that is not mounted is a folder that is missing or empty.
        empty = root.is_dir() and not any(root.iterdir())
        lost = below(root) if empty else 0 if root.exists() else listed[source.name]
        if lost:
            otherwise = "choose another data.manifest" if source.own else "take the source out of data.sources"
            missing: type[ValueError] = ShardError if found.tasks else NothingError
            raise missing(
                f"{source.setting(root)}: {'the folder is empty' if empty else 'no such folder'}, and {manifest} lists "
                f"{lost:,} shards of it; bring it back, or {otherwise}"
            )
    if not found.tasks:
        raise NothingError(_nothing(sources, found))
    if found.compressed:
        logger.warning("passed over: %s compressed tars: %s", f"{len(found.compressed):,}", _named(found.compressed))


def _nothing(sources: Sequence[Source], found: Found) -> str:
    """Why there is no shard, and what helps."""
    places = ", ".join(source.setting(root) for source in sources for root in source.roots)
    if not places:
        return "data.shards: empty; name the folder of your tars, data.shards=FOLDER"
    if found.compressed:
        return (
            f"{places}: {len(found.compressed):,} compressed tars, and samples are read by their place; decompress "
            f"them ({_named(found.compressed)})"
        )
    if all(source.own for source in sources):
        others = ", ".join(f"{count:,} {suffix or 'others'}" for suffix, count in found.others.most_common(NAMED))
        return (
            f"{places}: no .tar there ({others or 'no file at all'}); give the folder of your tars, or make tars of "
            "images by `python -m data_pipeline pack`"
        )
    reason = f"none of {found.unfinished:,} .tar has finished its download" if found.unfinished else "no .tar"
    folders = ", ".join(str(root) for source in sources for root in source.roots)
    return (
        f"data.sources: {reason} in {folders}; run `python -m data_pipeline download` first, or name tars of your own "
        "by data.shards"
    )


def _report(manifest: Path, builder: ManifestBuilder, found: Found, read: int) -> Counter[str]:
    """Print what the manifest lists and what is listed twice; returns what it leaves out, by reason."""
    shards = builder.listed()
    content = Manifest(manifest)
    broken = left_out(shards, content)
    there = [name for name in builder.dropped if os.path.exists(os.path.normpath(manifest / name))]
    gone = [name for name in builder.dropped if name not in set(there)]
    for names, what in ((gone, "are gone"), (there, "no setting names any more")):
        if names:
            logger.warning("dropped: %s shards that %s: %s", f"{len(names):,}", what, _named(names))
    if found.unfinished:
        logger.warning("passed over: %s .tar whose download has not finished", f"{found.unfinished:,}")
    if read or builder.dropped:
        repeated = repeated_uids(content)
        if repeated.example is not None:
            logger.warning(
                "listed more than once: %s%s samples, as in %s and %s; were the same rows downloaded twice?",
                "" if repeated.compared == 1 else "about ",
                f"{repeated.samples:,}",
                *repeated.example,
            )
    print(
        f"{manifest}: {len(content):,} samples in {len(shards):,} shards, {read:,} of them new; left out: "
        f"{_counted(broken) or 'none'}"
    )
    return broken


def _remedy(broken: Counter[str], fields: Sequence[str], endings: Endings) -> str:
    """What helps if no sample is left."""
    if broken["no caption"]:
        told = f" (here {', '.join(fields[:FIELDS])})" if fields else ""
        return (
            f"give each image a .txt of its name, or name the captions' field of the JSON{told} by data.index.caption"
        )
    what = f"an image ({', '.join(IMAGES)})" + (
        f" or a file of data.index.members ({', '.join(endings)})" if endings else ""
    )
    return f"a sample is {what} and a .txt or .json of its name"


def _counted(broken: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in broken.most_common())


def _named(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:NAMED])) + (", ..." if len(names) > NAMED else "")
