"""`vdtrain evaluate` from its command line to its files, on a tiny model with random diffuser weights. 40 seconds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tests.pairs import all_samples, write_pairs
from tests.programs import run_ranks
from vdtrain import progress
from vdtrain.commands.evaluate import main as evaluate
from vdtrain.config.command_schema import EvaluateConfig
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.data.stream import PairStream
from vdtrain.evaluation.inception import InceptionFeatures
from vdtrain.evaluation.pairs import Pairs
from vdtrain.evaluation.parts import Parts
from vdtrain.files import draft_of
from vdtrain.flows import Flow, active_groups, all_flows
from vdtrain.models.diffuser import Diffuser
from vdtrain.run.lock import RunLock
from vdtrain.weights.folder import write_weights_folder

ROOT = Path(__file__).parents[2]
FLOWS = ["text-to-image", "image-to-image", "image-to-text", "text-to-text"]
SAMPLES, PART = 10, 4


def write_checkpoint(folder: Path, flows: list[Flow], *overrides: str) -> None:
    config = to_object(compose("train", ["model=tiny", *overrides]), TrainConfig).model
    torch.manual_seed(0)
    diffuser = Diffuser(config, active_groups(flows))
    with torch.no_grad():
        for parameter in diffuser.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    write_weights_folder(folder, diffuser.state_dict(), config)


def test_a_second_job_leaves_the_folder_to_the_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = RunLock(tmp_path, "output_dir")
    assert lock.attempt()
    try:
        assert evaluate([*settings(folder, "unused"), f"output_dir={tmp_path}"]) == 2
    finally:
        lock.release()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: output_dir={tmp_path}: is in use by process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, a checkpoint of four flows and one of stage 1."""
    made = tmp_path_factory.mktemp("evaluation")
    write_pairs(made / "data", shards=2, count=12)
    write_checkpoint(made / "model", all_flows(["image", "text"]))
    write_checkpoint(made / "stage1", [Flow("image", "image")])
    return made


def settings(folder: Path, output: str, *more: str) -> list[str]:
    return [
        f"checkpoint={folder}/model",
        "data=shapes",
        f"data.manifest={folder}/data/manifest",
        f"output_dir={folder}/{output}",
        "resolution=32",
        "steps=2",
        f"samples={SAMPLES}",
        f"part_samples={PART}",
        "loader_workers=1",
        "threads=1",
        *more,
    ]


