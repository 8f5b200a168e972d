"""Parts of an evaluation on the disk: readable for everybody who may, and one line if they cannot be written."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from vdtrain.config.compose import ConfigError
from vdtrain.evaluation.parts import PAIRS, Parts


def test_a_part_has_the_mode_of_other_files(tmp_path: Path) -> None:
    parts = Parts(tmp_path, samples=3, part_samples=2)
    for part in parts.parts:
        images = torch.zeros(len(part), 3, 4, 4, dtype=torch.uint8)
        features = torch.full((len(part), 5), float(part.number))
        parts.write(part, PAIRS, {"image/clip": features}, {"image": images, "text": ["a"] * len(part)})
    (tmp_path / "plain").touch()
    for file in (tmp_path / "parts").iterdir():
        assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    found = parts.read(PAIRS, {"image/clip"})
    assert found.features["image/clip"].tolist() == [[0.0] * 5, [0.0] * 5, [1.0] * 5]
    assert found.captions == {"text": ["a"] * 3}
    assert found.shown["image"].shape == (2, 3, 4, 4)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    parts = Parts(tmp_path, samples=2, part_samples=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"^output_dir=.*: cannot be written .*File too large.*raise the limit"):
            parts.write(parts.parts[0], PAIRS, {"image/clip": torch.zeros(2, 100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "parts").iterdir())
