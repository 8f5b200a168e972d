"""Published weights of the frozen parts become the files that the model reads, or one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from published_weights import compvis_vae
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models.tiny import arguments, tiny
from tests.weights.layout_2022 import to_2022
from tests.weights.small import PLAN, same, weights
from vdtrain.cli import main
from vdtrain.weights.published.frozen_names import to_diffusers, to_hugging_face
from vdtrain.weights.published.versatile_diffusion import to_released
from vdtrain.weights.tensor_files import LazyTensors

HEAD, WORDS = "decoder.lm_head.weight", "decoder.transformer.wte.weight"


def compvis(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' image VAE under CompVis' names."""
    return dict(compvis_vae(LazyTensors.of(state)))


def optimus() -> dict[str, Tensor]:
    """The text VAE as it was released: with causal masks and the head."""
    state = dict(tiny("text", "vae").state_dict())
    length = state["decoder.transformer.wpe.weight"].shape[0]
    masks = {
        f"decoder.transformer.h.{layer}.attn.bias": torch.ones(length, length).tril()[None, None] for layer in range(2)
    }
    return {**state, HEAD: state[WORDS].clone(), **masks}


def image_vae() -> dict[str, Tensor]:
    return dict(tiny("image", "vae").autoencoder.state_dict())


def clip() -> dict[str, Tensor]:
    return dict(tiny("text", "context_encoder").clip.state_dict())


def averaged_copy() -> dict[str, Tensor]:
    """What CompVis' code keeps of a VAE beside its weights."""
    copy = {f"model_ema.{key.replace('.', '')}": value + 1 for key, value in compvis(image_vae()).items()}
    return copy | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(9, dtype=torch.int32)}


