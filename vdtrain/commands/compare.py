"""Let people choose, blindly, between two sets of samples, and add up their votes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import PlainArguments
from vdtrain.config.command_schema import CompareConfig
from vdtrain.errors import ConfigError, missing
from vdtrain.files import refuse_existing, write_text, written_whole

USAGE = """\
Usage: vdtrain compare A B [SETTING=VALUE ...]

Compare two folders of samples by people who do not know which is which. Without votes it makes a page, one file that
loads nothing from elsewhere. It shows pairs from the same input, in random order and on random sides. People choose the
left one, the right one or neither, and save their votes as a file. With votes it prints how often each folder was
preferred, with 95 % confidence intervals, for each task, and whether the difference is significant. A and B are folders
that vdtrain sample or vdtrain evaluate wrote, or folders of images of equal names.

Examples:
  vdtrain compare samples/ours samples/theirs
  vdtrain compare samples/ours samples/theirs votes=[votes-1.json,votes-2.json]
"""


def compare(config: CompareConfig, raw_config: DictConfig) -> int:
    """Write the page, or print the result; returns the exit status."""
    if config.a is None or config.b is None:
        raise ConfigError(f"{'b' if config.a else 'a'}: not given; write vdtrain compare A B")
    from vdtrain.report.comparison import make_comparison, write_comparison
    from vdtrain.report.page import check_page

    folders = Path(config.a), Path(config.b)
    output = Path(config.output or "comparison.html")
    if not config.votes:
        check_page(output, f"output={output}", config.overwrite)
    elif config.output is not None:
        refuse_existing(output, f"output={output}", config.overwrite)
    if config.votes and (line := missing("scipy")) is not None:
        raise ConfigError(f"votes: {line}")
    into = f"into {output}" if not config.votes or config.output is not None else "for the terminal"
    said = f"takes: {folders[0]} and {folders[1]}, seed {config.seed}, {into}"
    comparison = make_comparison(*folders, config.pairs, config.seed)
    for name, folder, count in zip("ab", folders, comparison.unmatched, strict=True):
        if count:
            print(f"note: {name}={folder}: {count:,} samples have no partner, and are left out", file=sys.stderr)
    if not config.votes:
        write_comparison(comparison, output, Path(config.inputs))
        print(said, file=sys.stderr)
        print(output)
        return 0
    from vdtrain.report.votes import print_results, read_votes, results

    raters = read_votes([Path(each) for each in config.votes], comparison)
    found = results(comparison, raters)
    if not found:
        raise ConfigError("votes: the files hold no vote; judge a pair, and download the votes again")
    print(said, file=sys.stderr)
    print_results(found, len(raters), *map(str, folders))
    if config.output is not None:
        content = {"a": config.a, "b": config.b, "raters": len(raters), "results": [asdict(each) for each in found]}
        with written_whole(Path(config.output), f"output={config.output}", overwrite=True) as draft:
            write_text(draft, json.dumps(content, indent=2) + "\n")
        print(config.output)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain compare`; returns its exit status."""
    return run_command(USAGE, "compare", CompareConfig, compare, arguments, plain=PlainArguments(("a", "b")))
