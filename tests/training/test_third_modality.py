"""A modality that the package does not know, from the folder `tests/third_modality`: sounds, beside images and text.

Its flows are added to the four of stage 3 by the options of that folder alone, and train, resume, sample and blend.
"""

from __future__ import annotations

import ast
import math
import os
import re
import wave
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.settings import phases
from tests.training.read_back import read_weights
from vdtrain.commands.sample import main as sample
from vdtrain.commands.train import main as train
from vdtrain.config.compose import ConfigError, compose, to_object
from vdtrain.config.instantiate import instantiate
from vdtrain.config.schema import TrainConfig
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.flows import Flow, active_groups, all_flows
from vdtrain.models.diffuser import layer_group
from vdtrain.pipeline import ContextInput, VersatileDiffusion
from vdtrain.run import distributed
from vdtrain.tracking.metrics import read_metrics
from vdtrain.training.build import build_trainer
from vdtrain.training.start import resolve_start
from vdtrain.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parents[1] / "third_modality"
MODALITIES = ("image", "text", "sound")
FLOWS = [flow.name for flow in all_flows(MODALITIES)]
BATCH, STEPS, STOPPED, RESUMED = 16, 30, 4, 6
SETTINGS = [
    f"hydra.searchpath=[{FOLDER}/conf]",
    "model=tiny_with_sound",
    "data=shapes_with_sound",
    "hardware=cpu",
    "tracking=none",
    "model.diffuser.channels=[32,32]",
    f"stage.global_batch_size={BATCH}",
    f"hardware.micro_batch_size={{32:{BATCH}}}",
    "optimizer.learning_rate_scale=60",
    "optimizer.warmup_samples=0",
    "ema.decay=0.8",
    "log_every_steps=1",
]
SMALL = {"height": 32, "width": 32, "steps": 4, "output_type": "tensor"}
CAPTIONS = ["a red circle", "a cyan star"]


def settings(folder: Path, stage: str, steps: int, *overrides: str) -> list[str]:
    places = [f"data.manifest={folder}/data/manifest", f"runs_dir={folder}/runs"]
    return [*SETTINGS, f"stage={stage}", phases(BATCH, (32, steps)), *places, *overrides]


def make_trainer(*arguments: Any) -> Trainer:
    document = compose("train", settings(*arguments))
    config = to_object(document, TrainConfig)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    place = distributed.RankInfo(0, 0, 1, torch.device("cpu"))
    return build_trainer(config, document, resolve_start(config, document), place)


