"""A stage's plan with its times: days, GPU hours and cost of its phases and in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vdtrain.config.schema import PlanConfig, RatesConfig
from vdtrain.planning.memory import StagePlan, plan_stage
from vdtrain.planning.rates import phase_rates
from vdtrain.planning.speed import StepTime, step_time

LEFT_OUT_OF_TIMES = "waits for data, samples, validation, checkpoints, restarts"


@dataclass(frozen=True)
class Bill:
    """What a stage takes.

    Attributes:
        times: of each phase; empty if a rate is not known.
        rates: of each phase, and where they come from.
        price: of a GPU hour; None if it is not known.
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
        return {**self.plan.to_dict(), "times": times or unknown, "rates": rates, **sums([self])}


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
