"""The figures equal those of other public implementations on the same inputs, to a thousandth. 90 seconds.

FID, KID, precision and recall: torch-fidelity, from pictures on. CLIP score: torchmetrics on transformers' CLIP. BLEU
and CIDEr-D: pycocoevalcap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from miniature.shapes import caption, draw, sample_scene
from tests.evaluation.test_given import flow_of
from tests.evaluation.test_inception import fill
from vdtrain.commands.evaluate import main as evaluate
from vdtrain.config.command_schema import ClipConfig
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.evaluation.captions import bleu, caption_figures, cider, distinct, words
from vdtrain.evaluation.distances import kernel_distance, precision_recall
from vdtrain.evaluation.inception import InceptionFeatures
from vdtrain.evaluation.scores import ClipScorer, Mean, clip_scores
from vdtrain.models.frozen_weights import ASSETS
from vdtrain.models.tokenizers import END, START
from vdtrain.weights.published.frozen_names import to_hugging_face

SIDE, COUNT = 32, 8
THOUSANDTH = 1e-3


def drawn(count: int, seed: int) -> tuple[list[np.ndarray], list[str]]:
    generator = np.random.default_rng(seed)
    scenes = [sample_scene(generator) for _ in range(count)]
    return [draw(scene, SIDE) for scene in scenes], [caption(scene, generator) for scene in scenes]


@pytest.mark.slow
def test_images_from_files_to_figures(tmp_path: Path) -> None:
    """`vdtrain evaluate images=` against torch-fidelity on the same two folders with the same weights."""
    network = InceptionFeatures(None).network
    fill(network)
    state = network.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, tmp_path / "inception.pth")
    for name, seed in (("real", 0), ("made", 1)):
        images, captions = drawn(COUNT, seed)
        (tmp_path / name).mkdir()
        for number, (image, text) in enumerate(zip(images, captions, strict=True)):
            Image.fromarray(image).save(tmp_path / name / f"{number}.png")
            if name == "made":
                (tmp_path / name / f"{number}.txt").write_text(text)
    folders = [f"images={tmp_path}/made", f"real_images={tmp_path}/real", f"output_dir={tmp_path}/out"]
    given = [
        "model=tiny",
        f"resolution={SIDE}",
        "threads=1",
        "loader_workers=1",
        f"fid.weights={tmp_path}/inception.pth",
    ]
    assert evaluate([*folders, *given]) == 0
    found = flow_of(tmp_path, "out")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "made"),
        input2=str(tmp_path / "real"),
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=1,
        kid_subset_size=COUNT,
        samples_find_ext="png",
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
        feature_layer_prc="2048",
        cache=False,
        verbose=False,
    )
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=THOUSANDTH)
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=THOUSANDTH)
    assert (found["precision"], found["recall"]) == (theirs["precision"], theirs["recall"])


def test_images_and_captions_to_the_clip_score() -> None:
    model = to_object(compose("train", ["model=tiny"]), TrainConfig).model
    scorer = ClipScorer(ClipConfig(None, None, None), model)
    images, captions = drawn(COUNT, 2)
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    ours = Mean.of(clip_scores(scorer.embed_images(batch), scorer.embed_captions(captions)))
    architecture = model.modalities["text"].context_encoder["architecture"]
    text, vision = architecture["text_cfg"], architecture["vision_cfg"]
    shared = {"hidden_act": "gelu", "projection_dim": architecture["embed_dim"]}
    end = text["vocab_size"] - 1
    theirs = CLIPModel(
        CLIPConfig(
            text_config={
                **shared,
                **{"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]},
                **{"hidden_size": text["width"], "intermediate_size": 2 * text["width"]},
                **{"num_attention_heads": text["heads"], "num_hidden_layers": text["layers"], "eos_token_id": end},
            },
            vision_config={
                **shared,
                **{"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
                **{"hidden_size": vision["width"], "intermediate_size": 2 * vision["width"]},
                **{"num_attention_heads": vision["width"] // 32, "num_hidden_layers": vision["layers"]},
            },
            projection_dim=architecture["embed_dim"],
        )
    ).eval()
    theirs.load_state_dict(to_hugging_face(load_file(ASSETS / "tiny" / "clip.safetensors")))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "tiny" / "clip_tokenizer.json"))
    tokenizer.pad_token = END
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, end - 1), (END, end)]
    )
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    pictures = CLIPImageProcessor(size={"shortest_edge": vision["image_size"]}, crop_size=side)

    def processor(images: Any = None, text: Any = None, **options: Any) -> Any:
        return pictures(images, return_tensors="pt") if text is None else tokenizer(text, **options)

    with torch.no_grad():
        found = clip_score(list(batch), captions, model_name_or_path=lambda: (Tensors(theirs), processor))
    assert ours.mean > 60
    assert ours.mean == pytest.approx(float(found), rel=THOUSANDTH)


class Tensors(torch.nn.Module):
    """A CLIP whose features are tensors, as torchmetrics takes them and transformers 5 no longer gives."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *given: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_image_features(*given))

    def get_text_features(self, *given: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_text_features(*given))


