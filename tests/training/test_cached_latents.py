"""A run on cached latents is the run that encodes its centre crops, but for their rounding.

Half a minute on two free cores, most of it imports.
"""

from __future__ import annotations

from pathlib import Path

from data_pipeline.__main__ import main
from tests.pairs import write_pairs
from tests.tiny_runs import HIGH, LOW, overrides
from tests.training.forks import Case, run_cases
from vdtrain.tracking.metrics import read_metrics

# Of a loss; a latent is rounded by 2^-11 of itself at most, and Adam's first steps are the same for any small change.
BOUND = 2e-3


def test_losses_are_those_of_inline_encoding(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    settings = [*overrides(tmp_path), f"data.latent_cache.folder={tmp_path}/latents", "stage=stage3_four_flow"]
    settings += ["stage.init_from=null"]
    shared = ["model=tiny", "data=shapes", "hardware=cpu"]
    places = [f"data.manifest={tmp_path}/data/manifest", f"data.latent_cache.folder={tmp_path}/latents"]
    assert main(["latents", *shared, *places]) == 0
    runs = {
        "inline": ["data.latents=inline", "data.stream.random_crop=false"],
        "cached": ["data.latents=cached"],
        "two": ["data.latents=cached", "hardware.micro_batch_size={32:2,64:2}"],
    }
    cases = [
        Case(2 if name == "two" else 1, [*settings, *more, f"run_dir={tmp_path}/{name}"]) for name, more in runs.items()
    ]
    for ending in run_cases(tmp_path / "cases", cases):
        assert set(ending.statuses) == {0}, ending.logs
    inline, cached, two = ([record["loss"] for record in read_metrics(tmp_path / name)] for name in runs)
    assert len(inline) == len(cached) == len(two) == LOW + HIGH
    # Not the same bits, so that the moments did come from the cache; and the flows to text have no part in it.
    assert inline != cached
    for step in range(LOW + HIGH):
        for flow, loss in inline[step].items():
            assert abs(cached[step][flow] - loss) <= BOUND * loss, (step, flow)
            assert abs(two[step][flow] - loss) <= BOUND * loss, (step, flow)
