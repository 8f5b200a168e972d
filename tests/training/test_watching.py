"""Samples and validation while training: what they show, that they change no bit of it, and that none is lost.

One start of two processes trains with looks and without them, for `make test-slow` under every strategy. Another set
of starts is killed and stopped on its way.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.cases import with_slow
from tests.pairs import write_pairs
from tests.programs import program
from tests.settings import TINY, phases
from tests.training.forks import Case, run_cases
from vdtrain.checkpoint.format import Index
from vdtrain.commands.train import main
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.data.manifest import SHARDS_FILE
from vdtrain.data.order import Split
from vdtrain.data.stream import PairStream
from vdtrain.run import distributed
from vdtrain.tracking.metrics import METRICS_FILE, read_lines, read_metrics
from vdtrain.training.build import build_trainer
from vdtrain.training.start import resolve_start
from vdtrain.training.watching import Clock, Moments

BATCH, LOW, HIGH, EVERY = 4, 5, 3, 8
# Training samples of the looks: the start, every second step, the ends of both phases.
LOOKS = [0, 8, 16, 20, 24, 32]
FLOWS = ("image-to-image", "text-to-image", "image-to-text", "text-to-text")
PAIRS = 3
MINIATURE = [
    *TINY,
    "stage=stage3_four_flow",
    "stage.init_from=null",
    f"stage.global_batch_size={BATCH}",
    "hardware.micro_batch_size={32:2,64:2}",
    phases(BATCH, (32, LOW), (64, HIGH)),
    "optimizer.warmup_samples=0",
    "log_every_steps=1",
    "checkpoint.every_steps=3",
    "checkpoint.keep=9",
    "data.validation.share=0.2",
    "watchdog_seconds=120",
]
WATCHED = [
    f"samples.every={EVERY}",
    "samples.time_share=null",
    "samples.count=2",
    "samples.steps=2",
    f"validation.every={EVERY}",
    "validation.time_share=null",
    f"validation.pairs={PAIRS}",
]
WAYS: dict[str, list[str]] = {"deepspeed": []}
# For `make test-slow`.
MORE_WAYS = {
    "replicated": ["hardware.zero_stage=0"],
    "sharded_bf16": ["hardware.exchange=sharded", "hardware.precision=bf16"],
    "zero2": ["hardware.zero_stage=2"],
    "sharded": ["hardware.exchange=sharded"],
    "deepspeed_bf16": ["hardware.precision=bf16"],
    "compiled": ["hardware.compile=blocks", "hardware.micro_batch_size={32:1,64:1}"],
}


def train(folder: Path, run: str, *overrides: str) -> list[int]:
    """Train in this process; the global random state afterwards."""
    document = compose(
        "train", [*MINIATURE, f"data.manifest={folder}/data/manifest", f"run_dir={folder}/{run}", *overrides]
    )
    config = to_object(document, TrainConfig)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    rank, world = distributed.rank(), distributed.world_size()
    place = distributed.RankInfo(rank, rank, world, torch.device("cpu"))
    trainer = build_trainer(config, document, resolve_start(config, document), place)
    torch.manual_seed(7)
    assert trainer.run()
    state: list[int] = torch.random.get_rng_state().tolist()
    return state


def with_and_without(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    compare(folder, WAYS, report)


def with_and_without_in_more_ways(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    compare(folder, MORE_WAYS, report)


def compare(folder: Path, ways: dict[str, list[str]], report: Callable[[dict[str, Any]], None]) -> None:
    same = {}
    for way, overrides in ways.items():
        same[way] = train(folder, f"plain-{way}", *overrides) == train(folder, f"watched-{way}", *overrides, *WATCHED)
    report(same)


def alone(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    train(folder, "alone", *WATCHED, "ema.enabled=false")
    report({})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_on_ranks: Any) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("watching")
    write_pairs(folder / "data", count=20)
    (same, _) = run_on_ranks(with_and_without, 2, folder)
    run_on_ranks(alone, 1, folder)
    return folder, same


def read_validation(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run) if "validation" in line]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def shards_of(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint."""
    files = sorted(newest(run).glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def figures(run: Path) -> list[dict[str, Any]]:
    """The validations of a run, without times."""
    records = read_validation(run)
    return [
        {key: value for key, value in each.items() if key not in ("time", "validation_seconds")} for each in records
    ]


def told(run: Path) -> dict[str, Any]:
    """What stands beside the grids, without times."""
    found = {}
    for file in sorted((run / "samples").glob("*/*.json")):
        content = json.loads(file.read_text())
        del content["seconds"]
        found[f"{file.parent.name}/{file.stem}"] = content
    return found


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_to_the_bit_with_and_without_looks(runs: tuple[Path, dict[str, Any]], way: str) -> None:
    assert runs[1][way]
    check_same(runs[0], way)


@pytest.mark.slow
def test_training_is_the_same_to_the_bit_in_more_ways(tmp_path: Path, run_on_ranks: Any) -> None:
    write_pairs(tmp_path / "data", count=20)
    (same, _) = run_on_ranks(with_and_without_in_more_ways, 2, tmp_path)
    assert all(same.values())
    for way in MORE_WAYS:
        check_same(tmp_path, way)


def check_same(folder: Path, way: str) -> None:
    plain, watched = folder / f"plain-{way}", folder / f"watched-{way}"
    expected, found = shards_of(plain), shards_of(watched)
    assert expected.keys() == found.keys()
    assert {name.rpartition("/")[2] for name in found} >= {"master", "exp_avg", "exp_avg_sq", "ema"}
    # Two compiled runs without looks are equal to the bit; looks round them otherwise, which docs/watching.md says.
    bound = {"atol": 2e-6, "rtol": 1e-5} if way == "compiled" else {"atol": 0.0, "rtol": 0.0}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **bound, msg=name)
    one, other = Index.read(newest(plain)), Index.read(newest(watched))
    assert (one.optimizer_steps, one.ema_updates, one.trainer["state"]) == (
        other.optimizer_steps,
        other.ema_updates,
        other.trainer["state"],
    )
    losses = [
        [(each["step"], *each["loss"].values(), each["gradient_norm"]) for each in read_metrics(run)]
        for run in (plain, watched)
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), **bound)
    assert not (plain / "samples").exists()
    assert read_validation(plain) == []


