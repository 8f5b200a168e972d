"""Which tests run in the same process of pytest-xdist, and in which order: a plugin for `--dist loadgroup`.

A module's tests stay together, for they share what its fixtures make; so do those of modules that share a session's
fixture, or something of the machine's. What takes longest begins first.
"""

from __future__ import annotations

import pytest

# Session's fixtures -> the group of those that use them.
SHARED = {"cluster": "slurm", "tiny_runs": "tiny_runs", "origin": "world"}
# Groups that take longest, in order; a module's group is its name below tests/.
FIRST = ("slurm",)


def group_of(item: pytest.Item) -> str:
    """The explicit one, or that of what it shares, or its module's."""
    mark = item.get_closest_marker("xdist_group")
    if mark is not None:
        return str(mark.args[0] if mark.args else mark.kwargs["name"])
    return item.nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test its group, and sort."""
    modules: dict[str, str] = {}
    for item in items:
        for fixture, name in SHARED.items():
            if fixture in getattr(item, "fixturenames", ()):
                modules.setdefault(group_of(item), name)
    groups = {item: modules.get(group_of(item), group_of(item)) for item in items}
    for item, name in groups.items():
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(name))
    rank = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(groups[item], len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    """Known without pytest-xdist, too."""
    config.addinivalue_line("markers", "xdist_group(name): run in the same process")
