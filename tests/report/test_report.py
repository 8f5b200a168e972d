"""`vdtrain report`: the page of real runs, opened in Chromium and used; hostile and damaged folders; long runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.browser import Page, chromium
from tests.tiny_runs import BATCH, STEPS, TinyRuns
from vdtrain.cli import main
from vdtrain.report.curves import POINTS, sections
from vdtrain.run.restarts import read_events
from vdtrain.tracking.metrics import METRICS_FILE, read_metrics
from vdtrain.tracking.summary import CONFIG_FILE

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">{{ 7 * 7 }}"
FLOWS = ("image-to-image", "text-to-image")


def write_grids(run: Path, samples: int, shade: int) -> None:
    """Samples as a run writes them."""
    folder = run / "samples" / f"{samples:010d}"
    folder.mkdir(parents=True)
    for flow in FLOWS:
        Image.new("RGB", (400, 120), (shade, 80, 80)).save(folder / f"{flow}.png")
        (folder / f"{flow}.json").write_text(json.dumps({"given": [HOSTILE, "a red circle"], "made": None}))


@pytest.fixture(scope="module")
def runs(tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1, complete, and stage 2, stopped and killed; with grids, and an evaluation, and a stranger's setting."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    shutil.copytree(tiny_runs.folder / "runs", folder, symlinks=True)
    for number, run in enumerate(sorted(folder.iterdir())):
        for shade, samples in enumerate((0, BATCH * STEPS)):
            write_grids(run, samples, 60 + 60 * (2 * number + shade))
        config = (run / CONFIG_FILE).read_text()
        (run / CONFIG_FILE).write_text(config.replace(str(tiny_runs.folder / "runs"), str(folder)))
    last = max(folder.iterdir())
    config = yaml.safe_load((last / CONFIG_FILE).read_text())
    config["tracking"]["project"] = HOSTILE
    config["data"]["urls"] = "https://anna:plantedpw@example.org/x.tar?X-Amz-Signature=plantedsig"
    (last / CONFIG_FILE).write_text(yaml.safe_dump(config))
    evaluation = last / "evaluation"
    evaluation.mkdir()
    figures = {"fid": 12.5, "clip_score": {"mean": 31.25, "standard_error": 0.125}}
    result = {"checkpoint": {"path": HOSTILE}, "samples": 64, "flows": {"text-to-image": figures}, "pairs": {}}
    (evaluation / "metrics.json").write_text(json.dumps(result))
    validations = [
        {"step": step, "samples": step * BATCH, "validation": {"text-to-image": {"ema": loss}}}
        for step, loss in ((STEPS, 1.0), (STEPS, 0.75), (STEPS + 1, 0.5))
    ]
    with (last / METRICS_FILE).open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in validations) + '{"step": 99, "lo')
    return folder


@pytest.fixture(scope="module")
def report(runs: Path) -> Path:
    assert main(["report", str(runs / "stage2_dual_flow")]) == 0
    return runs / "stage2_dual_flow" / "report.html"


@pytest.fixture(scope="module")
def page(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def opened(page: Page, report: Path, **window: Any) -> Page:
    page.open(report.as_uri(), **window)
    assert page.problems == []
    assert page.requests == []
    return page


def data_of(report: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', report.read_text(), re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def text_of(page: Page, selector: str = "body") -> str:
    return str(page.run(f"document.querySelector({json.dumps(selector)}).innerText"))


# --- what the page says ----------------------------------------------------------------------------------------------


def test_a_curve_goes_over_the_whole_curriculum(report: Path, runs: Path) -> None:
    data = data_of(report)
    (losses,) = [section for section in data["sections"] if section["id"] == "losses"]
    chart = next(chart for chart in losses["charts"] if chart["title"] == "Training loss")
    assert [series["name"] for series in chart["series"]] == list(FLOWS)
    first, second = (read_metrics(runs / stage) for stage in ("stage1_single_flow", "stage2_dual_flow"))
    begin = BATCH * STEPS
    points = [
        (data["xs"][axis][place], value)
        for axis, values, low, high in chart["series"][0]["parts"]
        for place, value in enumerate(values)
    ]
    expected = [
        (before + record["samples"], pytest.approx(record["loss"]["image-to-image"], rel=1e-4))
        for before, records in ((0, first), (begin, second))
        for record in records
    ]
    assert points == expected
    assert [(mark["x"], mark["kind"]) for mark in data["marks"] if mark["kind"] == "stage"] == [
        (0, "stage"),
        (begin, "stage"),
    ]
    (restart,) = [mark for mark in data["marks"] if mark["kind"] == "restart"]
    assert restart["x"] == begin + BATCH * read_events(runs / "stage2_dual_flow")[1].step


def test_validations_have_curves_of_their_own(report: Path) -> None:
    data = data_of(report)
    (section,) = [section for section in data["sections"] if section["id"] == "validation"]
    (chart,) = section["charts"]
    assert chart["title"] == "Validation loss, averaged weights"
    ((axis, values, _low, _high),) = chart["series"][0]["parts"]
    assert (data["xs"][axis], values) == ([BATCH * 2 * STEPS, BATCH * (2 * STEPS + 1)], [0.75, 0.5])


def test_starts_changes_evaluations_and_environment_are_there(page: Page, report: Path, runs: Path) -> None:
    text = text_of(opened(page, report))
    starts = text[text.index("Starts and restarts") :]
    starts = starts[: starts.index("Evaluations")]
    assert starts.count("stage1_single_flow") == 1
    assert starts.count("stage2_dual_flow") == 2
    assert "data.stream.name: SIGUSR1 → SIGKILL; data.stream.at: 2 → 0" in starts
    assert "12.5" in text
    assert "31.25 ± 0.12" in text
    assert "Changed in stage2_dual_flow" in text
    environment = text[text.index("Environment") :]
    assert "torch" in environment
    assert "commit" in environment
    settings = page.run("[...document.querySelectorAll('details pre')].map(each => each.textContent)")
    assert len(settings) == 2
    assert yaml.safe_load(settings[0])["stage"]["name"] == "stage1_single_flow"


def test_a_folder_of_runs_is_the_same_curriculum(report: Path, runs: Path) -> None:
    stages = sorted(map(str, runs.glob("stage*")))
    for words in ([str(runs)], stages):
        output = runs.parent / "other.html"
        assert main(["report", *words, f"output={output}"]) == 0
        assert data_of(output)["sections"] == data_of(report)["sections"]


def test_runs_that_have_moved_are_found_beside_each_other(runs: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(runs, tmp_path / "moved", symlinks=True)
    config = moved / "stage2_dual_flow" / CONFIG_FILE
    config.write_text(config.read_text().replace(str(runs), "/gone/elsewhere"))
    assert main(["report", str(moved / "stage2_dual_flow")]) == 0
    stages = data_of(moved / "stage2_dual_flow" / "report.html")["stages"]
    assert [stage["name"] for stage in stages] == ["stage1_single_flow", "stage2_dual_flow"]


# --- how it is used --------------------------------------------------------------------------------------------------


def test_curves_are_read_by_pointer_and_keys_and_zoomed(page: Page, report: Path, runs: Path) -> None:
    opened(page, report)
    first = read_metrics(runs / "stage1_single_flow")
    box = page.run(
        "(() => { const box = document.querySelector('.chart svg').getBoundingClientRect();"
        "return [box.x, box.y, box.width, box.height]; })()"
    )
    page.mouse("mouseMoved", box[0] + 60, box[1] + box[3] / 2)
    assert f"{first[0]['loss']['image-to-image']:.4g}" in text_of(page, ".chart .readout")
    # Beside the pointer, and inside the chart.
    box_of = "document.querySelector('.chart {}').getBoundingClientRect()"
    corner = f"[{box_of}.x, {box_of}.y]".replace("{}", "{0}")
    place, cursor = (page.run(corner.format(each)) for each in (".readout", ".cursor"))
    assert place[0] - cursor[0] == pytest.approx(12, abs=3)
    assert box[1] < place[1] < box[1] + box[3]
    page.run("document.querySelector('.chart svg').focus()")
    page.press("Home")
    page.press("ArrowRight")
    shown = text_of(page, ".chart .readout")
    assert f"{first[1]['samples']} samples, stage1_single_flow" in shown
    assert f"{first[1]['loss']['image-to-image']:.4g}" in shown
    page.press("End")
    assert "stage2_dual_flow" in text_of(page, ".chart .readout")
    # A drag shows the part of all charts; the button shows everything again.
    page.mouse("mouseMoved", box[0] + box[2] * 0.3, box[1] + 100)
    page.mouse("mousePressed", box[0] + box[2] * 0.3, box[1] + 100)
    page.mouse("mouseMoved", box[0] + box[2] * 0.5, box[1] + 100)
    page.mouse("mouseReleased", box[0] + box[2] * 0.5, box[1] + 100)
    assert page.run("view.range[0] > 0 && view.range[1] < whole[1]")
    page.click("#unzoom")
    assert page.run("view.range") is None
    assert page.problems == []


def test_a_curve_can_be_hidden_and_smoothed_and_seen_on_a_log_scale(page: Page, report: Path) -> None:
    opened(page, report)
    count = "document.querySelectorAll('.chart svg')[0].querySelectorAll('path.k1').length"
    assert page.run(count) > 0
    page.click(".legend button:nth-child(2)")
    assert page.run(count) == 0
    line = "document.querySelector('.chart svg path[stroke-width]').getAttribute('d')"
    before = page.run(line)
    page.run("(() => { smoothing.value = 0; smoothing.oninput(); })()")
    raw = page.run(line)
    assert raw != before
    page.click("#log")
    assert page.run(line) != raw
    assert page.problems == []


def test_grids_are_walked_through(page: Page, report: Path) -> None:
    opened(page, report)
    source = "document.querySelector('.film > img').src"
    assert page.run("document.querySelectorAll('.film').length") == 2
    assert "stage2_dual_flow" in text_of(page, ".film p")
    last = page.run(source)
    assert last.startswith("data:image/webp")
    page.run("document.querySelector('.film input').focus()")
    page.press("Home")
    assert text_of(page, ".film p") == "0 samples, stage1_single_flow"
    assert page.run(source) != last
    page.click(".film .strip button:nth-child(2)")
    assert text_of(page, ".film p") == f"{BATCH * STEPS} samples, stage1_single_flow"
    size = "[document.querySelector('.film > img').naturalWidth, document.querySelector('.film > img').naturalHeight]"
    assert page.run(size) == [400, 120]


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, True), (1280, False)])
def test_it_fits_the_window_in_light_and_dark(page: Page, report: Path, tmp_path: Path, width: int, dark: bool) -> None:
    opened(page, report, width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    page.screenshot(tmp_path / "shot.png")
    with Image.open(tmp_path / "shot.png") as shot:
        paper = np.asarray(shot.convert("L"))[-1, 2]
    assert (paper < 60) == dark


# --- strangers, damage, length ---------------------------------------------------------------------------------------


def test_captions_and_settings_stay_text(page: Page, report: Path) -> None:
    opened(page, report)
    assert page.run("document.title") == "stage1_single_flow to stage2_dual_flow"
    texts = page.run("[...document.querySelectorAll('.film li')].map(each => each.textContent)")
    assert texts[0] == HOSTILE
    assert HOSTILE in page.run("document.body.textContent")
    assert page.run("document.querySelectorAll('script').length") == 2
    # The policy of the page itself would stop one that came through.
    page.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))"
    )
    assert page.run("document.title") == "stage1_single_flow to stage2_dual_flow"
    page.problems.clear()


def test_credentials_are_hidden(report: Path) -> None:
    text = report.read_text()
    assert "example.org" in text
    assert "plantedpw" not in text
    assert "plantedsig" not in text


def test_a_damaged_run_has_a_page_of_what_is_left(page: Page, runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "stage2_dual_flow", tmp_path / "run", symlinks=True))
    (run / CONFIG_FILE).write_text("{[")
    (run / "evaluation" / "metrics.json").write_text("[1, 2")
    (next((run / "samples").glob("*/text-to-image.png"))).write_bytes(b"no image")
    (run / METRICS_FILE).write_text(
        '{"step": 1}\nnull\n{"step": 4, "loss": {"a": 1.5}, "odd": {"b": 2}, "samples": 16}\n{"st'
    )
    assert main(["report", str(run)]) == 0
    text = text_of(opened(page, run / "report.html"))
    assert "no result of vdtrain evaluate" in text
    shutil.rmtree(run / "samples")
    for name in (METRICS_FILE, "restarts.jsonl"):
        (run / name).unlink()
    assert main(["report", str(run)]) == 0
    text = text_of(opened(page, run / "report.html"))
    assert "No figures have been written yet." in text
    assert "This run holds no samples" in text
    assert "No start has been recorded." in text


def test_no_nesting_ends_in_a_traceback(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (METRICS_FILE, "restarts.jsonl", "samples", "evaluation"):
        run = Path(shutil.copytree(runs / "stage2_dual_flow", tmp_path / name, symlinks=True))
        for levels in (30, 300, 900, 3000):
            deep = '{"a":' * levels + "1" + "}" * levels
            text = {
                METRICS_FILE: f'{{"step": 1, "loss": {{}}, "deep": {deep}}}',
                "restarts.jsonl": f'{{"kind": "start", "step": 1, "environment": {deep}}}',
                "samples": f'{{"given": [{deep}]}}',
                "evaluation": f'{{"flows": {{"a": {deep}}}}}',
            }[name]
            places = {"samples": next(run.glob("samples/*/*.json")), "evaluation": run / "evaluation/metrics.json"}
            places.get(name, run / name).write_text(text)
            status = main(["report", str(run), f"output={tmp_path}/page.html"])
            said = capsys.readouterr().err
            errors = [line for line in said.splitlines() if not line.startswith(("takes: ", "note: "))]
            assert len(errors) == (status != 0), said


def test_a_long_run_is_a_page_of_bounded_size(tmp_path: Path) -> None:
    """30 million samples with a line for each 300 of them; the largest value of a curve stays visible."""
    run = tmp_path / "run"
    run.mkdir()
    values = 1 + np.random.default_rng(0).random(100_000)
    values[77_777] = 40.0
    with (run / METRICS_FILE).open("w") as file:
        for step, value in enumerate(values.tolist(), start=1):
            record = {"step": step, "samples": 300 * step, "loss": dict.fromkeys(FLOWS, value), "memory_gb": 3}
            file.write(json.dumps(record) + "\n")
    for samples in range(0, 30_000_000, 1_000_000):
        folder = run / "samples" / str(samples)
        folder.mkdir(parents=True)
        noise = np.random.default_rng(samples).integers(0, 256, (150, 600, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "text-to-image.png")
    assert main(["report", str(run), "image_megabytes=0.5"]) == 0
    page = run / "report.html"
    assert page.stat().st_size < 7e5
    data = data_of(page)
    assert all(len(xs) <= POINTS for xs in data["xs"])
    ((_, means, low, high),) = data["sections"][0]["charts"][0]["series"][0]["parts"]
    assert max(high) == 40.0
    assert np.mean(means) == pytest.approx(values.mean(), rel=1e-3)
    assert min(low) == pytest.approx(values.min(), rel=1e-4)
    assert len(data["films"][0]["moments"]) > 2
    assert [data["films"][0]["moments"][place]["short"] for place in (0, -1)] == ["0", "29,000,000"]


def test_every_number_has_its_chart() -> None:
    record = {
        "step": 10,
        "samples": 40,
        "loss": {"text-to-image": 0.5},
        "loss_quarters": {"text-to-image": {"q1": 0.1, "q4": 0.9}},
        "learning_rate": 1e-4,
        "learning_rates": {"data.image": 1e-5},
        "gradient_norm": None,
        "validation": {"text-to-image": {"ema": 0.4}},
        "validation_quarters": {"text-to-image": {"ema": {"q2": 0.3}}},
        "validation_scores": {"text-to-image": {"clip_score": 30.0}},
        "skipped": 0,
        "failed_saves": 1,
        "news": {"of": {"later": 7}},
        "flag": True,
        "endless": float("inf"),
        "text": "1",
    }
    made, axes, remarks = sections([(100, [record])])
    found = {
        (section["id"], chart["title"], series["name"])
        for section in made
        for chart in section["charts"]
        for series in chart["series"]
    }
    assert found == {
        ("losses", "Training loss", "text-to-image"),
        ("losses", "Loss by quarter, text-to-image", "quarter 1"),
        ("losses", "Loss by quarter, text-to-image", "quarter 4"),
        ("validation", "Validation loss, averaged weights", "text-to-image"),
        ("validation", "Validation by quarter, text-to-image, averaged weights", "quarter 2"),
        ("validation", "Samples from held-out pairs, CLIP score", "text-to-image"),
        ("rates", "Learning rate", "base"),
        ("rates", "Learning rate", "data.image"),
        ("trouble", "Failed saves", "failed_saves"),
        ("other", "news, of", "later"),
    }
    assert axes == [[140]]
    assert remarks == ["None of these happened: skipped steps."]


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone"], "run_dirs=gone: does not exist; give the folder of a run, or of a curriculum's runs"),
        (["."], "run_dirs=.: holds no run and no folders of runs; give another folder"),
        (["run_dirs=[]"], "run_dirs: empty; give the folder of a run"),
        (["two"], "run_dirs=two: its runs belong to 2 curricula, of which these are the last; give one of them, or all "
         "runs of one in their order: two/a two/b"),
        (["two", "two/a"], "run_dirs=two: no run; give run folders in their order, or one folder of them"),
        (["two/a", "evaluations=[gone]"], "evaluations=gone: cannot be read (folder {here}/gone does not exist); mount "
         "its disk, or restore the folder"),
        (["two/a", "output=file/report.html"], "output=file/report.html: cannot be written ({here}/file is a "
         "file, not a folder); move {here}/file away, or choose another place"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "two" / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    assert main(["report", *words]) == 2
    assert capsys.readouterr().err == f"error: {said.replace('{here}', str(tmp_path))}\n"