def test_every_flow_has_a_grid_and_a_loss_at_every_look(runs: tuple[Path, dict[str, Any]]) -> None:
    run = runs[0] / "watched-deepspeed"
    assert [record["samples"] for record in read_validation(run)] == LOOKS
    assert sorted(told(run)) == sorted(f"{samples:010d}/{flow}" for samples in LOOKS for flow in FLOWS)
    for name, content in told(run).items():
        with Image.open(run / "samples" / f"{name}.png") as image:
            assert image.width > 2 * 192
            assert np.asarray(image).std() > 0
        assert content["resolution"] == (32 if content["samples"] <= LOW * BATCH else 64)
        assert len(content["given"]) == 2
        assert (content["made"] is None) == name.endswith("image")
        assert content["weights"] == "ema"
    one = read_validation(run)[2]
    for flow in FLOWS:
        for weights in ("model", "ema"):
            quarters = one["validation_quarters"][flow][weights]
            assert list(quarters) == ["q1", "q2", "q3", "q4"]
            assert one["validation"][flow][weights] == pytest.approx(np.mean(list(quarters.values())), rel=1e-12)
        assert one["validation"][flow]["model"] != one["validation"][flow]["ema"]
    # The average begins at the weights.
    first = read_validation(run)[0]["validation"]["text-to-image"]
    assert first["model"] == first["ema"]


def test_one_process_sees_what_two_see(runs: tuple[Path, dict[str, Any]]) -> None:
    """Before training, when all weights are the same; without averaged weights there are those as trained."""
    one, two = runs[0] / "alone", runs[0] / "watched-deepspeed"
    expected, found = read_validation(one)[0], read_validation(two)[0]
    for flow in FLOWS:
        assert list(expected["validation"][flow]) == ["model"]
        assert found["validation"][flow]["model"] == pytest.approx(expected["validation"][flow]["model"], rel=1e-5)
        quarters = [each["validation_quarters"][flow]["model"] for each in (found, expected)]
        assert quarters[0] == pytest.approx(quarters[1], rel=1e-5)
    for flow in ("image-to-image", "text-to-image"):
        pictures = [np.asarray(Image.open(run / "samples" / f"{0:010d}" / f"{flow}.png"), int) for run in (one, two)]
        # Below the title, which names the weights.
        assert np.abs(pictures[0] - pictures[1])[100:].max() <= 2
    assert told(one)[f"{0:010d}/image-to-text"]["weights"] == "model"


# What befalls the run, and on which rank: killed twice, stopped once.
STOPS: list[dict[str, str | int]] = [
    {"what": "SIGKILL", "when": "batch", "number": 7, "rank": 1},
    {"what": "SIGTERM", "when": "batch", "number": 4, "rank": 0},
    {"what": "SIGKILL", "when": "write", "number": 1, "rank": 0},
]
SEVERAL = {"a kill": STOPS[:1], "kills and stops": STOPS}


