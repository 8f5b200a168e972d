"""A downloaded checkpoint runs no code: every command that reads one, with both kinds of folder."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.pairs import write_pairs
from tests.weights.small import CARRIED, MODEL, recorded, weights, write_run
from vdtrain.cli import main
from vdtrain.config.compose import ConfigError, compose, config_folder, to_object
from vdtrain.config.instantiate import PARTS, read_yaml, resolved
from vdtrain.config.schema import TrainConfig
from vdtrain.files import FileRecord
from vdtrain.models.diffuser import layer_group
from vdtrain.models.frozen_weights import WeightsError, load_weights
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.training.build import initial_weights
from vdtrain.training.start import Start, resolve_weights
from vdtrain.weights.folder import write_weights_folder

COMMANDS: dict[str, list[str]] = {
    "sample": ["sample", "{folder}", "a red circle", "output_dir={out}"],
    "blend": ["blend", "{folder}", "contexts=[{{text: a red circle}}]", "output_dir={out}"],
    "edit": ["edit", "{folder}", "{image}", "remove=red", "add=blue", "output_dir={out}"],
    "evaluate": ["evaluate", "{folder}", "data.manifest={pairs}/manifest", "output_dir={out}", "samples=4"],
    "export": ["weights", "export", "safetensors", "{out}", "{folder}"],
    "export to diffusers": ["weights", "export", "diffusers", "{out}", "{folder}"],
    "export to a PyTorch file": ["weights", "export", "versatile_diffusion", "{out}.pth", "{folder}"],
}
SMALL = ["resolution=32", "steps=2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a weights folder and a manifest."""
    folder = tmp_path_factory.mktemp("folders")
    write_run(folder / "run")
    write_weights_folder(folder / "weights", weights(), MODEL)
    write_pairs(folder / "pairs")
    return folder


Change = Callable[[dict[str, Any]], None]


def poisoned(folders: Path, kind: str, change: Change, place: Path) -> Path:
    """A copy of a folder whose model is changed; its checksums are right, as its maker would have them."""
    model = asdict(MODEL)
    change(model)
    if kind == "run":
        return write_run(place, {**recorded(), "model": model})
    shutil.copytree(folders / "weights", place)
    rewrite(place, yaml.safe_dump(model))
    return place


def rewrite(folder: Path, text: str) -> None:
    """Put another model.yaml into a weights folder."""
    (folder / "model.yaml").write_text(text)
    index = json.loads((folder / "weights.json").read_text())
    record = FileRecord.of(folder / "model.yaml")
    index["files"]["model.yaml"] = {"bytes": record.bytes, "sha256": record.sha256}
    (folder / "weights.json").write_text(json.dumps(index))


def system(model: dict[str, Any], canary: Path) -> None:
    model["modalities"]["image"]["vae"] = {"_target_": "os.system", "command": f"touch {canary}"}


@pytest.mark.parametrize("kind", ["run", "weights"])
def test_no_command_calls_what_a_folder_names(kind: str, folders: Path, tmp_path: Path, capsys) -> None:
    canary = tmp_path / "canary"
    folder = poisoned(folders, kind, lambda model: system(model, canary), tmp_path / "given")
    image = next((folders / "pairs").rglob("*.tar"))
    for words in COMMANDS.values():
        places = {"folder": folder, "out": tmp_path / "out", "image": image, "pairs": folders / "pairs"}
        words = [word.format(**places) for word in words]
        sampling = SMALL if words[0] not in ("weights",) else []
        assert main([*words, *sampling]) == 2, words
        shown = capsys.readouterr()
        assert "model.modalities.image.vae._target_=os.system is no vae of this package" in shown.err, words
        assert "add 'trust=[os]'" in shown.err
        assert "Traceback" not in shown.err
        assert not list(tmp_path.glob("out*")), words
    with pytest.raises(ConfigError, match="trust=\\[os\\]"):
        VersatileDiffusion.from_checkpoint(str(folder))
    assert not canary.exists()


def as_vae(target: str, **arguments: Any) -> Change:
    def change(model: dict[str, Any]) -> None:
        model["modalities"]["image"]["vae"] = {"_target_": target, **arguments}

    return change


def towers(**text: Any) -> Change:
    def change(model: dict[str, Any]) -> None:
        encoder = model["modalities"]["text"]["context_encoder"]
        encoder["architecture"] = copy.deepcopy(encoder["architecture"])
        encoder["architecture"]["text_cfg"].update(text)

    return change


def renamed(model: dict[str, Any]) -> None:
    model["name"] = "${oc.env:HOME}"


