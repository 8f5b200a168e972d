"""What a user has before the first command, at tiny size: weights as published, a hub with them, metadata, images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from miniature.image_set import write_image_set
from miniature.shapes import Scene, caption, draw, sample_scene
from tests.hub import Hub
from tests.weights.published import compvis_whole, write_diffusers
from tests.weights.small import weights
from tests.weights.test_frozen_sources import clip, compvis, image_vae, optimus, whole
from tests.weights.test_tokenizer_files import asset
from vdtrain.config.data_schema import ShapesConfig
from vdtrain.evaluation.inception import InceptionFeatures
from vdtrain.weights.hub import ADDRESS
from vdtrain.weights.imports import ADDRESSES
from vdtrain.weights.published.frozen_names import to_diffusers, to_hugging_face
from vdtrain.weights.published.versatile_diffusion import to_released

IMAGES, PIXELS = 20, 256
# Repository -> the folder of its tables.
METADATA = {"datasets/laion/relaion2B-en-research-safe": ".", "datasets/kakaobrain/coyo-700m": "data"}


def write_hub(folder: Path) -> None:
    """Repositories as `folder`/ORG/REPO, with the files that the built-in addresses name."""
    released = folder / "shi-labs" / "versatile-diffusion"
    (released / "pretrained_pth").mkdir(parents=True)
    torch.save(four_flow(torch.float32), released / "pretrained_pth" / "vd-four-flow-v1-0.pth")
    torch.save(compvis(image_vae()), released / "pretrained_pth" / "kl-f8.pth")
    torch.save(optimus(), released / "pretrained_pth" / "optimus-vae.pth")
    (released / "vae").mkdir()
    save_file(to_diffusers(image_vae()), released / "vae" / "diffusion_pytorch_model.safetensors")
    write_diffusers(folder / "CompVis" / "stable-diffusion-v1-4")
    large = folder / "openai" / "clip-vit-large-patch14"
    large.mkdir(parents=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in to_hugging_face(clip()).items()}, large / "model.safetensors"
    )
    for name, repository in (("bert", "google-bert/bert-base-cased"), ("gpt2", "openai-community/gpt2")):
        (folder / repository).mkdir(parents=True)
        shutil.copy(asset(name), folder / repository / "tokenizer.json")


def four_flow(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The release of 2023: the diffuser alone."""
    return {to_released(name): tensor for name, tensor in weights(dtype).items()}


def write_downloads(folder: Path) -> None:
    """The same weights, and other layouts of them, as files that were downloaded by hand."""
    folder.mkdir()
    torch.save({"state_dict": compvis_whole(), "global_step": 470_000}, folder / "sd-v1-4.ckpt")
    torch.save(compvis(image_vae()), folder / "kl-f8.pth")
    torch.save(optimus(), folder / "optimus-vae.pth")
    save_file({key: tensor.contiguous() for key, tensor in clip().items()}, folder / "open_clip_model.safetensors")
    torch.save(four_flow(torch.float16), folder / "vd-four-flow-v1-0-fp16.pth")
    torch.save(whole(2022), folder / "vd-official.pth")


def write_judges(folder: Path) -> None:
    """Inception and another CLIP, with random weights at the sizes that they have."""
    folder.mkdir()
    inception = folder / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(InceptionFeatures(None).network.state_dict(), inception)
    (folder / "inception.pth").hardlink_to(inception)
    with torch.device("meta"):
        outline = open_clip.create_model("ViT-B-32-quickgelu", device="meta").state_dict()
    halves = {name: torch.empty(tensor.shape, dtype=torch.float16).normal_(0, 0.02) for name, tensor in outline.items()}
    save_file(halves, folder / "clip-vit-b-32.safetensors")


def write_data(root: Path, images: Path, port: int) -> None:
    """Metadata, whose images a server at `port` has; lists; pairs for evaluation; images to vary."""
    write_image_set(ShapesConfig(folder=str(images), images=IMAGES, pixels=PIXELS, seed=0, port=port))
    (root / "data/metadata/mine").mkdir(parents=True)
    shutil.copy(images / "laion2b_en.parquet", root / "data/metadata/mine/part-00000.parquet")
    (root / "lists").mkdir()
    (root / "lists" / "takedowns.txt").write_text("http://example.org/a.jpg\n")
    (root / "lists" / "hotline.txt").write_text("0123456789abcdef0123456789abcdef\n")
    write_own(root)
    for name, shape in (("star", "star"), ("circle", "circle"), ("square", "square"), ("image", "circle")):
        Image.fromarray(draw(Scene(shape, "red"), 64)).save(root / f"{name}.png")
    for copy in ("a", "b", "my (1)"):
        shutil.copy(root / "star.png", root / f"{copy}.png")
    mask = Image.linear_gradient("L").point(lambda value: 255 * (value > 127))
    mask.save(root / "lower-half.png")
    mask.rotate(90).save(root / "left.png")


def write_own(root: Path) -> None:
    """Images with captions beside them, a table of some of them, and COCO's captions."""
    generator = np.random.default_rng(0)
    for folder in ("photos", "coco/val2017", "coco/annotations"):
        (root / folder).mkdir(parents=True)
    rows, images, annotations = [["filepath", "title"]], [], []
    for number in range(IMAGES):
        scene = sample_scene(generator)
        text, name = caption(scene, generator), f"{number:012d}.jpg"
        Image.fromarray(draw(scene, 2 * PIXELS)).save(root / "photos" / name)
        (root / "photos" / name).with_suffix(".txt").write_text(text)
        rows.append([f"photos/{name}", text])
        (root / "coco/val2017" / name).hardlink_to(root / "photos" / name)
        images.append({"id": number, "file_name": name})
        annotations += [{"id": 5 * number + each, "image_id": number, "caption": text} for each in range(5)]
    with (root / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    document = {"images": images, "annotations": annotations}
    (root / "coco/annotations/captions_val2017.json").write_text(json.dumps(document))


def write_metadata(folder: Path, images: Path) -> None:
    """The metadata of both sets as repositories of the hub, `folder`/datasets/ORG/REPO."""
    for (repository, place), source in zip(METADATA.items(), ("laion2b_en", "coyo700m"), strict=True):
        file = folder / repository / place / "part-00000.snappy.parquet"
        file.parent.mkdir(parents=True)
        shutil.copy(images / f"{source}.parquet", file)
        (folder / repository / "README.md").write_text("a card\n")


def published_hub(folder: Path) -> Hub:
    """`folder`/hub, every repository at the commit that is built in, and the images of `folder`/images."""
    matches = [ADDRESS.fullmatch(address) for address in ADDRESSES.values()]
    commits = {match[1]: match[3] for match in matches if match} | dict.fromkeys(METADATA, "0" * 40)
    return Hub(folder / "hub", commits, folder / "images")