@pytest.mark.parametrize("stops", with_slow(SEVERAL, ["a kill"]))
def test_after_kills_and_stops_no_look_is_missing_and_none_comes_twice(
    runs: tuple[Path, dict[str, Any]], stops: list[dict[str, str | int]]
) -> None:
    folder, name = runs[0], f"stopped-{len(stops)}"
    words = [*MINIATURE, *WATCHED, f"data.manifest={folder}/data/manifest", f"run_dir={folder}/{name}"]
    words += ["data.stream._target_=tests.training.trouble.DrillStream", f"+data.stream.diary={folder}/{name}-diary"]
    endings = run_cases(folder / f"{name}-cases", [Case(2, words, trouble) for trouble in (*stops, None)])
    expected_statuses = [[-9, 1] if stop["what"] == "SIGKILL" else [75, 75] for stop in stops]
    assert [sorted(ending.statuses) for ending in endings] == [*expected_statuses, [0, 0]], endings
    whole, broken = folder / "watched-deepspeed", folder / name
    assert told(broken) == told(whole)
    assert figures(broken) == figures(whole)
    for file in sorted((whole / "samples").glob("*/*.png")):
        assert (broken / file.relative_to(whole)).read_bytes() == file.read_bytes(), file
    assert not list((broken / "samples").glob("*incomplete*"))
    expected, found = shards_of(whole), shards_of(broken)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # One record of training and at most one validation to a step, in the file itself.
    lines = [json.loads(line) for line in (broken / METRICS_FILE).read_text().splitlines()]
    kinds = [(line["step"], kind) for line in lines for kind in ("loss", "validation") if kind in line]
    assert len(kinds) == len(set(kinds)) == LOW + HIGH + len(LOOKS)
    assert [record["step"] for record in read_metrics(broken)] == list(range(1, LOW + HIGH + 1))


