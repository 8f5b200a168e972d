"""Credentials planted wherever a person can have them; commands as typed; nothing that they print or write has one."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from tests.evaluation.test_evaluate import write_checkpoint
from tests.pairs import write_pairs
from tests.programs import program
from tests.ranges import Ranges
from tests.settings import TINY, phases
from vdtrain.flows import all_flows
from vdtrain.redaction import redacted, without_secrets

BATCH = 4
# Every secret has this word, and nothing else has.
PLANTED = "planted"
USER = "planteduser"
ENVIRONMENT = {
    "WANDB_API_KEY": "planted0123456789abcdef0123456789abcdef0",
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED123456789",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access/key",
    "AWS_SESSION_TOKEN": "plantedsession",
    "HTTPS_PROXY": f"http://{USER}:plantedproxy@127.0.0.1:9",
    "MY_STORE_PASSWORD": "plantedstore",
}


class Guarded(Ranges):
    """Serves a folder to those who know a password; all others are told what they sent."""

    def do_GET(self) -> None:  # noqa: N802
        sent = base64.b64decode((self.headers.get("Authorization") or "Basic ").partition(" ")[2]).decode()
        cast(Server, self.server).sent.append((self.path, sent))
        if sent.partition(":")[2] not in ("plantedpw", "plantedpw2", "plantednetrc"):
            self.send_response(403, f"no {sent} for {self.path}")
            self.end_headers()
        else:
            super().do_GET()

    do_HEAD = do_GET  # noqa: N815


class Server(ThreadingHTTPServer):
    """Attributes: sent: (path, user:password) of each request."""

    sent: list[tuple[str, str]]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that reads no further."""


