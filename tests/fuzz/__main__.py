"""`python -m tests.fuzz [--minutes M] [TARGET ...]`: try each target for M minutes, and keep what is found.

A finding is a file in `--folder`; `python -m tests.fuzz --again FILE` reads it once more.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.running import finding
from tests.fuzz.targets import TARGETS

# Inputs of one run of hypothesis, which keeps all of a run in memory.
BATCH = 500


def campaign(name: str, until: float, folder: Path) -> tuple[int, dict[str, Path]]:
    """Try a target until a time (`time.monotonic`); returns the tries, and one file for each kind of finding."""
    target, tries, found = TARGETS[name], 0, dict[str, Path]()
    number = time.time_ns() % 2**32

    while time.monotonic() < until:

        @seed(number)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(target.inputs)
        def once(content: bytes) -> None:
            nonlocal tries
            if time.monotonic() >= until:
                return
            tries += 1
            if told := finding(target, content):
                kind = told.strip().splitlines()[-1][:80]
                if kind not in found:
                    folder.mkdir(parents=True, exist_ok=True)
                    found[kind] = folder / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
                    found[kind].write_bytes(content)
                    print(f"{name}: {found[kind]}\n{told}", flush=True)

        once()
        number += 1
    return tries, found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("--folder", type=Path, default=Path("findings"), help="for the inputs of findings")
    parser.add_argument("--again", type=Path, help="an input to read once more")
    given_ = parser.parse_args(argv)
    if unknown := set(given_.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; choose from {', '.join(TARGETS)}")
    if given_.again is not None:
        told = finding(TARGETS[given_.again.name.rpartition("-")[0]], given_.again.read_bytes())
        print(told or "nothing is wrong")
        return 1 if told else 0
    failed = False
    for name in given_.targets or TARGETS:
        tries, found = campaign(name, time.monotonic() + 60 * given_.minutes, given_.folder)
        print(f"{name}: {tries:,} tries, {len(found)} findings", flush=True)
        failed = failed or bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
