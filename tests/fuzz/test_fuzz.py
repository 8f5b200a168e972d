"""A few inputs of every target, the same in every run; and that a fault is found, kept and read again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz import targets
from tests.fuzz.__main__ import main
from tests.fuzz.running import finding
from vdtrain.errors import ConfigError

TRIES = {"configuration": 10, "manifest": 60, "weights": 150}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_odd_inputs_are_a_right_result_or_one_line(name: str) -> None:
    target = targets.TARGETS[name]

    @settings(
        max_examples=TRIES.get(name, 80),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def once(content: bytes) -> None:
        told = finding(target, content)
        assert told is None, told

    once()


FAULTS = {
    "error": lambda content: [][len(content)],
    "lines": lambda content: _raise(ConfigError("one\ntwo")),
}


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("fault", ["error", "lines"])
def test_a_fault_is_found_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    monkeypatch.setitem(targets.TARGETS, "planted", targets.Target(st.binary(max_size=8), FAULTS[fault]))
    assert main(["planted", "--minutes", "0.005", "--folder", str(tmp_path)]) == 1
    assert "planted: " in capsys.readouterr().out
    [kept] = [tmp_path / name for name in os.listdir(tmp_path)]
    assert main(["--again", str(kept)]) == 1
