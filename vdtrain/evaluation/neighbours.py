"""Two figures of images that compare samples with samples, where the Fréchet distance compares two Gaussians.

The kernel distance is KID on Inception's features (Binkowski et al. 2018): unlike FID it has no bias from the number of
samples. Improved precision and recall (Kynkäänniemi et al. 2019) tell quality from variety.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float] | None:
    """(precision, recall): the shares of generated features within the real ones' manifold, and the reverse.

    The manifold of a set is the union of balls, each around a sample, as wide as the way to its third neighbour.

    Args:
        generated, real: features [N, D] and [M, D].

    Returns:
        None if a set is too small to have so many neighbours.
    """
    if min(len(generated), len(real)) <= neighbours:
        return None
    generated, real = generated.double(), real.double()
    return _inside(generated, real, neighbours), _inside(real, generated, neighbours)


def _inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    # A sample is its own nearest neighbour.
    widths = torch.cat([torch.cdist(each, manifold).kthvalue(neighbours + 1).values for each in manifold.split(ROWS)])
    inside = [(torch.cdist(each, manifold) <= widths).any(dim=1) for each in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())
