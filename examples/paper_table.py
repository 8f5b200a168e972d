"""The paper's comparison as a table in Markdown, of evaluations that `vdtrain evaluate` wrote.

    python examples/paper_table.py "SD v1.4=evaluation/sd" "VD, released=evaluation/released" ours=evaluation/four_flow

The paper's own figures stand below them. They are of its authors' implementation, so compare them with care
(docs/evaluation.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vdtrain.evaluation.report import METRICS, METRICS_FILE, cell_of

# FID of Xu et al., arXiv 2211.08332, on captions of COCO: mean and deviation.
PAPER = {
    "SD v1.4": {"text-to-image": "11.21 ± 0.03", "image-to-image": "18.81 ± 0.06"},
    "VD": {"text-to-image": "11.10 ± 0.09", "image-to-image": "4.57 ± 0.02"},
}
FLOWS = ("text-to-image", "image-to-image", "image-to-text", "text-to-text")


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", metavar="NAME=FOLDER", help="evaluation folders with their names")
    parser.add_argument("--output", type=Path, help="file for the table")
    arguments = parser.parse_args(argv)
    found: dict[str, dict[str, Any]] = {}
    for word in arguments.evaluations:
        name, equal, folder = word.partition("=")
        path = Path(folder if equal else name, METRICS_FILE)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            # Several folders may have the flows of one model.
            found.setdefault(name, {}).update(content["flows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"error: {word}: {path} cannot be read ({error}); give NAME=FOLDER of an evaluation", file=sys.stderr)
            return 2
    text = table(found)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


def table(evaluations: dict[str, dict[str, Any]]) -> str:
    """A Markdown table for each flow: one row for each evaluation, and the paper's."""
    flows = {flow for found in evaluations.values() for flow in found}
    blocks = []
    for flow in sorted(flows, key=lambda flow: (FLOWS.index(flow) if flow in FLOWS else len(FLOWS), flow)):
        rows = {name: found[flow] for name, found in evaluations.items() if flow in found}
        paper = {name: found[flow] for name, found in PAPER.items() if flow in found}
        shown = [name for name in METRICS if any(name in each for each in rows.values()) or (name == "fid" and paper)]
        lines = [
            f"| {flow} | samples | {' | '.join(METRICS[name][0] for name in shown)} |",
            f"|---|{'---|' * (1 + len(shown))}",
        ]
        for name, figures in rows.items():
            cells = [f"{figures['samples']:,}", *(cell_of(each, figures.get(each)) for each in shown)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for name, fid in paper.items():
            cells = ["", *(fid if each == "fid" else "" for each in shown)]
            lines.append(f"| {name}, in the paper | {' | '.join(cells)} |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