def metrics(folder: Path, output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / output / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """An evaluation that nothing interrupted."""
    assert evaluate(settings(folder, "whole")) == 0
    return metrics(folder, "whole")


def test_every_flow_gets_its_figures(folder: Path, whole: dict[str, Any]) -> None:
    assert list(whole["flows"]) == FLOWS
    for flow, figures in whole["flows"].items():
        own = {"clip_distance", "clip_kid", "clip_precision", "clip_recall"}
        if flow.endswith("text"):
            own = {"bleu", "cider", "distinct_1", "distinct_2"}
        assert set(figures) == {"samples", "clip_score"} | own
        assert 0 <= figures["clip_score"]["mean"] <= 100
    # The tiny CLIP knows these pairs, and an untrained diffuser does not.
    assert whole["pairs"]["clip_score"]["mean"] > 60
    assert all(whole["flows"][flow]["clip_score"]["mean"] < 50 for flow in FLOWS)
    assert whole["checkpoint"]["path"] == f"{folder}/model"
    assert len(whole["checkpoint"]["sha256"]) == 64
    assert (whole["samples"], whole["settings"]["steps"]) == (SAMPLES, 2)
    assert whole["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_there_is_something_to_look_at(folder: Path, whole: dict[str, Any]) -> None:
    for flow in FLOWS:
        with Image.open(folder / "whole" / f"{flow}.png") as sheet:
            assert sheet.width > 2 * sheet.height / 2
    captions = (folder / "whole" / "image-to-text.txt").read_text().splitlines()
    assert len(captions) == SAMPLES
    named = [json.loads(line) for line in (folder / "whole" / "image-to-text.jsonl").read_text().splitlines()]
    assert [each["caption"] for each in named] == captions
    assert len({each["file_name"] for each in named}) == SAMPLES


def test_what_is_there_is_not_made_again(folder: Path, whole: dict[str, Any]) -> None:
    """A part that is lost, cut short or half written is made as it was; more samples are added to those there are."""
    assert evaluate(settings(folder, "again", "flows=[image-to-text]", "samples=6")) == 0
    parts = folder / "again" / "parts"
    kept = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert set(kept) == {f"{name}-0000{number}.safetensors" for name in ("pairs", "image-to-text") for number in (0, 1)}
    assert evaluate(settings(folder, "again", "flows=[text-to-image,image-to-text]", "batch_size=3")) == 0
    now = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert {name for name in kept if now[name] == kept[name]} == {
        "pairs-00000.safetensors",
        "image-to-text-00000.safetensors",
    }
    compare(metrics(folder, "again"), whole)
    content = (parts / "image-to-text-00001.safetensors").read_bytes()
    (parts / "image-to-text-00001.safetensors").write_bytes(content[:100])
    (parts / "text-to-image-00000.safetensors").unlink()
    draft_of(parts / "text-to-image-00000.safetensors", process=2**30).write_bytes(b"half")
    assert evaluate(settings(folder, "again", "flows=[text-to-image,image-to-text]")) == 0
    compare(metrics(folder, "again"), whole)
    assert len(list(parts.iterdir())) == 9


def test_a_folder_of_an_earlier_version_is_gone_on_with(folder: Path, whole: dict[str, Any]) -> None:
    """Its parts know no names. They are taken as they are, until images are to be kept."""
    shutil.copytree(folder / "whole", folder / "old")
    for path in (folder / "old" / "parts").iterdir():
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata()
        lists = json.loads(metadata["captions"])
        assert lists.pop("name")
        save_file(tensors, path, metadata | {"captions": json.dumps(lists)})
    kept = {path: path.stat().st_mtime_ns for path in (folder / "old" / "parts").iterdir()}
    assert evaluate(settings(folder, "old")) == 0
    assert metrics(folder, "old")["flows"] == whole["flows"]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert evaluate(settings(folder, "old", "flows=[text-to-image]", "keep_images=true")) == 0
    assert len(list((folder / "old" / "images" / "text-to-image").glob("*.png"))) == SAMPLES


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same figures, but for rounding in batches of another size."""
    assert found["pairs"]["clip_score"] == pytest.approx(expected["pairs"]["clip_score"], rel=1e-4)
    for flow, figures in found["flows"].items():
        assert figures["clip_score"] == pytest.approx(expected["flows"][flow]["clip_score"], rel=1e-2, abs=0.1)
        if "clip_distance" in figures:
            assert figures["clip_distance"] == pytest.approx(expected["flows"][flow]["clip_distance"], rel=1e-2)


def test_scales_of_guidance_make_a_curve(folder: Path) -> None:
    """Each scale is measured as by itself, and a further scale is added to those that are there."""
    given = ["flows=[text-to-image,image-to-text]", "samples=6"]
    assert evaluate(settings(folder, "curve", *given, "guidance_scales=[3,1]")) == 0
    kept = {path: path.stat().st_mtime_ns for path in (folder / "curve" / "parts").iterdir()}
    assert evaluate(settings(folder, "curve", *given, "guidance_scales=[3,1,7.5]")) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    curve = json.loads((folder / "curve" / "curve.json").read_text())
    assert {flow: [point["guidance_scale"] for point in points] for flow, points in curve.items()} == {
        "text-to-image": [1, 3, 7.5],
        "image-to-text": [1, 3, 7.5],
    }
    with Image.open(folder / "curve" / "curve.png") as plot:
        assert plot.width > plot.height > 300
    assert evaluate(settings(folder, "at-three", *given, "guidance_scale=3")) == 0
    alone, among = metrics(folder, "at-three")["flows"], metrics(folder, "curve")["flows"]
    assert {f"{flow}-guidance-3": figures for flow, figures in alone.items()}.items() <= among.items()
    point = curve["text-to-image"][1]
    assert point["clip_score"] == alone["text-to-image"]["clip_score"]["mean"]
    assert point["clip_distance"] == alone["text-to-image"]["clip_distance"]


def report_at_once(_: None) -> None:
    """Report progress after every batch."""
    progress.QUIET_SECONDS = progress.LINE_SECONDS = 0.0


def stop_after_writing(_: None) -> None:
    """Send this process a SIGTERM when it has kept something for the first time."""
    write = Parts.write

    def write_and_stop(self: Parts, *given: Any) -> None:
        write(self, *given)
        os.kill(os.getpid(), signal.SIGTERM)

    Parts.write = write_and_stop  # type: ignore[method-assign]


def stop_until_end_of(first: Path) -> None:
    """Stop this process, and kill it when the one whose number a file has is gone."""
    gone = f"while kill -0 {first.read_text()} 2>/dev/null; do sleep 0.2; done"
    subprocess.Popen(["sh", "-c", f"{gone}; kill -KILL {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def stand_still(given: tuple[str, str]) -> None:
    """Let the second process stand still when it has made its first part: asleep, or stopped until the first ends.

    Args:
        given: how, and a file for the number of the first process.
    """
    what, file = given[0], Path(given[1])

    def hang(self: Parts, *given: Any) -> None:
        if what == "stopped":
            stop_until_end_of(file)
        time.sleep(3600)

    if os.environ["RANK"] == "1":
        Parts.write = hang  # type: ignore[method-assign]
    else:
        file.write_text(str(os.getpid()))


# The encoding of latents shows the other one in `make test`.
@pytest.mark.parametrize("what", ["asleep", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_process_that_stands_still_ends_the_others(folder: Path, whole: dict[str, Any], what: str) -> None:
    given = settings(folder, what, "flows=[text-to-text]", "watchdog_seconds=8")
    how = json.dumps([what, f"{folder}/{what}.pid"])
    words = ["-m", "tests.programs.after", f"{__name__}:stand_still", how, "vdtrain", "evaluate", *given]
    ending = run_ranks([words] * 2, [folder / f"{what}-{rank}.log" for rank in range(2)], 300)
    # The process that waits sees the other one end, or ends by its own watchdog at the same moment.
    expected = [(1, 124), (124,)] if what == "asleep" else [(124,), (-9,)]
    assert all(status in each for status, each in zip(ending.statuses, expected, strict=True)), ending
    line = [line for line in ending.logs[expected.index((124,))].splitlines() if line.startswith("error")][-1]
    place = (
        "at: (pairs|text-to-text) of part 1; see" if what == "asleep" else "at: waiting for process 1; process 1 did"
    )
    assert re.search(f"stood still for [0-9]+ s, longer than watchdog_seconds=8, {place}", line)
    assert "Traceback" not in "".join(ending.logs)


def test_two_processes_that_are_stopped_make_what_one_makes(folder: Path, whole: dict[str, Any]) -> None:
    given = ["vdtrain", "evaluate", *settings(folder, "shared", "flows=[text-to-image,text-to-text]")]
    logs = [folder / f"{rank}.log" for rank in range(2)]
    after = ["-m", "tests.programs.after"]
    ending = run_ranks([[*after, f"{__name__}:stop_after_writing", "null", *given]] * 2, logs, 300)
    assert ending.statuses == [75, 75], ending
    ending = run_ranks([[*after, f"{__name__}:report_at_once", "null", *given]] * 2, logs, 300)
    assert ending.statuses == [0, 0], ending
    first, second = ending.logs
    found = metrics(folder, "shared")
    assert {flow: whole["flows"][flow] for flow in found["flows"]} == found["flows"]
    # Rank 0 reports its own share, parts 0 and 2 of 3; the other one prints nothing.
    assert "text-to-image: 2 of 12 samples" in first
    assert "text-to-text: 12 of 12 samples" in first
    assert "metrics.json" in first
    assert second == ""


@pytest.fixture(scope="module")
def inception(folder: Path) -> Path:
    """Inception with random weights."""
    torch.manual_seed(0)
    torch.save(InceptionFeatures(None).network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def test_fid_and_its_reference(folder: Path, inception: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = folder / "reference.npz"
    given = ["flows=[text-to-image]", "samples=3", "part_samples=3", f"fid.weights={inception}"]
    assert evaluate(settings(folder, "fid", *given, f"fid.reference={reference}")) == 0
    output = capsys.readouterr()
    assert "fid.weights: not the published file" in output.err
    assert f"fid.reference={reference}: written, of 3 images" in output.out
    first = metrics(folder, "fid")["flows"]["text-to-image"]["fid"]
    assert first > 0
    # Taken from the file, the real images' features are not asked for, and another mean is another distance.
    import numpy as np

    with np.load(reference, allow_pickle=False) as file:
        mean, covariance = file["mu"], file["sigma"]
    np.savez(reference, mu=mean + 1, sigma=covariance)
    assert evaluate(settings(folder, "fid", *given, f"fid.reference={reference}")) == 0
    output = capsys.readouterr()
    assert "written" not in output.out
    assert f"fid.reference={reference}: does not tell how it was made; FID is right if its images were" in output.err
    assert metrics(folder, "fid")["flows"]["text-to-image"]["fid"] > first + 1000


def test_a_reference_tells_what_it_is_of(folder: Path, inception: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of a pilot, or of other images, is not taken unnoticed."""
    reference = folder / "pilot.npz"
    given = ["flows=[image-to-image]", "part_samples=2", f"fid.reference={reference}"]
    own = [*given, f"fid.weights={inception}"]
    for turn in range(2):
        assert evaluate(settings(folder, f"pilot-{turn}", *own, "samples=2")) == 0
        assert f"fid.reference={reference}: " not in capsys.readouterr().err
    words = [*own, "samples=3", "resolution=48", "data.validation.share=0.5"]
    assert evaluate(settings(folder, "pilot-other", *words)) == 0
    found = capsys.readouterr().err
    for line in ("of 2 images for samples=3", "of another resolution (32, now 48)", "of other real images ("):
        assert f"warning: fid.reference={reference}: {line}" in found
    torch.manual_seed(1)
    torch.save(InceptionFeatures(None).network.state_dict(), folder / "others.pth")
    assert evaluate(settings(folder, "pilot-network", *given, f"fid.weights={folder}/others.pth", "samples=2")) == 2
    assert f"error: fid.reference={reference}: of other fid.weights; remove it" in capsys.readouterr().err
    assert not (folder / "pilot-network").exists()


def test_flows_that_make_no_images_need_no_weights_for_fid(
    folder: Path, inception: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["samples=2", "part_samples=2"]
    for number, weights in enumerate(("null", inception)):
        words = [*given, f"fid.weights={weights}"]
        assert evaluate(settings(folder, f"text-{number}", "flows=[text-to-text]", *words)) == 0
        assert "fid.weights" not in capsys.readouterr().err
    assert evaluate(settings(folder, "images", "flows=[text-to-text,text-to-image]", *given)) == 0
    assert "fid.weights: null, so FID is skipped" in capsys.readouterr().err


def test_a_modality_without_figures_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf = f"hydra.searchpath=[{ROOT}/tests/third_modality/conf]"
    flows = [Flow("sound", "text"), Flow("image", "sound")]
    write_checkpoint(folder / "sounding", flows, conf, "model=tiny_with_sound")
    more = [conf, "data=shapes_with_sound", f"checkpoint={folder}/sounding", "flows=[text-to-sound,sound-to-image]"]
    more.append("trust=[tests.third_modality]")
    assert evaluate(settings(folder, "sound", *more, "samples=4")) == 0
    assert "text-to-sound is skipped: no metric is known for the modality 'sound'" in capsys.readouterr().err
    assert set(metrics(folder, "sound")["flows"]["sound-to-image"]) == {
        *("samples", "clip_distance", "clip_kid", "clip_precision", "clip_recall")
    }


def test_every_image_takes_part_once_cropped_at_its_centre(folder: Path) -> None:
    """Whatever the set's stream does for training; those of 64 pixels are enlarged here."""
    given = ["resolution=96", "samples=24", "data.stream.random_crop=true", "data.stream.weights={drawn: 1}"]
    config = to_object(compose("evaluate", settings(folder, "none", *given)), EvaluateConfig)
    pairs, parts = Pairs(config), Parts(folder, 24, PART)
    read = [pairs.read(part) for part in parts.parts]
    assert all(each["image"].shape == (PART, 3, 96, 96) for each in read)
    manifest = all_samples(folder / "data" / "manifest")["caption"].to_pylist()
    assert sorted(caption for each in read for caption in each["text"]) == sorted(manifest)
    # The drawn images are squares already, which no crop would change.
    stream = pairs._open(0)
    stream.close()
    assert isinstance(stream, PairStream)
    assert not stream.random_crop


def test_figures_go_to_a_tracker(folder: Path, whole: dict[str, Any]) -> None:
    assert evaluate(settings(folder, "whole", "tracking=offline")) == 0
    assert list((folder / "whole" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        ("prompts=a.txt", "prompts=a.txt: belongs to images=FOLDER"),
        ("real_images=nowhere", "real_images=nowhere: no such folder"),
        ("guidance_scales=[2,2]", "guidance_scales=[2.0, 2.0]: name each scale once"),
        ("samples=1", "samples=1: must be at least 2"),
        ("samples=25", "samples=25: data.manifest={folder}/data/manifest has 24 pairs; set samples=24"),
        ("part_samples=0", "part_samples=0: must be at least 1"),
        ("flows=[]", "flows=[]: name at least one flow"),
        ("flows=[text-to-image,text-to-image]", "flows=['text-to-image', 'text-to-image']: name"),
        ("flows=[sideways]", "flows: flow 'sideways' is not CONTEXT-to-OUTPUT"),
        ("flows=[text-to-sound]", "flows: text-to-sound: {folder}/model has no layers data.sound"),
        ("checkpoint=nowhere", "checkpoint=nowhere: does not exist"),
        ("checkpoint={folder}/stage1", "flows: text-to-image: {folder}/stage1 has no layers context.text"),
        ("data.manifest=nowhere", "data.manifest=nowhere: shards.parquet is not there"),
        ("data.stream._target_=nowhere.Stream", "data.stream._target_=nowhere.Stream: cannot be imported"),
        ("resolution=40", "height=40: not a multiple of 16"),
        ("width=64", "height=32, width=64: real images are cropped to squares"),
        ("steps=0", "steps=0: choose 1 to 1000"),
        ("solver=euler", "solver=euler: choose from"),
        ("precision=int4", "precision=int4: choose from"),
        ("fid.weights=nowhere.pth", "fid.weights=nowhere.pth: no such file"),
        ("fid.reference=stats.npz", "fid.reference=stats.npz: needs fid.weights"),
        ("clip.architecture=ViT-B-32-quickgelu", "clip.weights: null"),
        ("guidance_scales=[1,nan]", "guidance_scales=[1,nan]: must be a finite number"),
        ("guidance_scales=[1,1.0000001]", "guidance_scales=[1.0, 1.0000001]: name each scale once"),
        ("tracking.mode=loud", "tracking.mode=loud: choose from"),
        ("guidance=3", "guidance: no such setting; did you mean 'guidance_scale' or 'guidance_scales'?"),
        ("output_dir={folder}/whole", "output_dir={folder}/whole: holds an evaluation with another guidance_scale"),
    ],
)
def test_a_mistake_is_one_line(
    mistake: str, line: str, folder: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    other = "guidance_scale=3" if mistake.startswith("output_dir") else "seed=0"
    assert evaluate(settings(folder, "mistaken", other, mistake.format(folder=folder))) == 2
    errors = [each for each in capsys.readouterr().err.splitlines() if not each.startswith(("warning: ", "takes: "))]
    assert len(errors) == 1
    assert errors[0].startswith("error: " + line.format(folder=folder))
    assert not (folder / "mistaken").exists()
