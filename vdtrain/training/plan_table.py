"""A stage's plan for people."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from vdtrain.training.memory import GB, StagePlan


def plan_table(made: StagePlan) -> Table:
    """GB on each GPU, a column to a phase."""
    table = Table("GB on each GPU", *(f"{phase.resolution} x {phase.resolution}" for phase in made.phases))
    standing = {name.replace("ema", "averaged weights"): size for name, size in asdict(made.standing).items()}
    sizes = [
        {
            **standing,
            "from step to step": made.standing.total,
            "encoding": phase.measured.encoding,
            "kept by forward": phase.measured.kept,
            "forward and backward": phase.measured.peak,
            "exchange in backward": phase.exchange,
            "reduction and update": phase.update,
            "peak": phase.peak,
        }
        for phase in made.phases
    ]
    for name in sizes[0]:
        ends = name in ("frozen", "from step to step", "reduction and update")
        table.add_row(name, *(f"{column[name] / GB:.2f}" for column in sizes), end_section=ends)
    if made.memory is not None:
        table.add_row(f"of {made.memory / GB:.0f} GB", *(f"{phase.peak / made.memory:.0%}" for phase in made.phases))
    table.add_section()
    table.add_row("micro-batch", *(f"{phase.micro_batch} x {phase.micro_batches}" for phase in made.phases))
    if made.memory is not None:
        table.add_row("largest that fits", *(str(phase.largest_micro_batch) for phase in made.phases))
    table.add_row("steps", *(f"{phase.steps:,}" for phase in made.phases))
    table.add_row("pairs", *(f"{phase.samples:,}" for phase in made.phases))
    for column in table.columns[1:]:
        column.justify = "right"
    return table
