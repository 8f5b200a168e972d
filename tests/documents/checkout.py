"""A fresh clone in which every documented path exists, and every full-size option is a small one.

Only numbers are changed: widths, depths, samples, steps and batches in copies of `conf/` and of the demo's script.
GPUs become this machine's cores, and W&B keeps its records here.
"""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tests.documents.commands import ROOT

PACKAGES = ("vdtrain", "data_pipeline", "miniature")
FOLDERS = (*PACKAGES, "conf", "examples", "slurm", "logs", "tests/third_modality", "benchmarks")
FILES = ("Makefile", "pyproject.toml", "uv.lock", "tests/__init__.py")
BATCH = 4
PHASES = [{"resolution": 32, "samples": BATCH}, {"resolution": 64, "samples": BATCH}]


def make_checkout(root: Path, server_port: int) -> None:
    """Copy what a clone has, and make its options small."""
    leave = shutil.ignore_patterns("__pycache__", "results")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=leave)
    for name in FILES:
        shutil.copy2(ROOT / name, root / name)
    (root / "benchmarks" / "results").mkdir()
    _shrink(root / "conf")
    _shrink_scripts(root / "examples")
    # An installed environment, newer than what it was made from.
    (root / ".tools" / "bin").mkdir(parents=True)
    for name in (".tools/bin/uv", ".venv/.complete", ".venv/.distributed"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "logs" / "stage3_four_flow" / "1234.out").write_text("started\n")


def _shrink(conf: Path) -> None:
    full, tiny = (OmegaConf.load(conf / "model" / f"{name}.yaml") for name in ("versatile_diffusion", "tiny"))
    _write(conf / "model" / "versatile_diffusion.yaml", OmegaConf.merge(full, _without_files(tiny)))
    for path in (conf / "stage").glob("*.yaml"):
        _change(path, global_batch_size=BATCH, phases=PHASES)
    for path in (conf / "hardware").glob("*.yaml"):
        small = {
            "micro_batch_size": dict.fromkeys((32, 64, 256, 512), 2),
            "loader_workers": 1,
            "threads": 1,
            "compile": "none",
        }
        _change(path, device="cpu", precision="fp32", **small)
    _change(conf / "train.yaml", watchdog_seconds=100, **{"checkpoint.every_steps": 1, "log_every_steps": 1})
    _change(conf / "sampler.yaml", resolution=64, steps=2)
    _change(conf / "evaluate.yaml", samples=4, part_samples=4, batch_size=4, loader_workers=1)
    _change(conf / "plan.yaml", gpus=2)
    _change(conf / "bench.yaml", warmup_steps=1, timed_steps=1)
    _change(conf / "tracking" / "wandb.yaml", mode="offline")
    processes = {f"{command}.processes": 1 for command in ("select", "download", "index")}
    shards = {"download.samples_per_shard": 10, "download.threads": 4}
    _change(conf / "data" / "laion2b_en_coyo700m.yaml", allow_loopback=True, **processes, **shards)
    cache = {"latent_cache.batch_size": 4, "latent_cache.resolutions": [256]}
    _change(conf / "data" / "laion2b_en_coyo700m.yaml", **cache)
    own = conf / "data" / "own.yaml"
    _write(own, OmegaConf.merge(OmegaConf.load(own), {"pack": {"processes": 1, "samples_per_shard": 10}}))
    drawn = {"shapes.images": 48, "shapes.port": free_port(), "download.samples_per_shard": 20}
    _change(conf / "data" / "shapes.yaml", **drawn)
    miniature = {"stage.global_batch_size": BATCH, "log_every_steps": 1}
    _change(conf / "model_training" / "tiny.yaml", **miniature, **{"stage.phases": PHASES})


def _without_files(node: Any) -> Any:
    """Sizes alone: what names files stays as at full size, but for CLIP's tokenizer, which is part of open_clip."""
    if not isinstance(node, DictConfig):
        return node
    kept = {}
    for key in node:
        value = node._get_node(key)._value() if OmegaConf.is_missing(node, key) else node[key]
        if key in ("name", "base_weights") or (str(value).startswith("asset:") and key != "tokenizer"):
            continue
        kept[key] = _without_files(value)
    return OmegaConf.create(kept)


# Of a script: form of a number -> what stands there instead, and how often it is found.
SCRIPTS = {
    "demo.sh": {
        r'"\d+ \d+"': (f'"{BATCH} {BATCH}"', 6),
        r"samples=\d+": ("samples=8", 2),
        r"steps=(25|10)": ("steps=2", 2),
        # A few of some dozens of pairs.
        r"share=0\.05": ("share=0.3", 1),
    },
    "demo_report.py": {r"= 64, 25, 3\.0": ("= 64, 2, 3.0", 1)},
    "gallery.sh": {r"steps=25": ("steps=2", 1)},
}


def _shrink_scripts(folder: Path) -> None:
    for name, changes in SCRIPTS.items():
        text = (folder / name).read_text()
        for form, (instead, count) in changes.items():
            text, found = re.subn(form, instead, text)
            assert found == count, f"{name}: {form} is there {found} times"
        (folder / name).write_text(text)


def _change(path: Path, **changes: Any) -> None:
    """Give existing settings of an option other values; the first line may be a directive."""
    config = OmegaConf.load(path)
    for key, value in changes.items():
        assert OmegaConf.select(config, key, default=path) is not path, f"{path}: has no {key}"
        OmegaConf.update(config, key, value, merge=False)
    _write(path, config)


def _write(path: Path, config: Any) -> None:
    directive = re.match(r"# @package .*\n", path.read_text())
    path.write_text((directive[0] if directive else "") + OmegaConf.to_yaml(config))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
