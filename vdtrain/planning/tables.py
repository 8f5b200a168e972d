"""A stage's plan with times and cost of its phases, and the tables that `vdtrain plan` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vdtrain.config.schema import HardwareConfig, PlanConfig, RatesConfig
from vdtrain.engine.deepspeed import strategy_line
from vdtrain.planning.memory import GB, StagePlan, plan_stage
from vdtrain.planning.speed import StepTime, phase_rates, step_time

LEFT_OUT_OF_TIMES = "waits for data, samples, validation, checkpoints, restarts"


@dataclass(frozen=True)
class Bill:
    """What a stage takes.

    Attributes:
        times: of each phase; empty if a rate is not known.
        rates: of each phase, and where they come from.
    """

    plan: StagePlan
    times: list[StepTime]
    rates: list[tuple[RatesConfig, str]]
    price: float | None

    @classmethod
    def of(cls, config: PlanConfig) -> Bill:
        """Plan a stage whose settings have been checked.

        Raises:
            ConfigError: a part cannot be built, or `rate` cannot be read.
        """
        plan = plan_stage(config, config.gpus)
        rates = [phase_rates(config, phase) for phase in plan.phases]
        timed = [replace(config, hardware=replace(config.hardware, rates=each)) for each, _ in rates]
        times = [step_time(each, plan, phase) for each, phase in zip(timed, plan.phases, strict=True)]
        known = [time for time in times if time is not None]
        return cls(plan, known if len(known) == len(times) else [], rates, config.price_per_gpu_hour)

    def cost(self, hours: float) -> float | None:
        """Of a number of GPU hours; None without a price."""
        return None if self.price is None else self.price * hours

    def to_dict(self) -> dict[str, Any]:
        """The plan, its times and their sums, ready for JSON."""
        times = [{**asdict(time), "cost": self.cost(time.gpu_hours)} for time in self.times]
        rates = [
            {**asdict(rates), "share_of_peak": share_of_peak(rates), "source": source} for rates, source in self.rates
        ]
        unknown = [None for _ in self.plan.phases]
        return {**asdict(self.plan), "times": times or unknown, "rates": rates, **sums([self])}


def sums(bills: Sequence[Bill]) -> dict[str, float | None]:
    """Days, GPU hours and cost of some stages, one after another; None where they are not known."""
    if not all(bill.times for bill in bills):
        return {"days": None, "gpu_hours": None, "cost": None}
    times = [time for bill in bills for time in bill.times]
    hours = sum(time.gpu_hours for time in times)
    return {"days": sum(time.days for time in times), "gpu_hours": hours, "cost": bills[0].cost(hours)}


def share_of_peak(rates: RatesConfig) -> float | None:
    """The share of the data sheet's FLOP/s that is expected, or was measured."""
    return rates.tflops / rates.peak_tflops if rates.tflops and rates.peak_tflops else None


def rate_lines(bills: Sequence[Bill]) -> list[str]:
    """The rates behind the times, each source once with the stages and resolutions that it is for."""
    used: dict[str, list[str]] = {}
    for bill in bills:
        for phase, (rates, source) in zip(bill.plan.phases, bill.rates, strict=True):
            if rates.tflops is None:
                continue
            share = share_of_peak(rates)
            of = "" if share is None else f", {share:.0%} of the data sheet's {rates.peak_tflops:,.4g}"
            place = f"{bill.plan.stage} " * (len(bills) > 1) + f"{phase.resolution} pixels"
            used.setdefault(f"{rates.tflops:,.4g} TFLOP/s a GPU{of}; {source}", []).append(place)
    return [f"rates{'' if len(used) == 1 else ' of ' + ', '.join(places)}: {text}" for text, places in used.items()]


def show_stage(console: Console, hardware: HardwareConfig, bill: Bill) -> None:
    """Print the plan of a stage: memory by its parts, steps, times, disk."""
    made = bill.plan
    _about(console, hardware, made.stage, made.gpus)
    console.print(stage_table(bill))
    trained = sum(made.parameters.values())
    kept = f"{made.untrained_parameters:,} of the diffuser kept as they are, " if made.untrained_parameters else ""
    console.print(
        f"{trained:,} trained parameters, {kept}{made.frozen_parameters:,} frozen; {made.pairs_per_step} pairs a step"
    )
    console.print(f"a checkpoint is {made.checkpoint / 1e9:.2f} GB, those kept {made.checkpoints / 1e9:.2f} GB")
    console.print("left out of the memory: " + "; ".join(made.left_out))
    _end(console, [bill])


def show_curriculum(console: Console, hardware: HardwareConfig, bills: Sequence[Bill]) -> None:
    """Print the plan of a curriculum: a line for each phase, and sums for each stage and in all."""
    _about(console, hardware, f"{len(bills)} stages", bills[0].plan.gpus)
    console.print(curriculum_table(bills))
    disk = sum(bill.plan.checkpoints for bill in bills)
    console.print(f"the checkpoints that are kept are {disk / 1e9:,.2f} GB")
    _end(console, bills)


def _about(console: Console, hardware: HardwareConfig, what: str, gpus: int) -> None:
    console.print(
        f"{what} on {gpus} x {hardware.name}: {hardware.precision}, "
        f"activation checkpointing: {hardware.activation_checkpointing}"
    )
    console.print(strategy_line(hardware, gpus))


