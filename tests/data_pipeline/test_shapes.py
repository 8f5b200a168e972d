"""The drawn set: what it shows, what its captions say, and that the detector reads both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from miniature.detector import caption_attributes, detect
from miniature.image_set import COYO_SCHEMA, LAION_SCHEMA, write_image_set
from miniature.shapes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    draw,
    sample_scene,
    vocabulary,
)
from vdtrain.config.data_schema import ShapesConfig


def test_held_out_pairs_are_never_drawn_for_training() -> None:
    generator = np.random.default_rng(0)
    trained = {(scene.colour, scene.shape) for scene in (sample_scene(generator) for _ in range(4000))}
    held_out = {(scene.colour, scene.shape) for scene in (sample_scene(generator, True) for _ in range(200))}
    assert held_out == HELD_OUT
    assert trained == {(colour, shape) for colour in COLOURS for shape in SHAPES} - HELD_OUT
    assert sorted(shape for _, shape in HELD_OUT) == sorted(SHAPES)
    assert len({colour for colour, _ in HELD_OUT}) == len(HELD_OUT)


@pytest.mark.parametrize("pixels", [32, 64, 128])
def test_every_clean_drawing_is_read_right(pixels: int) -> None:
    for shape in SHAPES:
        for colour in COLOURS:
            for size in SIZES:
                for position in POSITIONS:
                    for background in BACKGROUNDS:
                        image = draw(Scene(shape, colour, size, position, background), pixels)
                        assert detect(image) == (colour, shape), (size, position, background)


@pytest.mark.parametrize("pixels", [32, 64])
def test_soft_noisy_drawings_are_read_right_nearly_always(pixels: int) -> None:
    generator = np.random.default_rng(1)
    right = np.zeros(2)
    for _ in range(400):
        scene = sample_scene(generator)
        soft = Image.fromarray(draw(scene, pixels)).filter(ImageFilter.GaussianBlur(pixels / 32))
        noisy = np.asarray(soft) + generator.normal(0, 15, (pixels, pixels, 3))
        colour, shape = detect(np.clip(noisy, 0, 255).astype(np.uint8))
        right += (colour == scene.colour, shape == scene.shape)
    assert right.min() >= 0.93 * 400


def test_noise_and_blank_images_get_a_guess() -> None:
    generator = np.random.default_rng(2)
    for image in (generator.integers(0, 256, (32, 32, 3), dtype=np.uint8), np.zeros((64, 64, 3), np.uint8)):
        colour, shape = detect(image)
        assert colour in COLOURS
        assert shape in SHAPES


def test_captions_name_colour_and_shape_in_few_known_words() -> None:
    generator = np.random.default_rng(3)
    words = set(vocabulary())
    assert len(words) <= 45
    for _ in range(1000):
        scene = sample_scene(generator)
        text = caption(scene, generator)
        assert caption_attributes(text) == (scene.colour, scene.shape)
        assert set(text.split()) <= words
        assert len(text.split()) <= 14
        assert "a orange" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a circle", (None, "circle")),
        ("something blue", ("blue", None)),
        ("a red blue star", (None, "star")),
        ("a redcircle", (None, None)),
        ("", (None, None)),
    ],
)
def test_absent_and_contradictory_attributes_are_none(text: str, expected: tuple[str | None, str | None]) -> None:
    assert caption_attributes(text) == expected


def test_the_set_has_both_published_schemas_and_is_drawn_once(tmp_path: Path) -> None:
    config = ShapesConfig(folder=str(tmp_path / "images"), images=20, pixels=48, seed=5, port=8765)
    write_image_set(config)
    folder = tmp_path / "images"
    laion, coyo = pq.read_table(folder / "laion2b_en.parquet"), pq.read_table(folder / "coyo700m.parquet")
    assert laion.schema.equals(LAION_SCHEMA)
    assert coyo.schema.equals(COYO_SCHEMA)
    urls = laion["URL"].to_pylist() + coyo["url"].to_pylist()
    assert len(laion) == 12
    assert len(set(urls)) == 20
    for url, text in zip(urls, laion["TEXT"].to_pylist() + coyo["text"].to_pylist(), strict=True):
        image = np.asarray(Image.open(folder / url.removeprefix("http://127.0.0.1:8765/")))
        assert detect(image) == caption_attributes(text)
        assert caption_attributes(text) not in HELD_OUT

    first = folder / "images" / "000000.jpg"
    first.write_bytes(b"kept")
    write_image_set(config)
    assert first.read_bytes() == b"kept"
    (folder / "complete.json").write_text(json.dumps({"images": 19}))
    write_image_set(config)
    assert first.read_bytes() != b"kept"