def old_transformers() -> dict[str, Tensor]:
    """Constants of BERT and GPT-2 that versions before 4.31 keep among the weights."""
    masked = {f"decoder.transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    return {"encoder.embeddings.position_ids": torch.arange(32)[None], **masked}


PLACES = {
    "image_vae": "model.modalities.image.vae.weights",
    "text_vae": "model.modalities.text.vae.weights",
    "clip": "model.modalities.text.context_encoder.weights",
}
EXPECTED = {
    "image_vae": image_vae,
    "text_vae": lambda: {key: value for key, value in tiny("text", "vae").state_dict().items() if key != HEAD},
    "clip": clip,
}


def settings(folder: Path) -> list[str]:
    shared = [f"model.modalities.image.context_encoder.weights={folder / 'clip.safetensors'}"]
    return ["model=tiny", *shared, *(f"{setting}={folder / name}.safetensors" for name, setting in PLACES.items())]


def run(source: str, content: dict[str, Any], folder: Path, *more: str) -> int:
    torch.save(content, folder / "published.pth")
    return main(["weights", "import", source, str(folder / "published.pth"), *settings(folder), *more])


def check(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    found = load_file(folder / f"{name}.safetensors")
    assert same(found, {key: tensor.to(dtype) for key, tensor in EXPECTED[name]().items()})


@pytest.mark.parametrize(
    ("source", "published"),
    [
        ("image_vae", lambda: compvis(image_vae())),
        ("image_vae", lambda: compvis(image_vae()) | {"loss.logvar": torch.zeros(1)}),
        ("image_vae", lambda: {f"first_stage_model.{key}": value for key, value in compvis(image_vae()).items()}),
        ("image_vae", image_vae),
        ("image_vae", lambda: {"state_dict": compvis(image_vae()) | averaged_copy()}),
        ("image_vae", lambda: {f"module.{key}": value for key, value in compvis(image_vae()).items()}),
        ("image_vae", lambda: {f"vae.{key}": value for key, value in image_vae().items()}),
        ("text_vae", optimus),
        ("text_vae", lambda: optimus() | old_transformers()),
        ("text_vae", lambda: {"model": {f"module._orig_mod.{key}": value for key, value in optimus().items()}}),
        ("clip", clip),
        ("clip", lambda: {**clip(), "input_resolution": torch.tensor(32), "vocab_size": torch.tensor(629)}),
        ("clip", lambda: to_hugging_face(clip()) | {"text_model.embeddings.position_ids": torch.arange(24)[None]}),
        ("clip", lambda: {**clip(), "attn_mask": torch.full((24, 24), float("-inf")).triu(1)}),
        ("clip", lambda: {**clip(), "logit_scale": clip()["logit_scale"].reshape(1)}),
        ("clip", lambda: {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in clip().items()}}),
        (
            "clip",
            lambda: {
                f"{'' if 'visual' in key or key == 'logit_scale' else 'text.'}{key}": clip()[key] for key in clip()
            },
        ),
    ],
)
def test_every_layout_of_a_part(tmp_path: Path, source: str, published: Any, capsys) -> None:
    assert run(source, published(), tmp_path) == 0
    check(source, tmp_path)
    assert capsys.readouterr().out.count("\n") == 1
    assert run(source, published(), tmp_path) == 2
    assert "exists already; overwrite=true replaces it" in capsys.readouterr().err
    assert run(source, published(), tmp_path, "overwrite=true") == 0


def test_clip_without_its_scale_gets_the_trained_one(tmp_path: Path) -> None:
    assert run("clip", changed(to_hugging_face(clip()), logit_scale=None), tmp_path) == 0
    found = load_file(tmp_path / "clip.safetensors")
    assert found.pop("logit_scale").exp().item() == pytest.approx(100)
    assert same(found, {key: tensor for key, tensor in clip().items() if key != "logit_scale"})


def not_finite(content: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    name = next(name for name in content if name.endswith(end))
    tensor = content[name].clone()
    tensor.view(-1)[-1] = float("nan")
    return {**content, name: tensor}


@pytest.mark.parametrize(
    ("source", "published", "end"),
    [
        ("image_vae", lambda: compvis(image_vae()), "decoder.conv_out.bias"),
        ("text_vae", optimus, "wpe.weight"),
        ("clip", clip, "ln_final.bias"),
        ("clip", lambda: to_hugging_face(clip()), "layers.1.self_attn.k_proj.weight"),
        ("versatile_diffusion", lambda: whole(2022), "unet_text.out.2.bias"),
        ("versatile_diffusion", lambda: whole(2023), "vae.text.encoder.linear.weight"),
    ],
)
def test_values_that_are_not_finite_are_refused(tmp_path: Path, source: str, published: Any, end: str, capsys) -> None:
    output = [f"output={tmp_path / 'vd'}"] if source == "versatile_diffusion" else []
    assert run(source, not_finite(published(), end), tmp_path, *output) == 2
    shown = capsys.readouterr()
    assert re.search(rf"^error: path=\S+: \S*{re.escape(end)} holds values that are NaN or infinite", shown.err)
    assert shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["published.pth"]


def test_a_part_is_a_safetensors_file(tmp_path: Path, capsys) -> None:
    assert run("image_vae", image_vae(), tmp_path, f"{PLACES['image_vae']}={tmp_path / 'vae.ckpt'}") == 2
    assert "vae.ckpt: a safetensors file is made; give it the ending .safetensors" in capsys.readouterr().err


def test_parts_keep_their_precision_and_fill_the_model(tmp_path: Path) -> None:
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in optimus().items()}
    assert run("text_vae", halves, tmp_path) == 0
    check("text_vae", tmp_path, torch.float16)


def whole(release: int) -> dict[str, Tensor]:
    """The whole model in one file."""
    if release == 2022:
        parts = {"autokl.": compvis(image_vae()), "optimus.": optimus(), "clip.model.": to_hugging_face(clip())}
        state = {to_2022(PLAN, name): tensor for name, tensor in weights().items()}
    else:
        parts = {"vae.image.": compvis(image_vae()), "vae.text.": optimus()}
        parts |= {f"ctx.{modality}.model.": to_hugging_face(clip()) for modality in ("image", "text")}
        state = {to_released(name): tensor for name, tensor in weights().items()}
    return state | {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}


@pytest.mark.parametrize("release", [2022, 2023])
def test_a_whole_model_gives_all_parts(tmp_path: Path, release: int, capsys) -> None:
    assert run("versatile_diffusion", whole(release), tmp_path, f"output={tmp_path / 'vd'}") == 0
    for name in PLACES:
        check(name, tmp_path)
    assert (tmp_path / "vd" / "weights.json").is_file()
    assert capsys.readouterr().out.count("\n") == 4
    # Parts that are there already and are the same stay; others are not replaced.
    assert run("versatile_diffusion", whole(release), tmp_path, f"output={tmp_path / 'again'}") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'again'}  (")
    other = whole(release)
    other[next(key for key in other if key.endswith("wte.weight"))] += 1
    other[next(key for key in other if key.endswith(HEAD))] += 1
    assert run("versatile_diffusion", other, tmp_path, f"output={tmp_path / 'third'}") == 2
    assert "text_vae.safetensors exists already; overwrite=true replaces it" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_nothing_is_written_where_one_part_is_wrong(tmp_path: Path, capsys) -> None:
    content = whole(2023)
    content["ctx.image.model.logit_scale"] = torch.tensor(1.0)
    assert run("versatile_diffusion", content, tmp_path, f"output={tmp_path / 'vd'}") == 2
    assert "differs from the CLIP before it" in capsys.readouterr().err
    del content["vae.text.encoder.linear.weight"]
    content["ctx.image.model.logit_scale"] = content["ctx.text.model.logit_scale"]
    assert run("versatile_diffusion", content, tmp_path, f"output={tmp_path / 'vd'}") == 2
    assert "not the text VAE (optimus-vae.pth)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["published.pth"]


def changed(content: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    made = dict(content)
    for key, value in changes.items():
        name = next(name for name in content if name.endswith(key.replace("__", ".")))
        if value is None:
            del made[name]
        else:
            made[name] = value
    return made


@pytest.mark.parametrize(
    ("source", "published", "message"),
    [
        (
            "image_vae",
            lambda: changed(compvis(image_vae()), decoder__conv_in__bias=None),
            "missing decoder.conv_in.bias",
        ),
        ("image_vae", lambda: compvis(image_vae()) | {"extra.weight": torch.ones(1)}, "unexpected extra.weight"),
        ("image_vae", optimus, r"not the image VAE; it holds the text VAE \(`vdtrain weights import text_vae`\)"),
        ("text_vae", lambda: changed(optimus(), h__0__attn__bias=torch.ones(1, 1, 32, 32)), "is not a causal mask"),
        ("text_vae", lambda: changed(optimus(), lm_head__weight=torch.zeros(385, 96)), "differs from .*wte"),
        ("text_vae", lambda: changed(optimus(), lm_head__weight=None, wte__weight=None), "missing .*wte"),
        ("clip", lambda: changed(clip(), ln_final__bias=torch.ones(5)), r"shape ln_final.bias \[5\] instead of \[96\]"),
        ("clip", lambda: changed(clip(), logit_scale=torch.ones(2)), r"shape logit_scale \[2\] instead of \[\]"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, source: str, published: Any, message: str, capsys) -> None:
    assert run(source, published(), tmp_path) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith(f"error: path={tmp_path}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["published.pth"]


def test_a_part_without_a_place_is_refused(tmp_path: Path, capsys) -> None:
    torch.save(clip(), tmp_path / "published.pth")
    assert main(["weights", "import", "clip", str(tmp_path / "published.pth"), "model=tiny"]) == 2
    assert "context_encoder.weights=asset:tiny/clip.safetensors: not a file to write to" in capsys.readouterr().err
    other = f"output={tmp_path / 'clip'}"
    assert main(["weights", "import", "clip", str(tmp_path / "published.pth"), other]) == 2
    assert "output=" in capsys.readouterr().err


def full_size_vae() -> tuple[nn.Module, dict[str, Any]]:
    specification = arguments("versatile_diffusion", "image", "vae")
    with torch.device("meta"):
        widths = tuple(specification["block_out_channels"])
        down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        made = AutoencoderKL(
            down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2, norm_num_groups=32
        )
    return made, dict(made.config)


def test_names_of_the_image_vae_are_those_of_diffusers_converter() -> None:
    made, config = full_size_vae()
    outline = {key: torch.empty(tensor.shape) for key, tensor in compvis(dict(made.state_dict())).items()}
    found = to_diffusers(outline)
    expected = convert_ldm_vae_checkpoint({f"first_stage_model.{key}": outline[key] for key in outline}, config)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }
    assert all(found[key].data_ptr() == tensor.data_ptr() for key, tensor in expected.items())


def test_an_image_vae_by_an_older_diffusers(tmp_path: Path) -> None:
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {
        re.sub(r"attentions\.0\.(to_\w(?:ut\.0)?)", lambda match: f"attentions.0.{older[match[1]]}", key): tensor
        for key, tensor in image_vae().items()
    }
    (tmp_path / "vae").mkdir()
    save_file(state, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert any(".query." in key for key in state)
    assert main(["weights", "import", "image_vae", str(tmp_path), *settings(tmp_path)]) == 0
    check("image_vae", tmp_path)
