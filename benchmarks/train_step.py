"""A training step beside the one that a plain script with diffusers' U-Nets makes, and what each technique adds.

python benchmarks/train_step.py                  # two threads; writes benchmarks/results/train_step.json
python benchmarks/train_step.py --only script_compiled,blocks --add     # a few more rows
python benchmarks/train_step.py --show           # the README's tables from the results

Two things are measured: forward and backward of the four flows alone, and the whole step, from pixels and captions to
updated weights. The peer is a script that trains diffusers' U-Nets, the flows one after another; each flow encodes what
it needs. All contestants have the same weights, frozen parts, pairs and random numbers, and the same losses.

The network is the full-size one at a fifth of its width (benchmarks/conf/model/narrow.yaml): 109 million parameters,
four pairs of 128 pixels, float32. Contestants run in turn, in heats of a few, so that they fit in memory. The peer is
in every heat, and a ratio compares medians of one heat. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import interleaved
from train_step_contestants import CPU, Contestant, Ours, Script, Work, largest_difference

from vdtrain.engine.deepspeed import import_deepspeed
from vdtrain.errors import ConfigError
from vdtrain.run import distributed
from vdtrain.tracking.surroundings import commit, processor, versions

HERE = Path(__file__).parent
RESULT = HERE / "results" / "train_step.json"
FULL = (f"hydra.searchpath=[{HERE}/conf]", "model=narrow", "stage.global_batch_size=4")
FULL_RESOLUTION, SMOKE_RESOLUTION = 128, 32
SMOKE = ("model=tiny", "stage.global_batch_size=2")
# Between outputs, as a share of their deviation, and between losses after as many steps.
OUTPUT_TOLERANCE, LOSS_TOLERANCE, CHECKED_STEPS = 1e-4, 1e-4, 2

PEER = "script"
# Name: (what it is, keywords of a script or settings of a run). Ours are eager and in NCHW where nothing is said.
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    PEER: ("diffusers' U-Nets, plain script", {}),
    "script_fused": ("the same, fused AdamW", {"optimizer": "fused"}),
    "script_compiled": ("the same, U-Nets compiled", {"network": "compiled unets"}),
    "plain": ("our diffuser, plain script", {"network": "diffuser"}),
    "encode_once": ("+ each sample encoded once", {"network": "diffuser", "encode_once": True}),
    "together": ("+ flows with one output together", {"network": "diffuser", "encode_once": True, "together": True}),
}
# Settings of `hardware`, beside the preset `cpu`, which neither compiles nor changes the layout.
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "eager": ("vdtrain", {}),
    "halves": ("vdtrain, two micro-batches", {"micro_batch_size": "{32:1,128:2}"}),
    "channels_last": ("vdtrain, channels_last", {"channels_last": "true"}),
    "blocks": ("vdtrain, blocks compiled", {"compile": "blocks"}),
    "blocks_channels_last": ("vdtrain, blocks compiled, channels_last", {"compile": "blocks", "channels_last": "true"}),
    "whole": ("vdtrain, compiled whole", {"compile": "whole"}),
}
# Compiling takes minutes at the first time; PyTorch keeps the result on disk.
COMPILED = ("script_compiled", "blocks", "blocks_channels_last", "whole")
CONTESTANTS = {name: what for name, (what, _) in (SCRIPTS | RUNS).items()}
# One technique more in each row, as far as a switch exists.
LADDER = {
    "plain": "plain script, our diffuser, the flows one by one",
    "encode_once": "each sample is encoded once for all flows",
    "together": "flows with one output in one batch",
    "eager": "the trainer: flat buffers, fused AdamW, EMA and norm by buffer, few queries read tokens",
    "halves": "two micro-batches: less memory, less of the flows together",
    "channels_last": "channels_last",
    "blocks": "blocks compiled, without channels_last",
    "blocks_channels_last": "blocks compiled, channels_last",
    "whole": "compiled whole, without channels_last",
}
SMOKE_CONTESTANTS = (PEER, "together", "eager")


def build(name: str, work: Work, folder: Path) -> Contestant:
    """A contestant by its name.

    Raises:
        ConfigError: the configuration does not have its settings.
    """
    if name in SCRIPTS:
        return Script(work, **SCRIPTS[name][1])
    return Ours(work, folder / name, [f"hardware.{key}={value}" for key, value in RUNS[name][1].items()])


def peak_memory(name: str, words: Sequence[str], threads: int) -> int | None:
    """Bytes that the steps of a contestant take at most, of a forked process; None if its settings are refused."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            found = _peak_memory(name, words, threads)
            os.write(writer, json.dumps(found).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{name}: the process that measures its memory failed")
    peak: int | None = json.loads(text)
    return peak


def _peak_memory(name: str, words: Sequence[str], threads: int) -> int | None:
    torch.set_num_threads(threads)
    distributed.start("cpu")
    before = _kilobytes("VmRSS")
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        work = Work.make(words)
        try:
            contestant = build(name, work, Path(folder))
        except ConfigError:
            return None
        del work
        gc.collect()
        # From here on the peak counts, not while building, nor what building left in the allocator.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(CHECKED_STEPS):
            contestant.step()
        return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def heat(names: Sequence[str], work: Work, rounds: int, warm_up: int, left_out: dict[str, str]) -> dict[str, Any]:
    """Figures of contestants that run in turn, the peer among them."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        contestants: dict[str, Contestant] = {}
        for name in names:
            try:
                contestants[name] = build(name, work, Path(folder))
            except ConfigError as error:
                left_out[name] = str(error)
                print(f"left out: {name}: {error}", flush=True)
        losses: dict[str, list[dict[str, float]]] = {}
        for name, contestant in contestants.items():
            began = time.perf_counter()
            losses[name] = [contestant.step() for _ in range(CHECKED_STEPS)]
            found[name] = {"first_steps_seconds": round(time.perf_counter() - began, 1)}
            print(f"{name}: built, {CHECKED_STEPS} steps in {found[name]['first_steps_seconds']} s", flush=True)
        actions: dict[str, Callable[[], object]] = {}
        for name, contestant in contestants.items():
            actions |= {f"{name}/flows": contestant.flows, f"{name}/step": contestant.step}
        after = {f"{name}/flows": contestant.discard for name, contestant in contestants.items()}
        taken = interleaved(actions, CPU, rounds, after, warm_up)
        for name, contestant in contestants.items():
            found[name] |= {
                "parameters": contestant.parameters,
                "loss_difference": _loss_difference(losses[name], losses[PEER]),
                **{part: _figures(taken[f"{name}/{part}"], taken[f"{PEER}/{part}"]) for part in ("flows", "step")},
            }
            contestant.close()
    return found


def _loss_difference(own: Sequence[Mapping[str, float]], peer: Sequence[Mapping[str, float]]) -> float:
    return max(abs(mine[flow] / theirs[flow] - 1) for mine, theirs in zip(own, peer, strict=True) for flow in theirs)


def _figures(own: Sequence[tuple[float, float]], peer: Sequence[tuple[float, float]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for index, kind in enumerate(("seconds", "cpu_seconds")):
        mine, theirs = [each[index] for each in own], [each[index] for each in peer]
        figures[kind] = _spread(mine)
        figures[f"peer_over_own_{kind}"] = _spread([their / my for my, their in zip(mine, theirs, strict=True)])
    return figures


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of the named contestants.

    Raises:
        SystemExit: contestants do not do the same work.
    """
    shape = SMOKE if arguments.smoke else FULL
    side = arguments.resolution
    words = [
        *shape,
        "stage=stage3_four_flow",
        "data=shapes",
        "hardware=cpu",
        "tracking=none",
        f"stage.phases=[{{resolution:{side},samples:1000000}}]",
        f"+hardware.micro_batch_size={{{side}:1024}}",
        "optimizer.warmup_samples=0",
        "stage.init_from=null",
        "watchdog_seconds=null",
        f"hardware.threads={arguments.threads}",
    ]
    names = [PEER, *(name for name in arguments.only if name != PEER)]
    # The text U-Net of diffusers calls its own functions in a deprecated way.
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    # A process that has started threads must not fork.
    torch.set_num_threads(1)
    import_deepspeed("cpu")
    peaks = {name: peak_memory(name, words, arguments.threads) for name in names} if arguments.memory else {}
    torch.set_num_threads(arguments.threads)
    distributed.start("cpu")
    try:
        work = Work.make(words)
        difference = largest_difference(work)
        left_out: dict[str, str] = {}
        found: dict[str, Any] = {}
        size = arguments.heat - 1
        for first in range(1, max(len(names), 2), size):
            table = heat([PEER, *names[first : first + size]], work, arguments.rounds, arguments.warm_up, left_out)
            gc.collect()
            # The peer's own figures are those of the first heat.
            found = table | found
    finally:
        distributed.finish()
    for name, row in found.items():
        row |= {"what": CONTESTANTS[name], "peak_bytes": peaks.get(name), "commit": commit()}
    problems = [f"outputs differ by {difference:.1e} of their deviation"] * (difference > OUTPUT_TOLERANCE)
    problems += [
        f"{name}: losses differ by {row['loss_difference']:.1e}, or it trains {row['parameters']:,} parameters"
        for name, row in found.items()
        if row["loss_difference"] > LOSS_TOLERANCE or row["parameters"] != found[PEER]["parameters"]
    ]
    if problems:
        raise SystemExit("not the same work: " + "; ".join(problems))
    return {
        "claim": "a step of the trainer takes less time and memory than that of a plain script with diffusers' U-Nets",
        "command": "python benchmarks/train_step.py",
        "hardware": {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "threads": arguments.threads},
        "versions": versions("torch", "diffusers", "deepspeed", "transformers", "open_clip_torch"),
        "model": "tiny" if arguments.smoke else "narrow",
        "parameters": found[PEER]["parameters"],
        "pairs": len(work.samples["text"]),
        "resolution": side,
        "rounds": arguments.rounds,
        "largest_output_difference": difference,
        "contestants": {name: found[name] for name in names if name in found},
        "ladder": ladder(found),
        "left_out": left_out,
    }


def ladder(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each technique: seconds of a step, and how many times as fast as the plain script with our diffuser."""
    rows = []
    for name, technique in LADDER.items():
        if name in found and "plain" in found:
            own, plain = (found[each]["step"]["peer_over_own_seconds"]["median"] for each in (name, "plain"))
            seconds = found[name]["step"]["seconds"]["median"]
            rows.append({"technique": technique, "seconds": seconds, "plain_over_own": round(own / plain, 3)})
    return rows


def tables(found: Mapping[str, Any]) -> str:
    """The tables of README.md and docs/benchmarks.md."""

    def times(figures: Mapping[str, Any], kind: str) -> str:
        ratio = figures[f"peer_over_own_{kind}"]
        return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"

    lines = [
        "| | four flows: s | times as fast | whole step: s | times as fast | by CPU seconds | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["contestants"].values():
        flows, step, peak = row["flows"], row["step"], row["peak_bytes"]
        lines.append(
            f"| {row['what']} | {flows['seconds']['median']:.2f} | {times(flows, 'seconds')} | "
            f"{step['seconds']['median']:.2f} | {times(step, 'seconds')} | {times(step, 'cpu_seconds')} | "
            f"{'' if peak is None else f'{peak / 1e9:.2f} GB'} |"
        )
    lines += ["", "| technique | whole step: s | times as fast as the first row |", "|---|---|---|"]
    for row in found["ladder"]:
        lines.append(f"| {row['technique']} | {row['seconds']:.2f} | {row['plain_over_own']:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"names of {', '.join(CONTESTANTS)}")
    parser.add_argument("--compiled", action="store_true", help="the compiled contestants too, some minutes more")
    parser.add_argument("--add", action="store_true", help="keep the rows of other contestants in the output")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before the first that counts")
    parser.add_argument("--heat", type=int, default=4, help="contestants that run in turn, the peer among them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resolution", type=int, help="pixels of the images")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--smoke", action="store_true", help="a round of a few contestants with the tiny model")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--show", action="store_true", help="print the tables of the results that are there")
    arguments = parser.parse_args(argv)
    if arguments.show:
        print(tables(json.loads(arguments.output.read_text())))
        return 0
    if arguments.smoke:
        arguments.rounds, arguments.warm_up = 1, 0
    usual = [name for name in CONTESTANTS if arguments.compiled or name not in COMPILED]
    arguments.only = arguments.only or list(SMOKE_CONTESTANTS if arguments.smoke else usual)
    arguments.resolution = arguments.resolution or (SMOKE_RESOLUTION if arguments.smoke else FULL_RESOLUTION)
    if unknown := set(arguments.only) - CONTESTANTS.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: known are {', '.join(CONTESTANTS)}")
    if arguments.heat < 2:
        parser.error("--heat: at least 2")
    found = measure(arguments)
    if arguments.add and arguments.output.exists():
        # A ratio is one of a single heat, whichever run that was in.
        earlier = json.loads(arguments.output.read_text())
        rows = earlier["contestants"] | {name: row for name, row in found["contestants"].items() if name != PEER}
        found["contestants"] = {name: rows[name] for name in CONTESTANTS if name in rows}
        found["ladder"] = ladder(rows)
        found["left_out"] = {
            name: why for name, why in (earlier["left_out"] | found["left_out"]).items() if name not in rows
        }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{tables(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