def nine_flows(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """A stage of four flows without sound, then one of nine; in a process of its own."""
    four = make_trainer(folder, "stage3_four_flow", 1, "stage.init_from=null", "data=shapes")
    assert four.run()
    before = fixed_losses(four, [name for name in FLOWS if "sound" not in name])
    nine = make_trainer(folder, "stage4_nine_flow", STEPS)
    names = nine.flow_names
    start, frozen = fixed_losses(nine, names), copied(nine.objective.frozen)
    diffuser = copied(nine.engine.module)
    assert nine.run()
    after = copied(nine.engine.module)
    moved: Counter[str] = Counter()
    for name, tensor in diffuser.items():
        moved[layer_group(name)] += int(not torch.equal(tensor, after[name]))
    frozen_after = copied(nine.objective.frozen)
    kept = [name for name, tensor in frozen.items() if torch.equal(tensor, frozen_after[name])]
    end = fixed_losses(nine, names)
    for steps in (STOPPED, RESUMED):
        assert make_trainer(folder, "stage4_nine_flow", steps, f"run_dir={folder}/runs/resumed").run()
    report(
        {"before": before, "start": start, "end": end, "moved": moved, "frozen": sorted(frozen), "kept": sorted(kept)}
    )


def copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def fixed_losses(trainer: Trainer, names: list[str]) -> dict[str, float]:
    """Loss of every flow on one batch, with the noise, timesteps and dropout of one step."""
    from tests.third_modality.sound import SoundStream

    config, objective = trainer.config, trainer.objective
    stream = SoundStream(Path(config.data.manifest), seed=1, resolution=32, global_batch_size=32)
    (batch,) = islice(stream, 1)
    stream.close()
    fixed = Objective([Flow.parse(name) for name in names], objective.schedule, objective.frozen, config.objective)
    rng = StepRandom("fixed", 0, 32, slice(0, 32), torch.device("cpu"))
    with torch.no_grad():
        losses = fixed.losses(trainer.engine.module, fixed.encode(batch.samples, 32, rng), rng)
    return {name: float(loss) for name, loss in losses.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.pairs import write_pairs

    folder = tmp_path_factory.mktemp("third_modality")
    write_pairs(folder / "data")
    return folder


@pytest.fixture(scope="module")
def seen(run_on_ranks: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """Everything that is trained, and what was seen of it."""
    with pytest.MonkeyPatch.context() as patch:
        # Where a user's own modules are found.
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        answer: dict[str, Any] = run_on_ranks(nine_flows, 1, folder, timeout=600.0)[0]
    return answer


@pytest.fixture(scope="module")
def model(seen: dict[str, Any], folder: Path) -> VersatileDiffusion:
    return VersatileDiffusion.from_checkpoint(f"{folder}/runs/stage4_nine_flow", trust=["tests.third_modality"])


def losses(folder: Path, run: str) -> list[dict[str, float]]:
    return [record["loss"] for record in read_metrics(folder / "runs" / run)]


def test_nine_flows_train(seen: dict[str, Any], folder: Path) -> None:
    logged = losses(folder, "stage4_nine_flow")
    assert len(logged) == STEPS
    assert all(record.keys() == set(FLOWS) for record in logged)
    assert all(math.isfinite(loss) for record in logged for loss in record.values())
    assert seen["start"].keys() == set(FLOWS)
    for name in FLOWS:
        assert seen["end"][name] < seen["start"][name], name


def test_the_stage_begins_at_the_four_flows_of_the_stage_before(seen: dict[str, Any]) -> None:
    assert len(seen["before"]) == 4
    for name, loss in seen["before"].items():
        assert seen["start"][name] == pytest.approx(loss, rel=1e-5), name


def test_seven_layer_groups_move_and_frozen_parts_do_not(seen: dict[str, Any]) -> None:
    groups = active_groups([Flow.parse(name) for name in FLOWS])
    assert len(groups) == 7
    assert seen["moved"].keys() == set(groups)
    assert all(seen["moved"].values())
    assert seen["kept"] == seen["frozen"]
    assert {"vaes.sound.transform", "context_encoders.sound.projection"} < set(seen["frozen"])


def test_a_stopped_run_goes_on_exactly(seen: dict[str, Any], folder: Path) -> None:
    assert losses(folder, "resumed") == losses(folder, "stage4_nine_flow")[:RESUMED]
    checkpoints = folder / "runs" / "resumed" / "checkpoints"
    assert len({layer_group(name) for name in read_weights(max(checkpoints.glob("step-*")), "ema")}) == 7


@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow_samples(model: VersatileDiffusion, flow: str) -> None:
    from tests.third_modality.sound import sounds

    inputs = {"image": image_batch(model), "text": CAPTIONS, "sound": sounds(CAPTIONS)}
    way = Flow.parse(flow)
    made = model.generate(flow, inputs[way.context], **SMALL)
    assert len(made) == 2
    if way.output == "sound":
        assert made.shape == (2, 256)
        assert made.dtype == torch.float32
        assert made.isfinite().all()
        assert made.abs().max() <= 1
        assert torch.equal(made, model.generate(flow, inputs[way.context], **SMALL))
        # The same noise with the other's context is another sound.
        swapped = model.generate(flow, inputs[way.context][1:], **SMALL)
        assert not torch.allclose(made[0], swapped[0], atol=1e-4)
    elif way.output == "image":
        assert made.shape == (2, 3, 32, 32)
        assert made.dtype == torch.uint8
    else:
        assert all(isinstance(caption, str) for caption in made)


def image_batch(model: VersatileDiffusion) -> Tensor:
    made: Tensor = model.generate("text-to-image", CAPTIONS, seed=9, **SMALL)
    return made


@pytest.mark.parametrize("mixing", ["attention", "layer"])
def test_three_contexts_blend_into_a_sound(model: VersatileDiffusion, mixing: str) -> None:
    from tests.third_modality.sound import sounds

    parts = [
        ContextInput("image", image_batch(model)[0], 1.0),
        ContextInput("text", CAPTIONS[0], 2.0),
        ContextInput("sound", sounds(CAPTIONS)[1], 1.0),
    ]
    made = model.blend("sound", parts, count=2, mixing=mixing, **SMALL)
    assert made.shape == (2, 256)
    assert made.isfinite().all()
    for part in parts:
        alone = model.blend("sound", [part], count=2, mixing=mixing, **SMALL)
        assert not torch.allclose(made, alone, atol=1e-4)


def test_sound_files_are_read_and_written(seen: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    arguments = [f"checkpoint={folder}/runs/stage4_nine_flow", "resolution=32", "steps=2", f"output_dir={tmp_path}"]
    arguments.append("trust=[tests.third_modality.sound]")
    assert sample([*arguments, "flow=text-to-sound", "inputs=[a red circle,a blue star]"]) == 0
    with wave.open(f"{tmp_path}/0001.wav") as file:
        assert (file.getnframes(), file.getnchannels()) == (256, 1)
    assert sample([*arguments, "flow=sound-to-image", f"inputs=[{tmp_path}/0000.wav]"]) == 0
    assert (tmp_path / "0002.png").exists()


def test_image_caption_and_sound_of_a_sample_agree(folder: Path) -> None:
    from tests.third_modality.sound import FrameVAE, SoundStream, sounds

    stream = SoundStream(folder / "data" / "manifest", seed=0, resolution=32, global_batch_size=8)
    (batch,) = islice(stream, 1)
    stream.close()
    assert torch.equal(batch.samples["sound"], sounds(batch.samples["text"]))
    assert len({tuple(sound.tolist()) for sound in batch.samples["sound"]}) > 1
    vae = FrameVAE()
    torch.testing.assert_close(vae.decode(vae.encode(batch.samples["sound"])), batch.samples["sound"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.stream._target_=tests.third_modality.sound.Stream", ["data.stream._target_=", "no attribute 'Stream'"]),
        ("data.stream._target_=nowhere.Stream", ["data.stream._target_=nowhere.Stream", "PYTHONPATH"]),
        ("+data.stream.loudness=2", ["data.stream.loudness", "takes no such argument", "workers"]),
        ("model=tiny_with_sounds", ["model=tiny_with_sounds", "tiny_with_sound, versatile_diffusion"]),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, override: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([*settings(folder, "stage4_nine_flow", 1), override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in expected:
        assert part in line


def test_a_folder_of_options_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["hydra.searchpath=[nowhere]", "model=tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: hydra.searchpath=nowhere: no such folder")


def test_a_stream_gets_its_position_from_the_trainer_alone() -> None:
    specification = {"_target_": "vdtrain.data.stream.PairStream", "seed": 3}
    with pytest.raises(ConfigError, match=r"data\.stream\.seed=3: follows from other settings"):
        instantiate(specification, "data.stream", manifest=Path("m"), seed=0, resolution=32, global_batch_size=2)


def test_a_stream_without_the_modality_is_a_configuration_error(model: VersatileDiffusion) -> None:
    with pytest.raises(ConfigError, match=r"no 'sound' in the batch, only image, text; .*data\.stream"):
        model.frozen.encode({"image": image_batch(model), "text": CAPTIONS}, MODALITIES, ())


def test_the_page_shows_the_example_as_it_is() -> None:
    page = (ROOT / "docs" / "modalities.md").read_text()
    (shown,) = re.findall(r"```python\nclass SoundStream.*?```", page, flags=re.DOTALL)
    example = (FOLDER / "sound.py").read_text()
    assert all(line in example for line in shown.splitlines()[1:-1])


MODALITY = "image|text|sound"
NAMING = re.compile(rf"(?:(?:data|context)\.)?(?:{MODALITY})|(?:{MODALITY})-to-(?:{MODALITY})")
ROOMS = ("training/*", "engine/*", "checkpoint/*", "diffusion/*", "planning/memory")
PLACES = (*ROOMS, "config/validation", "pipeline", "inference/sampler")
MODELS = ("diffuser", "layer_plan", "context_layers", "frozen")
PATTERNS = (*PLACES, *(f"models/{name}" for name in MODELS))
# Editing is defined as image-to-text-to-image, so it names both modalities.
EDITING = ROOT / "vdtrain" / "diffusion" / "editing.py"
# Its grids are of images and captions.
GRIDS = ROOT / "vdtrain" / "training" / "samples.py"
# diffusers calls one of its arguments `image`.
ARGUMENTS = ROOT / "vdtrain" / "diffusion" / "arguments.py"
NAMING_FILES = {EDITING, GRIDS, ARGUMENTS}
BLIND = sorted({file for pattern in PATTERNS for file in (ROOT / "vdtrain").glob(f"{pattern}.py")} - NAMING_FILES)


def modalities_named(source: str) -> set[str]:
    """Strings of a program that are a modality, a flow or a modality's layer group."""
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return {text for text in strings if isinstance(text, str) and NAMING.fullmatch(text)}


def test_trainer_objective_and_sampler_name_no_modality() -> None:
    examples = '"an image"; layers["image"]; f"data.{name}"; "data.text"; step.to("text-to-image")'
    assert modalities_named(examples) == {"image", "data.text", "text-to-image"}
    assert {file.stem for file in BLIND} > {"trainer", "objective", "sampling", "pipeline", "sampler", *MODELS}
    assert {file.name: found for file in BLIND if (found := modalities_named(file.read_text()))} == {}
