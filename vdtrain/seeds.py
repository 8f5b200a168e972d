"""Seeds and generators that depend on names alone: the same names give the same numbers on any machine."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*names: object) -> int:
    """A seed in [0, 2**63) from names, such as a run's seed and the purpose of the draw."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_of(*names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `seed_of`."""
    return torch.Generator(device).manual_seed(seed_of(*names))
