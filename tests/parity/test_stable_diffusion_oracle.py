"""Stable Diffusion's U-Net, run by diffusers, against our flows on the same weights from a folder and from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from tests.parity.networks import (
    CONTEXT_WIDTH,
    NETWORK_TOLERANCE,
    assert_close,
    draw,
    make_unet,
    model_config,
    randomise,
    unet_names,
)
from vdtrain.models.diffuser import Context, Diffuser, by_rows
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.models.layer_plan import make_plan
from vdtrain.weights.published.stable_diffusion import UNET_PREFIX, layer_names, open_stable_diffusion

MODEL = model_config()
PLAN = make_plan(MODEL.diffuser)
CONTEXTS = ["image", "text"]


@pytest.fixture(scope="module")
def unet() -> Any:
    return randomise(make_unet("image"))


@pytest.fixture(scope="module")
def folder(unet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers writes a pipeline's U-Net."""
    made = tmp_path_factory.mktemp("stable-diffusion")
    unet.save_pretrained(made / "unet")
    return made


@pytest.fixture(scope="module")
def checkpoint(unet: Any) -> dict[str, Tensor]:
    """The U-Net under CompVis' names."""
    data, context = layer_names(PLAN)
    names = unet_names("image", "image")
    state = {}
    for key, tensor in unet.state_dict().items():
        kind, _, rest = str(names.to_own(key)).partition(".")
        if kind == "global_layers":
            state[f"{UNET_PREFIX}time_embed.{rest}"] = tensor
        else:
            _, index, tail = rest.split(".", 2)
            state[f"{UNET_PREFIX}{(data if kind == 'data_layers' else context)[int(index)]}.{tail}"] = tensor
    return state


def test_diffusers_reads_the_same_names_as_compvis(unet: Any, checkpoint: dict[str, Tensor]) -> None:
    """Its converter, written for the published files, undoes what the names here did."""
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    expected = unet.state_dict()
    assert set(converted) == set(expected)
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("source", ["folder", "shards", "bin", "ckpt"])
def test_flows_to_images_give_what_stable_diffusion_gives(
    unet: Any, folder: Path, checkpoint: dict[str, Tensor], source: str, context: str, tmp_path: Path
) -> None:
    if source == "ckpt":
        torch.save({"state_dict": checkpoint, "global_step": 1}, tmp_path / "sd.ckpt")
        tensors = open_stable_diffusion(tmp_path / "sd.ckpt", MODEL, CONTEXTS, "stage.init_from")
    else:
        if source != "folder":
            folder = tmp_path
            unet.save_pretrained(
                folder / "unet",
                max_shard_size="300KB" if source == "shards" else "1GB",
                safe_serialization=source != "bin",
            )
            assert (len(list(folder.glob("unet/*.index.json"))) == 1) == (source == "shards")
        tensors = open_stable_diffusion(folder, MODEL, CONTEXTS, "stage.init_from")
    diffuser = Diffuser(MODEL, ["global", "data.image", *(f"context.{name}" for name in CONTEXTS)], seed=1)
    diffuser.load_state_dict(dict(tensors))
    latents, timesteps = draw(2, 4, 8, 16, seed=1), torch.tensor([0, 501])
    given = Context(context, draw(2, 6, CONTEXT_WIDTH, seed=2))
    with torch.no_grad():
        ours = diffuser.predict("image", latents, timesteps, by_rows([given]))
        theirs = unet(latents, timesteps, given.tokens).sample
    assert_close(ours, theirs, NETWORK_TOLERANCE)


def test_only_what_is_asked_for_is_given(folder: Path) -> None:
    tensors = open_stable_diffusion(folder, MODEL, ["text"], "stage.init_from")
    assert {name.split(".")[0] for name in tensors} == {"global_layers", "data_layers", "context_layers"}
    assert not [name for name in tensors if name.startswith(("context_layers.image", "data_layers.text"))]
    none = open_stable_diffusion(folder, MODEL, [], "stage.init_from")
    assert not [name for name in none if name.startswith("context_layers")]


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as refused:
        open_stable_diffusion(folder, MODEL, CONTEXTS, "stage.init_from")
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"stage.init_from={folder}")
    return line


def test_other_networks_are_refused(unet: Any, tmp_path: Path) -> None:
    assert "a folder without weights" in refusal(tmp_path)
    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    file, config = (tmp_path / "unet" / name for name in ("diffusion_pytorch_model.bin", "config.json"))
    state = unet.state_dict()
    torch.save(state | {"class_embedding.weight": torch.zeros(1)}, file)
    assert "class_embedding.weight has no place in the model" in refusal(tmp_path)
    torch.save({key: tensor for key, tensor in state.items() if key != "conv_out.bias"}, file)
    assert "weights of another model than model=small: missing data_layers.image" in refusal(tmp_path)
    # Stable Diffusion v2 has linear layers in this place.
    linear = "mid_block.attentions.0.proj_in.weight"
    torch.save(state | {linear: state[linear][..., 0, 0]}, file)
    assert "shape context_layers.image.4.proj_in.weight [64, 64] instead of [64, 64, 1, 1]" in refusal(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": [5, 10, 20]}))
    assert "attention_head_dim is [5, 10, 20] in config.json, and the model has 4" in refusal(tmp_path)