def test_a_run_as_typed_its_status_and_its_evaluation(tmp_path: Path) -> None:
    """One process with its own prompts and scores, on a budget; evaluate then takes the pairs that were held out."""
    manifest = write_pairs(tmp_path / "data", count=20)
    run, words = tmp_path / "run", [f"data.manifest={tmp_path}/data/manifest", "data=shapes"]

    def typed(*arguments: str) -> str:
        done = subprocess.run([program("vdtrain"), *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    text = "ein gro\u00dfer Kreis, $5, \u03a9"
    settings = ["samples.every=4", "samples.time_share=1e-6", f'samples.prompts=["a red circle on white", "{text}"]']
    settings += [
        "samples.steps=2",
        "samples.count=2",
        "validation.every=8",
        "validation.pairs=3",
        "validation.scored=2",
    ]
    log = typed("train", *MINIATURE, *words, f"run_dir={run}", *settings, "validation.time_share=null")
    # The looks at the start and at the ends of phases are exempt from the budget.
    assert [int(folder.name) for folder in sorted((run / "samples").iterdir())] == [
        0,
        LOW * BATCH,
        (LOW + HIGH) * BATCH,
    ]
    assert "samples: none after 4 training samples, because the last took" in log
    assert "samples.time_share=1e-06 of the run's time; the next come every" in log
    assert told(run)[f"{0:010d}/text-to-image"]["given"] == ["a red circle on white", text]
    scores = read_validation(run)[-1]["validation_scores"]
    assert list(scores) == list(FLOWS)
    assert all(0 <= score["clip_score"] <= 100 for score in scores.values())
    assert {flow for flow, score in scores.items() if "clip_distance" in score} == {FLOWS[0], FLOWS[1]}
    assert f"step {LOW + HIGH:,} of {LOW + HIGH:,}" in typed("status", str(run))
    # Of the same data, only the held-out pairs are measured.
    held_out = len(PairStream(manifest, seed=0, resolution=32, global_batch_size=1, split=Split(0.2, True)))
    assert 2 < held_out < 20
    measured = ["evaluate", str(run), *words, "resolution=32", "steps=2", "part_samples=4", "flows=[text-to-text]"]
    text = typed(*measured, f"samples={held_out}", f"output_dir={tmp_path}/measured")
    assert "warning: data.validation.share: 0.2, as the checkpoint's run held out" in text
    one_more = [program("vdtrain"), *measured, f"samples={held_out + 1}", f"output_dir={tmp_path}/more"]
    refused = subprocess.run(one_more, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert f"has {held_out} held-out pairs; set samples={held_out}" in refused.stderr


def test_scores_that_one_process_cannot_make_keep_no_other_waiting(tmp_path: Path) -> None:
    """Process 0 alone reads the Inception weights, and they are damaged. The loss on held-out pairs needs them, too."""
    manifest, damaged = write_pairs(tmp_path / "data", count=20), tmp_path / "inception.pth"
    damaged.write_text("damaged")
    words = [*MINIATURE, *WATCHED, phases(BATCH, (32, LOW)), "watchdog_seconds=60", f"data.manifest={manifest}"]
    words += ["validation.scored=2", f"validation.fid_weights={damaged}", f"run_dir={tmp_path}/run"]
    (ending,) = run_cases(tmp_path / "cases", [Case(2, words)])
    assert ending.statuses == [0, 0], ending
    looks = [look for look in LOOKS if look <= LOW * BATCH]
    assert [int(each.name) for each in sorted((tmp_path / "run" / "samples").iterdir())] == looks
    assert ending.logs[0].count(f"(validation.fid_weights={damaged}: inception.pth is not") == len(looks), ending


def test_a_run_goes_on_though_its_earlier_looks_cannot_be_read(tmp_path: Path) -> None:
    manifest, run = write_pairs(tmp_path / "data", count=20), tmp_path / "run"
    (run / METRICS_FILE).mkdir(parents=True)
    words = [*MINIATURE, *WATCHED, phases(BATCH, (32, 2)), f"data.manifest={manifest}", f"run_dir={run}"]
    (ending,) = run_cases(tmp_path / "cases", [Case(1, words)])
    assert ending.statuses == [0], ending
    assert [int(each.name) for each in (run / "samples").iterdir()] == [2 * BATCH]
    assert f"{METRICS_FILE} is a folder, not a file" in ending.logs[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["samples.images=[gone.png]"], "error: samples.images: gone.png: cannot be read"),
        (["samples.steps=1001"], "error: samples.steps=1001: more than model.schedule.steps=1000; choose fewer"),
        (["samples.every=-1"], "error: samples.every=-1: must be at least 0"),
        (["samples.time_share=0"], "error: samples.time_share=0: must be above 0 and at most 1"),
        (["data.validation.share=1"], "error: data.validation.share=1: must be at least 0 and below 1"),
        (
            ["data.validation.share=null", "validation.every=4", "validation.scored=4"],
            "error: validation.scored=4: no pairs",
        ),
        (["validation.every=4", "validation.scored=1"], "error: validation.scored=1: a distance needs"),
        (["validation.fid_weights=gone.pth"], "error: validation.fid_weights=gone.pth: validation.scored=0 makes no"),
        (
            ["validation.every=4", "validation.scored=4", "validation.fid_weights=gone.pth"],
            "error: validation.fid_weights",
        ),
    ],
)
def test_a_mistaken_setting_is_one_line_before_anything_starts(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / SHARDS_FILE).touch()
    given = [*MINIATURE, "samples.every=4", f"data.manifest={tmp_path}/manifest", f"run_dir={tmp_path}/run", *words]
    assert main(given) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(line)
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_budget_keeps_to_its_share_of_the_time() -> None:
    moments = Moments(every=100, time_share=0.01, interval=100)
    moments.add(2.0)
    # A second for each training sample: a look of 2 s every 100 s would be two in a hundred.
    assert not moments.allows(100.0)
    assert moments.grow(100.0, 100)
    assert moments.interval == 200
    looks = [0]
    for samples in range(1, 10_001):
        if moments.reached(samples - 1, samples) and moments.allows(float(samples)):
            moments.add(2.0)
            looks.append(samples)
    assert looks[1] == 400
    assert moments.spent <= 0.01 * 10_000
    assert len(looks) > 40
    # Without a limit every moment is allowed.
    assert Moments(every=100, time_share=None, interval=100, spent=1e9, cost=1e9).allows(1.0)


def test_what_was_spent_is_remembered_over_starts(tmp_path: Path) -> None:
    moments, clock = Moments(every=8, time_share=0.5, interval=8), Clock(tmp_path)
    moments.add(3.0)
    moments.interval = 32
    clock.keep({"samples": moments})
    again, later = Moments(every=8, time_share=0.5, interval=8), Clock(tmp_path)
    later.restore("samples", again)
    assert again == moments
    assert later.ran >= clock._before
    # Another setting begins with its own interval.
    other = Moments(every=4, time_share=0.5, interval=4)
    later.restore("samples", other)
    assert (other.interval, other.spent) == (4, 3.0)
    for text in ("", "[]", "{", '{"ran": "x"}', '{"ran": 1, "looks": {"samples": {"every": []}}}'):
        (tmp_path / "watched.json").write_text(text)
        fresh = Moments(every=8, time_share=0.5, interval=8)
        Clock(tmp_path).restore("samples", fresh)
        assert fresh.interval == 8
