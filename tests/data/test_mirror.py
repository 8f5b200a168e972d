"""Mirrored images: which captions forbid it, and that a position decides."""

import pytest
import torch

from tests.pairs import write_pairs
from vdtrain.data.batch import Batch, Mirror, names_a_side
from vdtrain.data.loading import Prefetcher
from vdtrain.data.stream import PairStream

SIDED = [
    "a car on the left",
    "LEFT: a dog. Right: a cat",
    "a left-hand drive car",
    "the rightmost house",
    "turn RIGHT",
    "lefts and rights",
    "a left-handed guitar, lefthanded",
    "he looks leftwards",
    "the right's end",
    "top-left corner",
    "bottomright_corner",
    "links\nright",
]
PLAIN = ["a bright day", "copyright 2020", "upright piano", "leftover pizza", "a cleft", "righteous", "frightened", ""]


@pytest.mark.parametrize("caption", SIDED)
def test_captions_that_name_a_side(caption: str) -> None:
    assert names_a_side(caption)


@pytest.mark.parametrize("caption", PLAIN)
def test_captions_that_only_look_like_it(caption: str) -> None:
    assert not names_a_side(caption)


def batch(first: int, captions: list[str]) -> Batch:
    images = torch.arange(len(captions) * 12, dtype=torch.uint8).view(len(captions), 3, 2, 2)
    return Batch({"image": images, "text": captions}, torch.arange(first, first + len(captions)))


def mirrored_rows(mirror: Mirror, first: int, captions: list[str]) -> list[bool]:
    before, after = batch(first, captions).samples["image"], mirror(batch(first, captions)).samples["image"]
    rows = []
    for plain, found in zip(before, after, strict=True):
        assert torch.equal(found, plain) or torch.equal(found, plain.flip(-1))
        rows.append(not torch.equal(found, plain))
    return rows


def test_half_of_the_images_are_mirrored_by_their_position_alone() -> None:
    whole = mirrored_rows(Mirror(3), 0, ["a dog"] * 16 + ["a dog"])
    assert mirrored_rows(Mirror(3), 5, ["another"] * 8) == whole[5:13]
    many = [row for first in range(0, 1600, 16) for row in mirrored_rows(Mirror(3), first, ["a dog"] * 16)]
    assert 0.45 < sum(many) / len(many) < 0.55
    # Another phase, and another epoch of the same samples, mirror others.
    assert mirrored_rows(Mirror(4), 0, ["a dog"] * 17) != whole
    assert many[:40] != many[40:80]


def test_a_caption_with_a_side_keeps_its_image() -> None:
    captions = ["on the left", "a dog"] * 8
    rows = mirrored_rows(Mirror(3), 0, captions)
    assert rows[::2] == [False] * 8
    assert rows[1::2] == mirrored_rows(Mirror(3), 0, ["a dog"] * 16)[1::2]


def test_images_of_a_stream_come_out_mirrored(tmp_path: object) -> None:
    manifest = write_pairs(tmp_path)  # type: ignore[arg-type]

    def read(mirror: Mirror | None) -> list[Batch]:
        stream = PairStream(manifest, seed=0, resolution=32, global_batch_size=8, random_crop=False)
        batches = Prefetcher(stream, dict, mirror)
        found = [next(batches) for _ in range(20)]
        batches.close()
        return found

    changed = forbidden = 0
    for plain, mirrored in zip(read(None), read(Mirror(0)), strict=True):
        assert plain.samples["text"] == mirrored.samples["text"]
        for caption, one, other in zip(
            plain.samples["text"], plain.samples["image"], mirrored.samples["image"], strict=True
        ):
            differs = not torch.equal(one, other)
            assert not differs or torch.equal(one.flip(-1), other)
            forbidden += names_a_side(caption)
            assert not (differs and names_a_side(caption))
            changed += differs
    assert 40 < changed < 90
    assert forbidden > 5