class Place:
    """A folder, a server, and all that was printed."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server, self.printed = folder, server, ""

    def address(self, path: str, password: str = "plantedpw", query: str = "X-Amz-Signature=plantedsig") -> str:
        return f"http://{USER}:{password}@127.0.0.1:{self.server.server_address[1]}/{path}?{query}"

    def type(self, *words: str, python: str | None = None, **environment: str) -> tuple[int, str]:
        module = [] if words[0] == "-c" else ["-m"]
        own = {"HOME": str(self.folder / "home"), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [python or program("python"), *module, *words],
            cwd=self.folder,
            env={**os.environ, **ENVIRONMENT, **own, **environment},
            capture_output=True,
            text=True,
            timeout=570,
            check=False,
        )
        self.printed += done.stdout + done.stderr
        return done.returncode, done.stdout + done.stderr

    def train(
        self, run: str, steps: int, *words: str, python: str | None = None, **environment: str
    ) -> tuple[int, str]:
        return self.type(
            *["vdtrain", "train", *TINY, f"stage.global_batch_size={BATCH}"],
            *[f"hardware.micro_batch_size={{32:{BATCH}}}", phases(BATCH, (32, steps)), "optimizer.warmup_samples=0"],
            *["log_every_steps=1", f"run_dir={self.folder}/written/{run}", *words],
            python=python,
            **environment,
        )

    def found(self) -> list[str]:
        """Where a secret stands in what was written or printed."""
        files = [path for path in (self.folder / "written").rglob("*") if path.is_file() and not path.is_symlink()]
        texts = {str(path): path.read_bytes().decode("latin-1") for path in files} | {"printed": self.printed}
        return [
            f"{name}: {line}" for name, text in texts.items() for line in text.split("\n") if PLANTED in line.lower()
        ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    write_pairs(folder / "data", shards=2, count=12)
    for name in ("home", "written", "fsspec"):
        (folder / name).mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "image.png")
    with Server(("127.0.0.1", 0), partial(Guarded, directory=str(folder / "data"))) as server:
        server.sent = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Place(folder, server)
        server.shutdown()


def test_a_run_with_a_password_and_a_signature_in_its_address(place: Place) -> None:
    """Trained, resumed with a new password, sampled and evaluated."""
    stream = ["data.stream=webdataset", "data.stream.shuffle=8", f"data.manifest={place.folder}/none"]
    tracked = ["tracking=offline", "tracking.project=tests"]
    urls = place.address("shards/{000000..000001}.tar")
    status, said = place.train("run", 2, *stream, *tracked, f"data.urls={urls}")
    assert status == 0, said
    assert any("plantedsig" in path and sent.endswith("plantedpw") for path, sent in place.server.sent)
    run = place.folder / "written/run"
    assert list(run.rglob("*.wandb"))
    masked = f"http://127.0.0.1:{place.server.server_address[1]}/shards/{{000000..000001}}.tar?..."
    assert masked in (run / "config.yaml").read_text()
    assert any(masked in path.read_text() for path in run.rglob("checkpoint.json"))
    urls = place.address("shards/{000000..000001}.tar", "plantedpw2", "X-Amz-Signature=plantedsig2")
    status, said = place.train("run", 3, *stream, *tracked, f"data.urls={urls}")
    assert status == 0, said
    assert "continues from" in said
    assert not [line for line in said.splitlines() if "data.urls" in line and "until now" in line], said
    sampling = ["resolution=32", "steps=1", "threads=1"]
    assert place.type("vdtrain", "status", str(run))[0] == 0
    status, said = place.type(
        *["vdtrain", "sample", str(run), "flow=image-to-image", f"inputs=[{place.folder}/image.png]", *sampling],
        *["device=cpu", f"output_dir={place.folder}/written/samples"],
    )
    assert status == 0, said
    text = Image.open(place.folder / "written/samples/0000.png").info["vdtrain"]
    assert (json.loads(text)["inputs"], json.loads(text)["checkpoint"]) == (["image.png"], "run")
    assert str(place.folder) not in text
    write_checkpoint(place.folder / "model", all_flows(["image", "text"]))
    status, said = place.type(
        *[
            "vdtrain",
            "evaluate",
            f"{place.folder}/model",
            f"data.manifest={place.folder}/data/manifest",
            "flows=[text-to-text]",
        ],
        *["samples=2", "part_samples=2", "loader_workers=1", "device=cpu", *sampling],
        *[f"output_dir={place.folder}/written/evaluation"],
    )
    assert status == 0, said
    assert place.found() == []


@pytest.mark.slow
def test_a_server_that_refuses_is_named_without_what_was_sent(place: Place) -> None:
    wrong = place.address("shards/{000000..000001}.tar", "plantedwrong")
    status, said = place.train("refused", 2, "data.stream=webdataset", f"data.urls={wrong}", "tracking=none")
    assert (status != 0, "403" in said) == (True, True), said
    root = place.address("manifest", "plantedwrong").partition("?")[0]
    manifest = f"data.manifest={place.folder}/data/manifest"
    status, said = place.train("refused2", 2, manifest, f"data.stream.shard_root={root}", "tracking=none")
    assert status != 0, said
    status, said = place.type(
        *["vdtrain", "preflight", *TINY, manifest, f"data.stream.shard_root={root}", "tracking=none"],
        *[f"run_dir={place.folder}/written/refused3"],
    )
    assert status != 0, said
    broken = "import vdtrain.run.signals as s; s.begin(); raise RuntimeError({text!r})"
    headers = {"Authorization": "Basic cGxhbnRlZA==", "password": "planted"}
    place.type("-c", broken.format(text=f"GET {wrong} {headers} {ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}"))
    assert "RuntimeError: GET http://127.0.0.1" in place.printed
    assert "cGxhb" not in place.printed
    for command in ("index", "latents"):
        place.type("data_pipeline", command, "data=own", f"data.shards=[{wrong}]", f"data.root={place.folder}/written")
    for word in ("--cfg", "--resolve"):
        place.type(
            "vdtrain", "train", *TINY, f"data.urls={wrong}", "--cfg", "job", *([word] if word != "--cfg" else [])
        )
    place.type("vdtrain", "weights", "import", f"path={wrong}", f"output={place.folder}/written/weights")
    assert place.found() == []


@pytest.mark.slow
def test_credentials_from_a_netrc_file_and_from_the_environment(place: Place) -> None:
    """As docs/data.md says: nothing of them stands in a setting."""
    (place.folder / "home/.netrc").write_text(f"machine 127.0.0.1 login {USER} password plantednetrc\n")
    (place.folder / "home/.netrc").chmod(0o600)
    (place.folder / "fsspec/conf.json").write_text('{"http": {"client_kwargs": {"trust_env": true}}}')
    address = f"http://127.0.0.1:{place.server.server_address[1]}"
    names: dict[str, Any] = {"FSSPEC_CONFIG_DIR": str(place.folder / "fsspec"), "NO_PROXY": ""}
    manifest = [f"data.manifest={place.folder}/data/manifest", f"data.stream.shard_root={address}/manifest"]
    # fsspec reads its folder of settings when it is imported.
    status, said = place.train("netrc", 2, *manifest, "tracking=none", python=sys.executable, **names)
    assert status == 0, said
    assert any(sent == f"{USER}:plantednetrc" for _, sent in place.server.sent)
    assert place.found() == []


def test_what_is_no_secret_stays() -> None:
    for text in (
        "error: stage.phases: has 2 phases; token by token",
        "http://host:8000/a@b/c.tar and hf://datasets/u/r@main/x.tar",
        "path=hf:org/repo/model@0123: not of the form hf:ORG/REPO@COMMIT",
        "set WANDB_API_KEY, or run `wandb login`; git@host",
        "step 3 | loss 1.2 | lr 1e-4",
    ):
        assert without_secrets(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "https://me:pl@anted@host/x",
        "https://me:pl/planted@host/x",
        "https://me:pl#planted?x@host/x",
        "https://planted@host:80/x",
        "s3://KEY:planted/x@bucket/key",
        "proxy me:planted@host:3128 refused",
        "https://host/x?planted, y",
        "https://host/x?sig=a'planted",
        "https://host/x#access_token=planted",
        "Max retries exceeded with url: /x?planted (Caused by",
        "Invalid URL 'x?a=1&token=planted'",
        "{'Authorization': 'Basic planted12', 'b': 1}",
        '{"X-Api-Key": "planted"}',
        "<CIMultiDictProxy('Cookie': 'planted')>",
        "Authorization: Bearer planted",
        "BasicAuth(login='planted', password='planted', encoding='latin1')",
        "Credential=AKIA/planted, Signature=planted",
        "aws_secret_access_key = planted",
        "hf_plantedplantedplanted",
    ],
)
def test_forms_of_secrets(text: str) -> None:
    assert PLANTED not in without_secrets(text).replace("pl@anted", PLANTED)


def test_a_recorded_configuration_keeps_its_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plantedtoken")
    given = {
        "path": "/disk/a?b=c/x#y=z",
        "urls": ["s3://me:planted@bucket/{0..9}.tar?sig=planted", "${data.urls}"],
        "options": {"secret": "planted", "key": "x", "token": "${oc.env:TOKEN}", "password": None},
        "note": "plantedtoken",
        "steps": 3,
    }
    assert redacted(given) == {
        "path": "/disk/a?b=c/x#y=z",
        "urls": ["s3://bucket/{0..9}.tar?...", "${data.urls}"],
        "options": {"secret": "...", "key": "x", "token": "${oc.env:TOKEN}", "password": None},
        "note": "...",
        "steps": 3,
    }
