"""The summary of a test run names what it did not prove."""

import pytest

pytest_plugins = ["pytester"]


def test_skipped_tests_are_counted_by_reason(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.conftest import pytest_terminal_summary")
    skipped = "import pytest\n@pytest.mark.parametrize('n', range({}))\ndef test(n): pytest.skip('no {}')\n"
    for folder, file, number, missing in [("a", "x", 2, "cluster"), ("a", "y", 3, "cluster"), ("b", "z", 1, "GPU")]:
        pytester.path.joinpath(folder).mkdir(exist_ok=True)
        pytester.path.joinpath(folder, f"test_{file}.py").write_text(skipped.format(number, missing))
    pytester.path.joinpath("test_proven.py").write_text("def test(): pass")
    summary = pytester.runpytest_inprocess().outlines
    assert [line for line in summary if line.startswith("not proven")] == [
        "not proven here: b/test_z.py (no GPU) - 1 test",
        "not proven here: a (no cluster) - 5 tests",
    ]
