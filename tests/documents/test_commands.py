"""README, docs and helps: every command that they show is typed here, in a clone where all is small. Two minutes.

Each of these is a failure: a command that fails, a new one of which it is not known what the user gets, one that needs
what it does not say, and one that says so and needs nothing. `tests/documents/walk.py` knows the forms of commands.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.__main__ import COMMANDS as DATA_COMMANDS
from data_pipeline.__main__ import LATENTS
from tests.documents.commands import PAGES, ROOT, Command, commands_in, of_page
from tests.documents.walk import (
    GETS,
    GPU,
    SAYS,
    Walk,
    commands,
    elsewhere,
    needs,
    out_of_reach,
    runs_here,
    slow,
)
from vdtrain.cli import COMMANDS as CLI_COMMANDS

COMMANDS = commands()
SHOWN = [command for page in PAGES for command in of_page(page)]
HERE, ELSEWHERE = [list(filter(which, COMMANDS)) for which in (runs_here, elsewhere)]


def name(command: Command) -> str:
    return f"{command.page}:{command.line}"


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    with contextlib.ExitStack() as stack:
        # The path of a socket is short.
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="walk-", dir="/tmp")))
        yield Walk(tmp_path_factory.mktemp("walk"), sockets / "socket", stack)


PAGE = """\
Run `vdtrain train stage=x` (needs 2 GPUs), or `vdtrain plan`; `tail -f JOB` shows it.

* In a list:

  ```sh
  for scale in 2 4; do  # needs patience
    vdtrain sample "a red circle" \\
      steps=$scale
  done
  make demo    # in minutes
  ```

```python
print(1)
```
"""


def test_commands_are_found_with_what_they_need() -> None:
    train, plan, tail, loop, demo, program = commands_in("page", PAGE)
    assert (train.text, train.needs, train.mention) == ("vdtrain train stage=x", "2 GPUs", False)
    assert plan.mention
    assert tail.mention
    assert loop.text == 'for scale in 2 4; do\n  vdtrain sample "a red circle" \\\n    steps=$scale\ndone'
    assert (demo.text, demo.line, demo.needs) == ("make demo", 10, None)
    assert (program.language, program.text) == ("python", "print(1)\n")
    with pytest.raises(AssertionError, match="stands in a block of its own"):
        list(commands_in("page", "```\nvdtrain plan\n```"))


def test_a_command_of_an_unknown_form_is_not_passed_over() -> None:
    """It would be run, and then it is not known what to look for."""
    command = Command("page", 1, "vdtrain dance runs/stage1")
    assert runs_here(command)
    assert known(command) == []
    assert needs(Command("page", 1, "vdtrain sample runs/x it device=cuda")) == GPU
    assert needs(Command("page", 1, "vdtrain train stage=x hardware=cpu")) is None
    assert needs(Command("page", 1, "curl https://example.org/x")) == "the internet"


def known(command: Command) -> list[str]:
    """Forms of commands of which it is known what the user gets."""
    return [form for form in (*GETS, *SAYS) if re.fullmatch(form, command.text, re.DOTALL)]


def walked(command: Command) -> Any:
    return pytest.param(command, marks=pytest.mark.slow if slow(command) else [], id=name(command))


@pytest.mark.parametrize("command", [walked(command) for command in HERE])
def test_a_command_does_what_it_is_there_for(command: Command, walk: Walk) -> None:
    assert known(command), f"{command}\nsay in GETS or SAYS of tests/documents/walk.py what the user gets"
    outcome = walk.outcome(command)
    assert outcome.status == 0, f"{command}\n{outcome.output}"
    assert not outcome.missing, f"{command}\nmissing: {', '.join(outcome.missing)}\n{outcome.output}"


@pytest.mark.parametrize("command", SHOWN, ids=name)
def test_what_a_command_needs_is_said_beside_it(command: Command) -> None:
    """And nothing is said of what could run as it stands."""
    if command.mention or (elsewhere(command) and command.needs is None):
        return
    wanted = needs(command)
    hint = "`# needs 8 GPUs` at its end, or (needs a cluster) behind it in a sentence"
    assert wanted is None or command.needs is not None, f"{command}\nneeds {wanted}, and does not say so: {hint}"
    assert wanted is not None or command.needs is None, f"{command}\nneeds nothing; the mark is wrong"
    assert wanted is None or wanted in str(command.needs), f"{command}\nneeds {wanted}, its mark says {command.needs}"


@pytest.mark.parametrize("command", ELSEWHERE, ids=name)
def test_a_command_that_another_test_runs_is_run_there(command: Command) -> None:
    file, _, test = str(elsewhere(command)).partition("::")
    text = (ROOT / file).read_text()
    # A script has it in a line of its own, a workflow in a step.
    line = rf"^(?: *- run: )?{re.escape(command.text)}$"
    assert f"def {test}(" in text if test else re.search(line, text, re.MULTILINE), command


@pytest.mark.parametrize("command", [command for command in SHOWN if command.mention], ids=name)
def test_a_command_that_is_named_exists(command: Command) -> None:
    match = re.match(r"(vdtrain|python -m data_pipeline) ([a-z]+)", command.text)
    named = {"vdtrain": CLI_COMMANDS, "python -m data_pipeline": {*DATA_COMMANDS, LATENTS}}
    assert match is None or match[2] in named[match[1]], command
    module = re.match(r"python -m (\S+)", command.text)
    # The log keeps the names of its day.
    if module is not None and command.page != "docs/log.md":
        assert importlib.util.find_spec(module[1]) is not None, command


def test_the_documents_show_commands() -> None:
    assert len(HERE) >= 60
    pages = {"README.md", "docs/data.md", "docs/weights.md", "vdtrain.commands.sample"}
    assert {command.page for command in HERE} >= pages
    assert len([command for command in SHOWN if out_of_reach(command)]) >= 2


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("examples/**/*.sh")]), ids=lambda path: path.name
)
def test_the_head_of_a_script_says_how_that_script_is_called(script: Path) -> None:
    path = str(script.relative_to(ROOT))
    typed = r"^# +(?:bash |sbatch (?:\[SBATCH OPTIONS\] )?)?((?:slurm|examples)/[\w/]+\.sh)\b"
    called = re.findall(typed, script.read_text(), re.MULTILINE)
    # Those that only others source, and the demo, which make calls.
    assert called or path in ("slurm/env.sh", "slurm/common.sh", "slurm/job.sh", "examples/demo.sh")
    assert set(called) <= {path}
