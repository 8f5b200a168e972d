"""The scripts around evaluation: a rival's images by diffusers, and the paper's table. 30 seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from examples.evaluate_stable_diffusion import main as make_images
from examples.paper_table import main as make_table
from tests.pairs import write_pairs
from vdtrain.commands.evaluate import main as evaluate
from vdtrain.models.frozen_weights import ASSETS

PROMPTS = [f"a red circle, number {number}" for number in range(5)]


def write_pipeline(folder: Path) -> None:
    """A Stable Diffusion of the smallest sizes with random weights."""
    torch.manual_seed(0)
    words = str(ASSETS / "tiny" / "clip_tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=words, model_max_length=24)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(628)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=629,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=24,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def test_a_rival_from_prompts_to_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pipeline(tmp_path / "sd")
    rows = [{"file_name": f"n{number}.png", "prompt": text} for number, text in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = ["--resolution", "32", "--steps", "2", "--batch-size", "2"]
    words = [str(tmp_path / "sd"), str(tmp_path / "prompts.jsonl"), str(tmp_path / "made"), *sizes]
    assert make_images([*words, "--share", "1/2"]) == 0
    assert sorted(path.name for path in (tmp_path / "made").glob("*.png")) == ["n2.png", "n3.png"]
    assert make_images(words) == 0
    content = {path.name: path.read_bytes() for path in (tmp_path / "made").glob("*.png")}
    assert len(content) == len(set(content.values())) == len(PROMPTS)
    # A lost image comes back as it was; what is there is not made again.
    (tmp_path / "made" / "n3.png").unlink()
    stamp = (tmp_path / "made" / "n0.png").stat().st_mtime_ns
    assert make_images(words) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").glob("*.png")} == content
    assert (tmp_path / "made" / "n0.png").stat().st_mtime_ns == stamp
    capsys.readouterr()
    assert make_images([*words, "--seed", "1"]) == 2
    assert "holds images with another seed (0, now 1)" in capsys.readouterr().err

    manifest = write_pairs(tmp_path / "data", shards=1, count=8)
    given = ["model=tiny", "data=shapes", f"data.manifest={manifest}", "resolution=32", "loader_workers=1", "threads=1"]
    assert evaluate([f"images={tmp_path}/made", f"output_dir={tmp_path}/evaluation", *given]) == 0
    capsys.readouterr()
    assert make_table([f"SD v1.4={tmp_path}/evaluation", "--output", str(tmp_path / "table.md")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "table.md").read_text()
    assert text.startswith("| text-to-image | samples | FID |")
    assert "| SD v1.4 | 5 |  |" in text
    assert "| VD, in the paper |  | 11.10 ± 0.09 |" in text
    assert make_table([f"ours={tmp_path}/nowhere"]) == 2
    assert capsys.readouterr().err.startswith(f"error: ours={tmp_path}/nowhere: {tmp_path}/nowhere/metrics.json cannot")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({0: "nowhere"}, "MODEL=nowhere: no diffusers pipeline"),
        ({1: "nowhere.txt"}, "PROMPTS=nowhere.txt: cannot be read"),
        ({3: "--share=2/2"}, "--share=2/2: write NUMBER/PROCESSES"),
    ],
)
def test_a_mistake_is_one_line(
    change: dict[int, str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    words = [str(tmp_path), str(tmp_path / "prompts.txt"), str(tmp_path / "made"), "--seed=0"]
    assert make_images([change.get(place, word) for place, word in enumerate(words)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
    assert not (tmp_path / "made").exists()
