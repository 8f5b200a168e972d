"""The folder that an interrupted selection goes on from: one run at a time, and one plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.run_lock import RunLockError, run_lock
from data_pipeline.selection import SELECTION_FILE, fingerprint, write_json
from vdtrain.compose import ConfigError
from vdtrain.data_config import DataConfig
from vdtrain.files import INCOMPLETE

PLAN_FILE = "plan.json"


def prepare(
    data: DataConfig, planned: Mapping[str, Mapping[str, Any]], wanted: Sequence[str], scratch: Path, unit_rows: int
) -> None:
    """Take up the run that was interrupted, if it was of the same plan, or clear the way for a new one.

    Args:
        planned: the plans of all sources.
        wanted: the sources whose rows have to be selected.

    Raises:
        ConfigError: a source's folder holds what select did not write.
    """
    record = scratch / PLAN_FILE
    folders = {name: Path(data.sources[name].selected).resolve() for name in wanted}
    plan = {"plans": {name: fingerprint(each) for name, each in planned.items()}, "unit_rows": unit_rows}
    earlier: dict[str, Any] = {"plan": {}, "folders": [], "cleared": False}
    if record.exists():
        # A damaged one is none.
        with suppress(ValueError):
            earlier = json.loads(record.read_text(encoding="utf-8"))
    begun = {str(folder) for folder in folders.values()}
    if earlier["plan"] == plan and earlier["cleared"] and begun <= {*earlier["folders"]}:
        return
    for name, folder in folders.items():
        ours = (folder / SELECTION_FILE).exists() or str(folder) in earlier["folders"]
        if not ours and any(folder.glob("*.parquet")):
            raise ConfigError(
                f"data.sources.{name}.selected={data.sources[name].selected}: holds parquet files that select did not "
                "write; remove them, or give another folder"
            )
    # Said before anything is removed: a part without its record is known then for what it is.
    scratch.mkdir(parents=True, exist_ok=True)
    known = sorted({*earlier["folders"], *begun})
    write_json(record, {"plan": plan, "folders": known, "cleared": False})
    clear(scratch, record)
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SELECTION_FILE).unlink(missing_ok=True)
        for file in [*folder.glob("*.parquet"), *folder.glob(f"*{INCOMPLETE}")]:
            file.unlink()
    write_json(record, {"plan": plan, "folders": sorted(begun), "cleared": True})


def clear(scratch: Path, record: Path | None = None) -> None:
    """Remove what select wrote there, the plan first: units without it are not taken for whole."""
    if record is None:
        (scratch / PLAN_FILE).unlink(missing_ok=True)
    for folder in ("units", "block_lists"):
        shutil.rmtree(scratch / folder, ignore_errors=True)
    for file in scratch.glob("*.npy"):
        file.unlink()
    with suppress(OSError):
        scratch.rmdir()


@contextmanager
def locked(scratch: Path) -> Iterator[Path]:
    """Keep another run out, whose processes can live a moment longer than itself.

    Returns:
        The file that processes hold locked with this one, for `workers`.
    """
    try:
        with run_lock(scratch.with_name(scratch.name + ".lock")) as path:
            yield path
    except RunLockError as error:
        raise ConfigError(
            f"data.select.scratch={scratch}: another select is at work there; wait for it or stop it"
        ) from error
