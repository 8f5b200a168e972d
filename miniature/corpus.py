"""What the tiny frozen parts learn from: drawn images with captions, and the tokenizers made of those captions."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from miniature.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene, caption, draw, sample_scene
from vdtrain.models.tokenizers import WORD_END, arranged, clip_model

FACTS: tuple[tuple[str, ...], ...] = (tuple(COLOURS), SHAPES, tuple(SIZES), tuple(POSITIONS), tuple(BACKGROUNDS))
HELD_OUT_SHARE = 1 / 8
"""Share of held-out combinations among all pairs of a colour and a shape."""
DOWNLOADED_PIXELS = (64, 129)
JPEG_QUALITY = (80, 96)
VOCABULARY_LIMIT = 4096
"""More entries than the captions' words need: merging ends when every word is one token."""


def sample_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of all combinations, with held-out ones: at full size the frozen parts have seen everything too."""
    return [sample_scene(rng, held_out=bool(rng.random() < HELD_OUT_SHARE)) for _ in range(count)]


def draw_images(scenes: Sequence[Scene], pixels: int, rng: np.random.Generator) -> Tensor:
    """Images uint8 [B, 3, pixels, pixels]; half as drawn, half compressed to JPEG and resized like a download."""
    images = []
    for scene in scenes:
        if rng.random() < 0.5:
            images.append(draw(scene, pixels))
            continue
        file = io.BytesIO()
        drawn = Image.fromarray(draw(scene, int(rng.integers(*DOWNLOADED_PIXELS))))
        drawn.save(file, "JPEG", quality=int(rng.integers(*JPEG_QUALITY)))
        resized = Image.open(file).convert("RGB").resize((pixels, pixels), Image.Resampling.BICUBIC)
        images.append(np.asarray(resized))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def write_captions(scenes: Sequence[Scene], rng: np.random.Generator) -> list[str]:
    """One caption per scene."""
    return [caption(scene, rng) for scene in scenes]


def scene_facts(scenes: Sequence[Scene]) -> Tensor:
    """Colour, shape, size, position and background of each scene, int64 [B, 5], as places in `FACTS`."""
    words = [(scene.colour, scene.shape, scene.size, scene.position, scene.background) for scene in scenes]
    return torch.tensor([[names.index(word) for names, word in zip(FACTS, row, strict=True)] for row in words])


def caption_facts(captions: Sequence[str]) -> Tensor:
    """The facts that each caption states, int64 [B, 5]; -1 if it does not mention one."""
    rows = []
    for text in captions:
        words = set(text.split())
        rows.append([next((i for i, name in enumerate(names) if name in words), -1) for names in FACTS])
    return torch.tensor(rows)


def encoder_tokenizer(words: Sequence[str]) -> Tokenizer:
    """WordPiece over the captions' words and, for all other text, single ASCII characters."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *("##" + character for character in characters)]
    entries += [word for word in words if word not in entries]
    model = WordPiece({entry: index for index, entry in enumerate(entries)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def decoder_tokenizer(captions: Sequence[str]) -> Tokenizer:
    """Byte-level BPE in which every word of the captions, with the space before it, is one token."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_LIMIT, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" " + text for text in captions], trainer)
    tokenizer.add_special_tokens(["<PAD>", "<BOS>", "<EOS>"])
    return tokenizer


def clip_tokenizer(captions: Sequence[str]) -> Tokenizer:
    """CLIP's kind of BPE in which every word of the captions is one token."""
    learner = arranged(BPE(end_of_word_suffix=WORD_END))
    trainer = BpeTrainer(vocab_size=VOCABULARY_LIMIT, end_of_word_suffix=WORD_END, show_progress=False)
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return arranged(clip_model([(a, b) for a, b in merges]))
