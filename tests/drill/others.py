"""Odd inputs for every reader, and known holes in the packages that `uv.lock` installs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.drill.results import ROOT, row
from tests.fuzz.targets import TARGETS

AUDIT = "known holes in packages of uv.lock (pip-audit)"


def fuzz(minutes: float, folder: Path, only: str) -> Iterator[dict[str, Any]]:
    """A row of the table for each target whose name matches a pattern; inputs of findings are kept in a folder."""
    for name in (name for name in TARGETS if re.search(only, name)):
        words = ["-m", "tests.fuzz", name, "--minutes", str(minutes), "--folder", str(folder / "findings")]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        told = re.search(rf"^{name}: ([\d,]+) tries, (\d+) findings$", done.stdout, re.MULTILINE)
        held = done.returncode == 0 and told is not None
        outcome = f"{minutes:g} minutes without a finding" if held else (done.stdout + done.stderr)[-300:]
        yield row(f"odd inputs: {name}", int(told[1].replace(",", "")) if told else 0, one_line(outcome), held)


def audit(folder: Path) -> dict[str, Any]:
    """What pip-audit knows of the packages that `uv.lock` names with their hashes."""
    uv = shutil.which("uv") or str(ROOT / ".tools" / "bin" / "uv")
    folder.mkdir(parents=True, exist_ok=True)
    names, report = folder / "requirements.txt", folder / "audit.json"
    report.unlink(missing_ok=True)
    export = [uv, "export", "--locked", "--all-extras", "--no-emit-project", "--quiet", "--output-file", str(names)]
    subprocess.run(export, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    words = ["--requirement", str(names), "--require-hashes", "--disable-pip", "--format=json", f"--output={report}"]
    command = [uv, "tool", "run", "pip-audit", "--progress-spinner=off", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    if not report.exists():
        said = (done.stderr or done.stdout).strip().splitlines()
        return row(AUDIT, 0, f"skipped: {one_line(said[-1] if said else 'no answer')[:160]}", True)
    return audited(json.loads(report.read_text())["dependencies"])


def audited(packages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of pip-audit's answer. A package that its database does not have is passed over, and counted."""
    known = [each for each in packages if "skip_reason" not in each]
    holes = [f"{each['name']} {each['version']}: {hole['id']}" for each in known for hole in each["vulns"]]
    outcome = "; ".join(holes) or "no hole is known"
    if not known:
        outcome = "skipped: its database cannot be reached from here"
    elif len(known) < len(packages):
        outcome += f"; {len(packages) - len(known)} more packages are not in its database"
    return row(AUDIT, len(known), outcome, not holes)


def one_line(text: str) -> str:
    """Text as it may stand in a cell of the table."""
    return " ".join(text.split()).replace("|", "/")
