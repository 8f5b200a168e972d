"""Model cards of exports, and `vdtrain weights push` as typed: the real client against a server that takes a push."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.programs import program
from tests.weights.hub_writes import TOKEN, WritableHub
from tests.weights.small import recorded, write_run
from vdtrain.cli import main
from vdtrain.weights.model_card import origin_of

COMMIT = "c0ffee" * 6 + "beef"
FIGURES = {"fid": 12.345, "clip_score": {"mean": 27.123, "standard_error": 0.045}}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with records of its starts and an evaluation of its checkpoint."""
    run = tmp_path_factory.mktemp("me") / "runs" / "stage3"
    config = recorded() | {"stage": {**recorded()["stage"], "name": "stage3_four_flow", "init_from": None}}
    config["model"] = {**config["model"], "base_weights": None}
    write_run(run, config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    start = {"kind": "start", "step": 0, "time": 1.0, "environment": {"commit": COMMIT}}
    (run / "restarts.jsonl").write_text(json.dumps(start) + "\n")
    checkpoint = run / "checkpoints" / "step-000000007"
    result = {
        "checkpoint": {"path": str(checkpoint), "weights": "ema"},
        "samples": 5000,
        "flows": {"text-to-image": FIGURES, "image-to-text": {"clip_score": FIGURES["clip_score"]}},
        "pairs": {},
    }
    (run / "evaluation").mkdir()
    (run / "evaluation" / "metrics.json").write_text(json.dumps(result))
    return run


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "my-vd"
    assert main(["weights", "export", "safetensors", str(output), str(run_folder)]) == 0
    return output


def head_and_body(path: Path) -> tuple[dict[str, Any], str]:
    _, head, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_tells_where_the_weights_come_from(run_folder: Path, exported: Path) -> None:
    head, body = head_and_body(exported / "README.md")
    assert head["library_name"] == "vdtrain"
    assert head["pipeline_tag"] == "text-to-image"
    assert {"versatile-diffusion", "image-to-text", "text-to-text"} <= set(head["tags"])
    # The run began at random, and no published weights are in it.
    assert head["license"] == "unknown"
    assert "vdtrain sample my-vd" in body
    row = next(line for line in body.splitlines() if line.startswith("| stage3_four_flow"))
    batch = recorded()["stage"]["global_batch_size"]
    for part in (f"{7 * batch:,}", f"7 of {batch:,}", "0.002", COMMIT[:12]):
        assert part in row, part
    assert "LAION-2B-en" in body
    assert "COYO-700M" in body
    assert "| flow | FID | CLIP score |" in body
    assert "| text-to-image | 12.345 | 27.12 ± 0.04 |" in body
    assert "5,000 samples of each flow, averaged weights" in body
    assert str(run_folder.parents[1]) not in body


def test_each_layout_has_its_card(run_folder: Path, exported: Path, tmp_path: Path) -> None:
    words = ["weights", "export", "versatile_diffusion", str(tmp_path / "my-vd.pth"), str(run_folder)]
    assert main(words) == 0
    head, body = head_and_body(tmp_path / "my-vd.README.md")
    assert "vdtrain weights import versatile_diffusion my-vd.pth" in body
    # What an export knows, an export of it knows too.
    words = ["weights", "export", "diffusers", str(tmp_path / "pipeline"), str(exported), "license=mit"]
    assert main(words) == 0
    head, body = head_and_body(tmp_path / "pipeline" / "README.md")
    assert (head["library_name"], head["license"]) == ("diffusers", "mit")
    assert "VersatileDiffusionPipeline.from_pretrained" in body
    assert COMMIT[:12] in body
    assert "12.345" in body


def test_stable_diffusions_licence_passes_on(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = Path("weights/stable_diffusion_v1")
    weights.parent.mkdir()
    assert main(["weights", "export", "safetensors", str(weights), str(exported)]) == 0
    (weights / "README.md").unlink()
    assert origin_of(str(weights)).start == "CompVis/stable-diffusion-v1-4"
    assert main(["weights", "export", "safetensors", "again", str(weights)]) == 0
    head, body = head_and_body(Path("again/README.md"))
    assert head["license"] == "creativeml-openrail-m"
    assert head["base_model"] == ["CompVis/stable-diffusion-v1-4"]
    for part in ("CreativeML OpenRAIL-M", "passes on", "Attachment A", "Optimus", "CLIP"):
        assert part in body


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_every_file_of_an_export_has_the_mode_of_the_umask(run_folder: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        for layout, output in (("safetensors", "folder"), ("versatile_diffusion", "file.pth")):
            assert main(["weights", "export", layout, str(tmp_path / output), str(run_folder)]) == 0
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".yaml", ".json", ".md", ".pth"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    with WritableHub() as running:
        yield running


def push(endpoint: str, folder: Path, *words: str, token: str | None = TOKEN) -> tuple[int, str, str]:
    """`vdtrain weights push` in a process of its own, whose client talks to `endpoint`."""
    # The server speaks LFS, and not the client's newer protocol for large files.
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_TOKEN": token} if token else {}
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().endswith("_PROXY") and not key.startswith(("HF_", "HUGGING"))
    }
    command = [program("vdtrain"), "weights", "push", *words]
    done = subprocess.run(command, env=environment | own, capture_output=True, text=True, timeout=300, cwd=folder)
    return done.returncode, done.stdout, done.stderr


def test_a_push_sends_the_export_and_nothing_else(hub: WritableHub, exported: Path, tmp_path: Path) -> None:
    exported = shutil.copytree(exported, tmp_path / "my-vd")
    (exported / ".env").write_text("SECRET=1")
    (exported / "notes.log").write_text("mine")
    words = [str(exported), "repo=me/my-vd", "private=true"]
    status, said, _ = push(hub.address, tmp_path, *words, "dry_run=true")
    assert status == 0
    assert "nothing was sent" in said
    assert hub.requests == []
    status, said, errors = push(hub.address, tmp_path, *words)
    assert status == 0, errors
    repository = hub.repositories["me/my-vd"]
    assert repository.private
    assert repository.files.keys() == {"model.safetensors", "model.yaml", "weights.json", "README.md"}
    assert all(content == (exported / name).read_bytes() for name, content in repository.files.items())
    assert "left out: notes.log" in said
    assert "/me/my-vd/commit/" in said
    (tmp_path / "back.safetensors").write_bytes(repository.files["model.safetensors"])
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(exported / "model.safetensors").keys()
    # Large files are there already.
    sent = sum(request.startswith("PUT") for request in hub.requests)
    assert push(hub.address, tmp_path, *words)[::2] == (0, "")
    assert sum(request.startswith("PUT") for request in hub.requests) == sent
    hub.repositories["me/my-vd"].private = False
    status, _, errors = push(hub.address, tmp_path, *words)
    assert (status, len(errors.splitlines())) == (2, 1)
    assert "exists and is public" in errors


@pytest.mark.parametrize(
    ("repo", "token", "expected"),
    [
        ("me/my-vd", None, "no token of the hub; set HF_TOKEN"),
        ("me/my-vd", "hf_" + "x" * 34, "does not accept the token"),
        ("other/my-vd", TOKEN, "the token may not write there"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: WritableHub, exported: Path, tmp_path: Path, repo: str, token: str | None, expected: str
) -> None:
    status, said, errors = push(hub.address, tmp_path, str(exported), f"repo={repo}", token=token)
    assert (status, said, len(errors.splitlines())) == (2, "", 1), errors
    assert f"error: repo={repo}: " in errors
    assert expected in errors
    assert token is None or token not in errors
    assert not hub.repositories


def test_no_network_is_one_line(exported: Path, tmp_path: Path) -> None:
    status, _, errors = push("http://127.0.0.1:9", tmp_path, str(exported), "repo=me/my-vd")
    assert (status, len(errors.splitlines())) == (2, 1), errors
    assert "http://127.0.0.1:9 cannot be reached" in errors


def test_what_is_no_export_is_refused_before_anything_is_sent(
    run_folder: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["weights", "push", *words]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert len(shown.err.splitlines()) == 1
        return shown.err

    assert "name the repository" in refused(str(exported))
    assert "name the repository" in refused(str(exported), "repo=my-vd")
    assert "takes one export" in refused("a", "b", "repo=me/x")
    assert "no such folder" in refused(str(tmp_path / "none"), "repo=me/x")
    assert "not an export" in refused(str(run_folder), "repo=me/x")
    file = tmp_path / "my-vd.pth"
    file.write_bytes(b"PK\x03\x04")
    assert "file of PyTorch" in refused(str(file), "repo=me/x")
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    for name, content, expected in (
        ("more.bin", b"anything", "more.bin is a pickle"),
        ("innocent.txt", b"\x80\x04\x95", "innocent.txt is a pickle"),
        ("link.txt", secret, "link to a file outside"),
    ):
        extra = exported / name
        if isinstance(content, Path):
            extra.symlink_to(content)
        else:
            extra.write_bytes(content)
        try:
            assert expected in refused(str(exported), "repo=me/x")
        finally:
            extra.unlink()


def test_paths_of_this_machine_are_told(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vdtrain.weights.hub import local_paths

    assert local_paths(exported) == []
    (tmp_path / "model.yaml").write_text("vae:\n  weights: /home/me/vae.safetensors\n")
    (line,) = local_paths(tmp_path)
    assert "/home/me/vae.safetensors" in line
