"""Fréchet distances against closed forms, and the file of reference statistics. 2 seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vdtrain.config.compose import ConfigError
from vdtrain.evaluation.distances import Reference, Statistics, frechet_distance, read_reference, write_reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(variances: list[float], mean: float = 0.0) -> Statistics:
    return Statistics(torch.full((len(variances),), mean).double(), torch.diag(torch.tensor(variances).double()))


def test_statistics_are_numpys() -> None:
    features = normal(50, 6).float()
    before = features.clone()
    found = Statistics.of(features)
    np.testing.assert_allclose(found.mean, features.double().numpy().mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-12)
    wide = normal(50, 6)
    Statistics.of(wide)
    assert torch.equal(wide, normal(50, 6))
    assert torch.equal(features, before)


@pytest.mark.parametrize("rows", [300, 20], ids=["full rank", "fewer samples than features"])
def test_a_set_is_at_no_distance_from_itself_in_any_order(rows: int) -> None:
    features = normal(rows, 40) @ normal(40, 40, seed=1)
    first, turned = Statistics.of(features), Statistics.of(features.flip(0))
    assert frechet_distance(first, first) < 1e-6
    assert frechet_distance(first, turned) < 1e-6


def test_gaussians_of_known_distance() -> None:
    # Means 2 apart in four dimensions, deviations 1, 2, 3, 4 against 2, 2, 1, 0.
    first, second = gaussian([1, 4, 9, 16]), gaussian([4, 4, 1, 0], mean=2.0)
    assert frechet_distance(first, second) == pytest.approx(4 * 4 + 1 + 0 + 4 + 16, rel=1e-12)
    assert frechet_distance(second, first) == pytest.approx(37, rel=1e-12)


def test_covariances_that_do_not_commute() -> None:
    """Of two by two matrices tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB)), by the eigenvalues of AB."""
    first, second = (
        Statistics(torch.zeros(2).double(), torch.tensor(rows).double())
        for rows in ([[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.9], [-0.9, 3.0]])
    )
    product = first.covariance @ second.covariance
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    assert float(torch.linalg.norm(product - second.covariance @ first.covariance)) > 0.1
    assert frechet_distance(first, second) == pytest.approx(float(3 + 4 - 2 * root), rel=1e-10)


def test_the_distance_grows_with_what_differs() -> None:
    base = normal(2000, 8)
    found = [frechet_distance(Statistics.of(base), Statistics.of(base + shift)) for shift in (0.0, 0.1, 0.5)]
    assert found == pytest.approx([0, 8 * 0.01, 8 * 0.25], abs=1e-9)


@pytest.mark.parametrize("features", [torch.zeros(1, 3), torch.full((4, 3), float("nan"))])
def test_what_has_no_statistics_is_refused(features: Tensor) -> None:
    with pytest.raises(ValueError, match="at least 2 are needed, and all must be finite"):
        Statistics.of(features)


def test_reference_files_keep_every_bit(tmp_path: Path) -> None:
    written = Statistics.of(normal(9, 4))
    reference = Reference(written, {"images": 9, "pairs": "ö"})
    write_reference(tmp_path / "a" / "coco.npz", reference)
    found = read_reference(tmp_path / "a" / "coco.npz", 4)
    assert torch.equal(found.statistics.mean, written.mean)
    assert torch.equal(found.statistics.covariance, written.covariance)
    assert found.origin == reference.origin
    with pytest.raises(ConfigError, match=r"fid\.reference=.*exists already"):
        write_reference(tmp_path / "a" / "coco.npz", reference)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "not an npz file with mu and sigma"),
        ({"mu": np.zeros(4)}, "not an npz file with mu and sigma"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.zeros((4, 4))}, "Object arrays cannot be loaded"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, r"features of \[3\] instead of \[4\]"),
        ({"mu": np.full(4, np.nan), "sigma": np.zeros((4, 4))}, "not finite"),
        (
            {"mu": np.zeros(4), "sigma": np.zeros((4, 4)), "origin": np.array("[1]")},
            "not an npz file with mu and sigma",
        ),
    ],
)
def test_a_foreign_reference_file_is_one_line(
    arrays: dict[str, np.ndarray] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "reference.npz"
    if arrays is None:
        path.write_text("mu sigma")
    else:
        np.savez(path, **arrays)
    with pytest.raises(ConfigError, match=message) as caught:
        read_reference(path, 4)
    assert str(caught.value).startswith("fid.reference=")
    assert "\n" not in str(caught.value)