def keyed(model: dict[str, Any]) -> None:
    model["modalities"]["image"]["vae"]["${oc.env:HOME}"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_vae("hostile_module.Part"), r"hostile_module.Part is no vae .* 'trust=\[hostile_module\]'"),
        (as_vae("vdtrain.weights.folder.write_text", path="x"), "is no vae of this package"),
        (as_vae("vdtrain.models.clip.ClipImageContext", architecture="ViT-B-32"), "is no vae of this package"),
        (as_vae("vdtrain.models.image_vae.os.system"), "is no vae of this package"),
        (as_vae(""), "is no vae of this package"),
        (as_vae("eval"), "is no vae of this package"),
        (renamed, r"model.name=\$\{oc.env:HOME\}: interpolations of a recorded configuration are not resolved"),
        (keyed, r"model.modalities.image.vae=\$\{oc.env:HOME\}: interpolations"),
        (as_vae("${oc.env:HOME}"), "interpolations of a recorded configuration are not resolved"),
        (as_vae("vdtrain.models.image_vae.ImageVAE", weights="${oc.decode:1}"), "interpolations"),
        (towers(hf_model_name="org/model"), "text_cfg.hf_model_name: not built, because open_clip fetches it"),
    ],
)
@pytest.mark.parametrize("kind", ["run", "weights"])
def test_what_a_folder_may_not_say(
    kind: str, change: Change, message: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((ConfigError, ValueError), match=message):
        VersatileDiffusion.from_checkpoint(str(poisoned(folders, kind, change, tmp_path / "given")))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases are not read"),
        ("[" * 100_000, "nested too deeply"),
        ("x: " + "y" * 2_000_000, "more than 1,000,000 bytes"),
        ("!!python/object/apply:os.system [touch canary]", "could not determine a constructor"),
        ("a: [", "expected"),
        ("\x00", "special characters"),
        ("just text", "model: no table of settings"),
        ("", "model: no table of settings"),
        ("modalities: {image: 3}", "model: "),
        ("surprise: 1", "model: "),
    ],
)
def test_a_model_file_of_another_kind_is_one_line(
    text: str, reason: str, folders: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(folders / "weights", tmp_path / "given")
    rewrite(tmp_path / "given", text)
    assert main(["sample", str(tmp_path / "given"), "a red circle", f"output_dir={tmp_path}/out"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: checkpoint={tmp_path}/given: model.yaml cannot be read (")
    assert shown.count("\n") == 1
    assert re.search(reason, shown), shown


def test_references_stay_within_their_configuration() -> None:
    found = resolved({"a": {"b": "${c}/x", "d": "${.b}", "e": "${a.b}${c}"}, "c": 7, "f": ["${a}"], "g": "${oc.env:X}"})
    inner = {"b": "7/x", "d": "7/x", "e": "7/x7"}
    assert found == {"a": inner, "c": 7, "f": [inner], "g": "${oc.env:X}"}
    assert resolved({"a": "${nowhere}"}) == {"a": "${nowhere}"}


@pytest.mark.parametrize(
    "container",
    [
        {"a": "${a}"},
        {"a": "${b}", "b": "${a}"},
        {"a0": "x" * 100, **{f"a{level}": f"${{a{level - 1}}}" * 10 for level in range(1, 20)}},
        {"a": {"b": "${a}"}},
        {"a0": list(range(10)), **{f"a{level}": [f"${{a{level - 1}}}"] * 10 for level in range(1, 20)}},
    ],
)
def test_references_cannot_grow_without_end(container: Any) -> None:
    with pytest.raises(ValueError, match="grows without end"):
        resolved(container)


@pytest.mark.parametrize("kind", ["run", "weights"])
def test_a_class_of_ones_own_by_its_module(
    kind: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "vaes.py").write_text(
        "from vdtrain.models.image_vae import ImageVAE\nclass Mine(ImageVAE):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(model: dict[str, Any]) -> None:
        model["modalities"]["image"]["vae"]["_target_"] = "mine.vaes.Mine"

    folder = poisoned(folders, kind, change, tmp_path / "given")
    words = ["sample", str(folder), "a red circle", f"output_dir={tmp_path}/out", *SMALL]
    assert main([*words, "trust=[min]"]) == 2
    assert "add 'trust=[mine.vaes]'" in capsys.readouterr().err
    assert main([*words, "trust=[mine]"]) == 0
    assert (tmp_path / "out").is_dir()
    model = VersatileDiffusion.from_checkpoint(str(folder), trust=["mine.vaes"])
    assert type(model.frozen.vaes["image"]).__name__ == "Mine"
    assert main(["weights", "export", "safetensors", str(tmp_path / "w"), str(folder), "trust=[mine]"]) == 0
    assert read_yaml(tmp_path / "w" / "model.yaml")["modalities"]["image"]["vae"]["_target_"] == "mine.vaes.Mine"


def test_every_class_that_the_package_configures_is_known() -> None:
    for name in sorted(path.stem for path in (config_folder() / "model").glob("*.yaml")):
        model = to_object(compose("train", [f"model={name}"]), TrainConfig).model
        for modality in model.modalities.values():
            for part, known in PARTS.items():
                assert getattr(modality, part)["_target_"] in known


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", ["global", CARRIED])
def test_weights_that_are_not_finite_are_refused(group: str, value: float, tmp_path: Path, capsys) -> None:
    poisoned = weights()
    name = next(name for name in poisoned if layer_group(name) == group)
    poisoned[name].view(-1)[-1] = value
    write_run(tmp_path / "run", tensors=poisoned)
    words = ["weights", "export", "safetensors", str(tmp_path / "out"), str(tmp_path / "run"), "weights=model"]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert f"error: checkpoint={tmp_path}/run" in shown
    assert "holds values that are NaN or infinite" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()
    config = to_object(compose("train", ["model=tiny", f"stage.init_from={tmp_path}/run"]), TrainConfig)
    with pytest.raises(WeightsError, match="NaN or infinite"):
        dict(initial_weights(Start(weights=resolve_weights("stage.init_from", f"{tmp_path}/run")), config.model))


def test_frozen_parts_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    save_file({"weight": torch.full((2, 2), float("nan")), "bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"vae.weights=.*: weight holds values that are NaN or infinite"):
        load_weights(layer, str(tmp_path / "w.safetensors"), "vae.weights")
    assert layer.weight.isfinite().all()
