"""A folder with data, a checkpoint and an image, in which commands are typed, each with what it says."""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.__main__ import main as data_pipeline_main
from miniature.__main__ import main as miniature_main
from tests.evaluation.test_evaluate import write_checkpoint
from tests.pairs import write_shard
from vdtrain.cli import main as vdtrain_main
from vdtrain.commands.run_folder import main as run_folder_main
from vdtrain.flows import all_flows
from vdtrain.run.restarts import main as restarts_main

MAINS: dict[str, Callable[[list[str]], int]] = {
    "vdtrain": vdtrain_main,
    "miniature": miniature_main,
    "data_pipeline": data_pipeline_main,
    "vdtrain.commands.run_folder": run_folder_main,
    "vdtrain.run.restarts": restarts_main,
}
ROOT = Path(__file__).parents[1]
IDS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class World:
    """A folder with data, a checkpoint and images, in which commands are typed."""

    folder: Path
    mounts: list[Path] = field(default_factory=list)
    protected: list[Path] = field(default_factory=list)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def type(self, *words: str) -> tuple[int, str]:
        """Run a command as typed; its exit status and what it said on standard error."""
        program, *rest = words[2:] if words[:2] == ("python", "-m") else words
        said = io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            status = MAINS[program]([word.replace("FOLDER", str(self.folder)) for word in rest])
        return status, said.getvalue()

    def shell(self, command: str) -> None:
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def type_all(self, line: str) -> None:
        """Run all commands that a line names, as they stand there."""
        for command in quoted(line):
            self.shell(command)

    def mount(self, folder: Path, options: str) -> None:
        """A disk of its own, for a test that fills it or forbids to write it."""
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip("no right to mount a file system here")
        self.mounts.append(folder)

    def protect(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode != 0:
            pytest.skip("this file system cannot protect a folder")
        self.protected.append(folder)


def make_origin(folder: Path) -> Path:
    """What every world is a copy of."""
    for source in ("laion2b_en", "coyo700m"):
        (folder / "shards" / source).mkdir(parents=True)
        write_shard(folder / "shards" / source / "00000.tar", 16, seed=len(source))
    assert data_pipeline_main(["index", "data=shapes", f"data.root={folder}"]) == 0
    write_checkpoint(folder / "model", all_flows(["image", "text"]))
    Image.new("RGB", (32, 32), "red").save(folder / "image.png")
    (folder / "pairs.csv").write_text("file_name,text\nimage.png,a red square\n")
    return folder


def last_words(said: str) -> list[str]:
    """The lines on standard error that tell how a command ended, without those on what it takes and does."""
    return [line for line in said.splitlines() if not line.startswith(("warning: ", "note: ", "takes: "))]


def one_line(said: str) -> str:
    """The error that a command said, of which there is exactly one, in exactly one line."""
    lines = last_words(said)
    assert len(lines) == 1, said
    assert re.match(r"error: |not requeued: ", lines[0]), said
    assert "Traceback" not in lines[0]
    return lines[0]


def quoted(line: str) -> list[str]:
    """The commands that a line names."""
    return re.findall(r"`([^`]+)`", line)


SAMPLER = ["checkpoint=FOLDER/model", "resolution=32", "steps=1", "threads=1"]
DATA = ["data=shapes", "data.root=FOLDER"]
TRAIN = ["stage.init_from=null", "model=tiny", *DATA, "hardware=cpu", "tracking=none"]
IMAGES = ["data.shapes.images=12", "data.shapes.pixels=32"]
# Every command that writes, with OUT as the folder.
WRITERS: dict[str, list[str]] = {
    "sample": ["vdtrain", "sample", *SAMPLER, "flow=text-to-image", "inputs=[a]", "output_dir=OUT"],
    "blend": ["vdtrain", "blend", *SAMPLER, "contexts=[{text: a}]", "output_dir=OUT"],
    "edit": ["vdtrain", "edit", *SAMPLER, "inputs=[image.png]", "add=a", "output_dir=OUT"],
    "evaluate": [
        *["vdtrain", "evaluate", *SAMPLER, *DATA, "flows=[text-to-text]", "samples=2", "part_samples=2"],
        *["loader_workers=1", "output_dir=OUT"],
    ],
    "export": ["vdtrain", "weights", "export", "safetensors", "OUT/weights", "checkpoint=FOLDER/model"],
    "preflight": [*["vdtrain", "preflight", "stage=stage1_single_flow", *TRAIN], "run_dir=OUT"],
    "shapes": ["python", "-m", "miniature", "draw", *DATA, *IMAGES, "data.shapes.folder=OUT"],
    "select": ["python", "-m", "data_pipeline", "select", *DATA, "data.select.scratch=OUT"],
    "selected": ["python", "-m", "data_pipeline", "select", *DATA, "data.sources.coyo700m.selected=OUT"],
    "pack": [
        *["python", "-m", "data_pipeline", "pack", "FOLDER/pairs.csv", "data.pack.processes=1"],
        *["data.pack.min_image_size=1", "data.pack.output=OUT"],
    ],
    "index": ["python", "-m", "data_pipeline", "index", *DATA, "data.manifest=OUT"],
    "latents": [
        *["python", "-m", "data_pipeline", "latents", *DATA, "model=tiny", "hardware=cpu"],
        *["data.latent_cache.resolutions=[32]", "data.latent_cache.folder=OUT"],
    ],
    "inspect": ["python", "-m", "data_pipeline", "inspect", *DATA, "data.inspect.output=OUT/sheet.png"],
}
INDEX = ["python", "-m", "data_pipeline", "index", *DATA]


def with_output(name: str, folder: str) -> list[str]:
    return [word.replace("OUT", folder) for word in WRITERS[name]]


LATENTS = [word.replace("OUT", "FOLDER/latents") for word in WRITERS["latents"]]
