"""Fréchet distance between two sets of features, each modelled as a Gaussian (Dowson and Landau 1982).

On the pool features of Inception this is FID (Heusel et al. 2017, equation 6).
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdtrain.config.compose import ConfigError
from vdtrain.errors import one_line, unreadable
from vdtrain.files import written_whole


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


def read_reference(path: Path, width: int) -> Statistics:
    """Statistics from an npz file with `mu` [width] and `sigma` [width, width]; pytorch-fid writes the same.

    Raises:
        ConfigError: the file cannot be read, or has other content.
    """
    place = f"fid.reference={path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
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
    return Statistics(mean, covariance)


def write_reference(path: Path, statistics: Statistics) -> None:
    """Write statistics for `read_reference`. The file appears when it is whole.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    with written_whole(path, f"fid.reference={path}") as draft, draft.open("wb") as file:
        np.savez(file, mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
