"""Cases of a test, of which `make test` runs a few and `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def with_slow(cases: Mapping[str, Any], quick: Collection[str]) -> list[Any]:
    """Parameters of a test, by name; all but the quick ones are slow. A case of several values is a tuple."""
    assert set(quick) <= set(cases), f"no such case: {set(quick) - set(cases)}"
    found = []
    for name, case in cases.items():
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, id=name, marks=[] if name in quick else [pytest.mark.slow]))
    return found
