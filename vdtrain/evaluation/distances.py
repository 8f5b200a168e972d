"""Distances between two sets of features.

* Fréchet distance: each set is modelled as a Gaussian (Dowson and Landau 1982). On the pool features of Inception this
  is FID (Heusel et al. 2017, equation 6).
* Kernel distance: on Inception's features this is KID (Binkowski et al. 2018). Unlike FID it has no bias from the
  number of samples.
* Improved precision and recall (Kynkäänniemi et al. 2019) tell quality from variety.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdtrain.config.compose import ConfigError
from vdtrain.errors import one_line, unreadable
from vdtrain.files import written_whole
from vdtrain.seeds import generator_of

SUBSETS, SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
ROWS = 1000


def kernel_distance(generated: Tensor, real: Tensor) -> float:
    """Unbiased squared MMD under (x.y / D + 1)^3 of features [N, D] and [M, D], the mean over random subsets.

    A subset has 1,000 samples of each, or all of the smaller set. With all samples of both there is one subset.

    Raises:
        ValueError: a set has fewer than two samples.
    """
    size = min(SUBSET_SIZE, len(generated), len(real))
    if size < 2:
        raise ValueError(f"{size} features: at least 2 are needed")
    random = generator_of("kernel distance")
    whole = len(generated) == len(real) == size
    found = []
    for _ in range(1 if whole else SUBSETS):
        first, second = (
            each[torch.randperm(len(each), generator=random)[:size]].double() for each in (generated, real)
        )
        own = sum((kernel.sum() - kernel.trace()) / (size * (size - 1)) for kernel in map(_kernel, (first, second)))
        found.append(own - 2 * _kernel(first, second).mean())
    return float(torch.as_tensor(found).mean())


def _kernel(first: Tensor, second: Tensor | None = None) -> Tensor:
    second = first if second is None else second
    return (first @ second.T / first.shape[1] + 1) ** 3


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float] | None:
    """(precision, recall): the shares of generated features within the real ones' manifold, and the reverse.

    The manifold of a set is the union of balls, each around a sample, as wide as the way to its third neighbour.

    Args:
        generated, real: features [N, D] and [M, D].

    Returns:
        None if a set is too small to have so many neighbours.
    """
    if min(len(generated), len(real)) <= NEIGHBOURS:
        return None
    generated, real = generated.double(), real.double()
    return _inside(generated, real), _inside(real, generated)


def _inside(points: Tensor, manifold: Tensor) -> float:
    # A sample is its own nearest neighbour.
    widths = torch.cat([torch.cdist(each, manifold).kthvalue(NEIGHBOURS + 1).values for each in manifold.split(ROWS)])
    inside = [(torch.cdist(each, manifold) <= widths).any(dim=1) for each in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())


@dataclass(frozen=True)
class Statistics:
    """Mean float64 [D] and unbiased covariance float64 [D, D] of features."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """From features [N, D] in any precision.

        Raises:
            ValueError: there are fewer than two rows, or values that are not finite.
        """
        if len(features) < 2 or not features.isfinite().all():
            raise ValueError(f"{len(features)} features: at least 2 are needed, and all must be finite")
        wide = features.double()
        mean = wide.mean(dim=0)
        centred = wide - mean
        return cls(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared distance of the means plus tr(A + B - 2 sqrt(AB)) of the covariances A and B.

    AB has the eigenvalues of the symmetric R'AR, where B = RR'. Directions in which B holds only rounding errors are
    left out of R. With fewer samples than features most directions are like that, and the roots of their errors add up.
    """
    values, vectors = torch.linalg.eigh(second.covariance)
    inside = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    root = vectors[:, inside] * values[inside].sqrt()
    cross = torch.linalg.eigvalsh(root.T @ first.covariance @ root).clamp(min=0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * cross
    return max(0.0, float(distance))


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, kept in a file.

    Attributes:
        origin: what they depend on, by name; empty in a file of another program.
    """

    statistics: Statistics
    origin: Mapping[str, Any]


def read_reference(path: Path, width: int) -> Reference:
    """A reference from an npz file with `mu` [width] and `sigma` [width, width]; pytorch-fid writes the same.

    Raises:
        ConfigError: the file cannot be read, or has other content.
    """
    place = f"fid.reference={path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
            origin = dict(json.loads(str(file["origin"]))) if "origin" in file else {}
    except OSError as error:
        raise ConfigError(f"{place}: {unreadable(error, path)}") from error
    except (ValueError, KeyError, zipfile.BadZipFile, TypeError, AttributeError, EOFError) as error:
        reason = one_line(error)
        raise ConfigError(
            f"{place}: not an npz file with mu and sigma ({reason}); remove it to make it anew"
        ) from error
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ConfigError(f"{place}: features of {list(mean.shape)} instead of [{width}]; remove it to make it anew")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ConfigError(f"{place}: holds values that are not finite; remove it to make it anew")
    return Reference(Statistics(mean, covariance), origin)


def write_reference(path: Path, reference: Reference) -> None:
    """Write a file for `read_reference`. The file appears when it is whole.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    with written_whole(path, f"fid.reference={path}") as draft, draft.open("wb") as file:
        statistics, origin = reference.statistics, np.array(json.dumps(dict(reference.origin)))
        np.savez(file, mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy(), origin=origin)
