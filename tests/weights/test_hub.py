"""Downloads at a pinned commit, by the real client against a small server that answers as the hub does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.hub import Hub
from tests.programs import program
from tests.weights.test_frozen_sources import settings
from tests.weights.test_tokenizer_files import asset
from vdtrain.models.frozen_weights import ASSETS, WeightsError
from vdtrain.weights.hub import fetched, needed

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIP = (ASSETS / "tiny" / "clip.safetensors").read_bytes()
FILES = {
    "tokenizer.json": asset("bert").read_bytes(),
    "clip/model.safetensors": CLIP,
    "clip/model.fp16.safetensors": b"a variant",
    "clip/pytorch_model.bin": b"the same again",
    "clip/config.json": b"{}",
    "README.md": b"words",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """One repository, org/repo at COMMIT."""
    for name, content in FILES.items():
        file = tmp_path / "hub" / "org/repo" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    with Hub(tmp_path / "hub", {"org/repo": COMMIT}) as running:
        yield running


# Fetches each address in turn, then imports one by the command: a line of standard output each.
SCRIPT = """
import sys
from vdtrain.cli import main
from vdtrain.models.frozen_weights import WeightsError
from vdtrain.weights.hub import fetched

count = int(sys.argv[1])
for address in sys.argv[2 : 2 + count]:
    try:
        print(fetched(address, ()))
    except WeightsError as error:
        print("error:", error)
if sys.argv[2 + count :]:
    sys.exit(main(sys.argv[2 + count :]))
"""


def run(endpoint: str, folder: Path, addresses: list[str], *command: str, **more: str) -> list[str]:
    """Lines of standard output, from a process whose client talks to `endpoint`."""
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    environment = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")} | own
    arguments = [program("python"), "-c", SCRIPT, str(len(addresses)), *addresses, *command]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_real_client(hub: Hub, tmp_path: Path) -> None:
    folder, file, absent, other, empty, text = (
        f"hf:org/{name}@{COMMIT}"
        for name in ("repo/clip", "repo/tokenizer.json", "repo/absent.safetensors", "other", "repo/none", "repo/words")
    )
    command = ["weights", "import", "clip", folder, *settings(tmp_path)]
    lines = run(hub.address, tmp_path, [folder, file, absent, other, empty], *command)
    assert (Path(lines[0]) / "model.safetensors").read_bytes() == CLIP
    assert sorted(path.name for path in Path(lines[0]).iterdir()) == ["config.json", "model.safetensors"]
    assert Path(lines[1]).read_bytes() == FILES["tokenizer.json"]
    remedy = "check the name and the network, or fetch it elsewhere and give the local path"
    for line, address in zip(lines[2:4], (absent, other), strict=True):
        assert line.startswith(f"error: path={address}: cannot be fetched (")
        assert line.endswith(remedy)
    assert "holds no weights" in lines[4]
    assert lines[5].startswith(str(tmp_path / "clip.safetensors"))
    assert load_file(tmp_path / "clip.safetensors").keys() == load_file(ASSETS / "tiny" / "clip.safetensors").keys()
    # Without a network what is in the cache is found, and the rest is one line.
    cached = f"hf:org/repo/clip/model.safetensors@{COMMIT}"
    lines = run("http://127.0.0.1:9", tmp_path, [cached, text, folder], HF_HUB_OFFLINE="1")
    assert Path(lines[0]).read_bytes() == CLIP
    for line in lines[1:]:
        assert line.startswith("error: path=hf:org/repo/")
        assert line.endswith(remedy)


@pytest.mark.parametrize(
    "address",
    [
        "hf:org/repo@main",
        "hf:org/repo/file.pth",
        f"hf:org@{COMMIT}",
        f"hf:org/repo@{COMMIT[:-1]}",
        f"hf:o/../r@{COMMIT}",
    ],
)
def test_what_is_not_pinned_is_refused(address: str) -> None:
    with pytest.raises(WeightsError, match="pin a commit"):
        fetched(address, ())


def test_a_local_path_is_taken_as_it_is(tmp_path: Path) -> None:
    assert fetched(str(tmp_path), ()) == tmp_path
    with pytest.raises(WeightsError, match=r"path=.*absent: no such file or folder"):
        fetched(str(tmp_path / "absent"), ())


def test_one_kind_of_weights_a_folder_is_fetched() -> None:
    files = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "sd-v1-4.ckpt",
    ]
    assert needed(files, ("unet",)) == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert needed(files, ("vae",)) == ["vae/diffusion_pytorch_model.bin"]
    assert needed(["vocab.json", "merges.txt", "model.safetensors"], ("vocab.json", "merges.txt")) == [
        "vocab.json",
        "merges.txt",
    ]
    assert "sd-v1-4.ckpt" in needed(files, ())
    variants = ["unet/model.fp16-00001-of-00002.safetensors", "unet/model.fp16-00002-of-00002.safetensors"]
    index = "unet/model.safetensors.index.fp16.json"
    assert needed([*variants, index, "unet/model.fp16.bin"], ("unet",)) == [index, *variants]


def test_a_repository_in_the_cache(tmp_path: Path) -> None:
    first = tmp_path / "snapshots" / COMMIT
    first.mkdir(parents=True)
    assert fetched(str(tmp_path), ()) == tmp_path
    (tmp_path / "blobs").mkdir()
    assert fetched(str(tmp_path), ()) == first
    (tmp_path / "snapshots" / COMMIT[::-1]).mkdir()
    with pytest.raises(WeightsError, match=r"a cache with 2 commits \(0123.*give one, snapshots/COMMIT"):
        fetched(str(tmp_path), ())