def _end(console: Console, bills: Sequence[Bill]) -> None:
    """What the times rest on, their sum, and warnings."""
    total = sums(bills)
    if total["days"] is None:
        console.print("no times: hardware.rates are not known; give rate=FILE.json, which `vdtrain bench` writes")
    else:
        for line in rate_lines(bills):
            console.print(line)
        console.print(f"left out of the times: {LEFT_OUT_OF_TIMES}")
        price = bills[0].price
        cost = "" if price is None else f", cost {total['cost']:,.0f} at {price:,g} a GPU hour"
        console.print(f"in all {total['days']:,.2f} days, {total['gpu_hours']:,.0f} GPU hours{cost}")
    for bill in bills:
        for warning in bill.plan.warnings:
            console.print(f"warning: {f'{bill.plan.stage}: ' * (len(bills) > 1)}{warning}", style="bold red")


def curriculum_table(bills: Sequence[Bill]) -> Table:
    """Steps and times, within 80 columns: a row for each phase below one for its stage, and one for all stages."""
    timed = all(bill.times for bill in bills)
    priced = timed and bills[0].price is not None
    names = ["", "steps", "peak\nGB", *["ms a\nstep", "pairs/s", "days", "GPU\nhours"] * timed, *["cost"] * priced]
    table = Table(*names, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def total(name: str, of: Sequence[Bill]) -> None:
        sum_of = sums(of)
        row = [name, f"{sum(phase.steps for bill in of for phase in bill.plan.phases):,}", ""]
        row += ["", "", f"{sum_of['days']:,.2f}", f"{sum_of['gpu_hours']:,.0f}"] if timed else []
        table.add_row(*row, *([f"{sum_of['cost']:,.0f}"] if priced else []), style="bold")

    for bill in bills:
        total(bill.plan.stage, [bill])
        for index, phase in enumerate(bill.plan.phases):
            row = [f"  {phase.resolution} pixels", f"{phase.steps:,}", f"{phase.peak / GB:.1f}"]
            if timed:
                time = bill.times[index]
                row += [f"{time.seconds * 1e3:,.1f}", f"{time.pairs_per_second:,.1f}"]
                row += [f"{time.days:,.2f}", f"{time.gpu_hours:,.0f}"]
                row += [f"{bill.cost(time.gpu_hours):,.0f}"] if priced else []
            table.add_row(*row, end_section=index == len(bill.plan.phases) - 1)
    total("all stages", bills)
    return table


def stage_table(bill: Bill) -> Table:
    """GB on each GPU, steps, times and cost, one column for each phase; without times if there are none."""
    made, times = bill.plan, bill.times
    table = Table("GB on each GPU", *(f"{phase.resolution} x {phase.resolution}" for phase in made.phases))
    names = {"ema": "averaged weights", "untrained": "frozen layers"}
    standing = {names.get(name, name): size for name, size in asdict(made.standing).items()}
    if not made.standing.untrained:
        del standing["frozen layers"]
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
        ends = name in ([*standing][-1], "from step to step", "reduction and update")
        table.add_row(name, *(f"{column[name] / GB:.2f}" for column in sizes), end_section=ends)
    if made.memory is not None:
        table.add_row(f"of {made.memory / GB:.0f} GB", *(f"{phase.peak / made.memory:.0%}" for phase in made.phases))
    table.add_section()
    table.add_row("micro-batch", *(f"{phase.micro_batch} x {phase.micro_batches}" for phase in made.phases))
    if made.memory is not None:
        table.add_row("largest that fits", *(str(phase.largest_micro_batch) for phase in made.phases))
    table.add_row("steps", *(f"{phase.steps:,}" for phase in made.phases))
    table.add_row("pairs", *(f"{phase.samples:,}" for phase in made.phases))
    table.add_row("learning rate", *("{:.3g} to {:.3g}".format(*phase.learning_rate) for phase in made.phases))
    rows: list[tuple[str, Callable[[StepTime], str]]] = [
        ("TFLOP a step", lambda time: f"{time.flops / 1e12:,.4g}"),
        ("ms of computing", lambda time: f"{time.compute * 1e3:,.1f}"),
        ("ms of the update", lambda time: f"{time.update * 1e3:,.1f}"),
        ("ms of exchange", lambda time: f"{time.exchange * 1e3:,.1f}"),
        ("of which exposed", lambda time: f"{time.exposed * 1e3:,.1f}"),
        ("ms a step", lambda time: f"{time.seconds * 1e3:,.1f}"),
        ("pairs/s", lambda time: f"{time.pairs_per_second:,.1f}"),
        ("days", lambda time: f"{time.days:,.2f}"),
        ("GPU hours", lambda time: f"{time.gpu_hours:,.0f}"),
    ]
    if bill.price is not None:
        rows.append(("cost", lambda time: f"{bill.cost(time.gpu_hours):,.0f}"))
    if times:
        table.add_section()
    for name, text in rows if times else []:
        table.add_row(name, *map(text, times))
    for column in table.columns[1:]:
        column.justify = "right"
    return table