def _tensor(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output


@pytest.mark.parametrize(("first", "second"), [(300, 300), (300, 200)])
def test_features_to_kid_precision_and_recall(first: int, second: int) -> None:
    random = torch.Generator().manual_seed(0)
    made = torch.randn(first, 16, generator=random)
    real = 0.8 * torch.randn(second, 16, generator=random) + 0.1
    theirs = prc_features_to_metric(made, real, verbose=False)
    assert precision_recall(made, real) == pytest.approx((theirs["precision"], theirs["recall"]), rel=THOUSANDTH)
    size = min(first, second)
    kid = kid_features_to_metric(made, real, kid_subsets=2000, kid_subset_size=size, verbose=False)
    # Random subsets differ; all samples of both are one subset.
    tolerance = THOUSANDTH if first == second else 0.1
    assert kernel_distance(made, real) == pytest.approx(kid["kernel_inception_distance_mean"], rel=tolerance, abs=2e-3)


def test_too_few_samples() -> None:
    assert precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)) is None
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(torch.zeros(1, 2), torch.zeros(9, 2))


def corpus() -> tuple[list[str], list[list[str]]]:
    """Captions, and two or three references of each, the third of another scene."""
    generator = np.random.default_rng(0)
    captions, references = [], []
    for _ in range(60):
        scene, other = sample_scene(generator), sample_scene(generator)
        captions.append(caption(scene, generator))
        references.append([caption(each, generator) for each in (scene, scene, other)[: 2 + len(captions) % 2]])
    return captions, references


def test_bleu_and_cider() -> None:
    captions, references = corpus()
    made = [words(text) for text in captions]
    real = [[words(text) for text in own] for own in references]
    plain = [" ".join(each) for each in made]
    plain_references = [[" ".join(each) for each in own] for own in real]
    results = {number: [text] for number, text in enumerate(plain)}
    truth = dict(enumerate(plain_references))
    scores, _ = Bleu(4).compute_score(truth, results, verbose=0)
    assert 0.05 < scores[3] < 0.99
    assert bleu(made, real) == pytest.approx(100 * scores[3], rel=THOUSANDTH)
    score, _ = Cider().compute_score(truth, results)
    assert score > 0.5
    assert cider(made, real) == pytest.approx(100 * score, rel=THOUSANDTH)
    found = caption_figures(captions, references)
    assert (found["bleu"], found["cider"]) == (bleu(made, real), cider(made, real))


def test_captions_of_other_lengths_and_of_none_in_common() -> None:
    """Clipping and the penalty for another length."""
    pairs = [("a dog", ["a dog runs on the grass", "a dog"]), ("a a a a a a red", ["a red car", "the red car"])]
    # What every image's references have, such as "a", has no weight, so that another word is repeated too.
    pairs += [("red red red red red car", ["a red car", "the red car"])]
    pairs += [("", ["a cat"]), ("seven words that nobody else says here", ["a cat sits", "one cat"])]
    made, real = [text.split() for text, _ in pairs], [[each.split() for each in own] for _, own in pairs]
    results = {number: [text] for number, (text, _) in enumerate(pairs)}
    score, _ = Cider().compute_score({number: own for number, (_, own) in enumerate(pairs)}, results)
    assert cider(made, real) == pytest.approx(100 * score, rel=THOUSANDTH)
    assert cider(made[:1], real[:1]) == 0


# What COCO's own tokenizer, a program in Java, makes of them (pycocoevalcap 1.2).
TOKENS = {
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    "Two dogs' leashes aren't attached; it's sunny!": "two dogs leashes are n't attached it 's sunny",
    "A man (in a red shirt) is eating.": "a man -lrb- in a red shirt -rrb- is eating",
    'A sign that says "STOP" near St. Mary\'s church.': "a sign that says stop near st. mary 's church",
    "Mr. Smith and Mrs. Jones. They eat pizza, salad...": "mr. smith and mrs. jones they eat pizza salad",
    "A T.V. on a stand - with a U.S. flag.": "a t.v. on a stand with a u.s. flag",
    "The clock reads 10:30 a.m. in New York.": "the clock reads 10:30 a.m. in new york",
    "10% off sale & more $5.00 items": "10 % off sale & more $ 5.00 items",
    "A kitchen with a stove,microwave and refrigerator.": "a kitchen with a stove microwave and refrigerator",
    "someone is gonna cannot go": "someone is gon na can not go",
    "A [red] {blue} thing": "a -lsb- red -rsb- -lcb- blue -rcb- thing",
    "A person\u2019s \u201cquoted\u201d dog -- three": "a person 's quoted dog three",
}


def test_words_are_those_of_cocos_tokenizer() -> None:
    assert {text: " ".join(words(text)) for text in TOKENS} == TOKENS


def test_distinct_counts_ngrams() -> None:
    captions = [["a", "b", "a", "b"], ["a", "b"], []]
    assert distinct(captions, 1) == pytest.approx(2 / 6)
    assert distinct(captions, 2) == pytest.approx(2 / 4)
    assert distinct([[]], 2) == 0
