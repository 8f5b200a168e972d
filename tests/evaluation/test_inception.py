"""FID's Inception: its network, its resize and its weights. 5 seconds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.inception import InceptionA

from vdtrain.config.compose import ConfigError
from vdtrain.evaluation import inception as module
from vdtrain.evaluation.inception import (
    InceptionFeatures,
    _average,
    _with_pool,
    find_weights,
    resize_like_tensorflow,
)


def fill(network: nn.Module) -> None:
    """Weights that any other implementation can be given too, scaled so that the signal keeps its size."""
    with torch.no_grad():
        for number, (name, value) in enumerate(sorted(network.state_dict().items())):
            if not value.is_floating_point():
                continue
            wave = irregular(value.numel(), number).view(value.shape)
            if value.ndim == 4:
                value.copy_(wave * (4 / value[0].numel()) ** 0.5)
            else:
                value.copy_(0.1 * wave + (1.0 if name.endswith(("running_var", "weight")) else 0.0))


def irregular(count: int, number: int) -> Tensor:
    """float64 [count] in -1..1 that no generator is needed for."""
    return torch.sin((torch.arange(count, dtype=torch.float64) % 10_007).square() * (0.37 + 0.01 * number))


def images() -> Tensor:
    """uint8 [2, 3, 40, 64]"""
    return (127.5 + 127.5 * irregular(2 * 3 * 40 * 64, 500)).to(torch.uint8).view(2, 3, 40, 64)


@pytest.fixture(scope="module")
def network() -> InceptionFeatures:
    made = InceptionFeatures(None)
    fill(made.network)
    return made


# Every 128th feature by torch-fidelity 0.4.0's extractor with the same weights; of single precision, on one processor.
PUBLIC = [0.645539, 0.129397, 0.078712, 0.0, 0.706221, 0.945957, 0.142152, 0.0]
PUBLIC += [0.0, 0.008126, 0.010249, 0.000426, 0.00494, 0.506341, 0.651209, 1.023716]


def test_features_are_those_of_a_public_implementation(network: InceptionFeatures) -> None:
    found = network(images())
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found[0, ::128], torch.tensor(PUBLIC), atol=2e-5, rtol=2e-5)


def test_a_mean_that_leaves_out_the_padding() -> None:
    torch.manual_seed(0)
    block = InceptionA(8, pool_features=4).eval()
    hidden = torch.randn(2, 8, 5, 6)
    inside = functional.avg_pool2d(torch.ones_like(hidden), 3, stride=1, padding=1)
    mean = functional.avg_pool2d(hidden, 3, stride=1, padding=1) / inside
    torch.testing.assert_close(_average(hidden), mean)
    with torch.no_grad():
        found, plain = _with_pool(block, hidden, _average), block(hidden)
        torch.testing.assert_close(found[:, -4:], block.branch_pool(mean))
    assert torch.equal(found[:, :-4], plain[:, :-4])
    assert not torch.allclose(found[:, -4:], plain[:, -4:])


def test_the_resize_has_no_half_pixel_centres() -> None:
    row = torch.tensor([0.0, 10.0, 20.0, 40.0])
    expected = torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 40.0])
    torch.testing.assert_close(resize_like_tensorflow(row.expand(1, 1, 4, 4), 8)[0, 0, 3], expected)
    torch.testing.assert_close(resize_like_tensorflow(row[:, None].expand(1, 1, 4, 3), 8)[0, 0, :, 2], expected)
    # Shrinking takes points and no means.
    torch.testing.assert_close(resize_like_tensorflow(row.expand(1, 1, 4, 4), 2)[0, 0, 0], torch.tensor([0.0, 20.0]))


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_weights_come_from_either_form(network: InceptionFeatures, form: str, tmp_path: Path) -> None:
    """With a classifier, and without the counts of batches, as the published file has them."""
    state = {key: value for key, value in network.network.state_dict().items() if not key.endswith("tracked")}
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path / f"inception.{form}"
    torch.save(state, path) if form == "pth" else save_file(state, path)
    loaded = InceptionFeatures(str(path)).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items() if not key.startswith("fc."))


def test_other_weights_are_one_line(network: InceptionFeatures, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    state = dict(network.network.state_dict())
    for change, message in (
        ({"Mixed_7c.branch1x1.conv.weight": torch.zeros(1)}, r"shape Mixed_7c\.branch1x1\.conv\.weight \[1\]"),
        ({"AuxLogits.fc.weight": torch.zeros(1)}, r"unexpected AuxLogits\.fc\.weight"),
    ):
        save_file(state | change, path)
        with pytest.raises(ConfigError, match=f"fid.weights=.*weights of another network: {message}.*pt_inception"):
            InceptionFeatures(str(path))
    with pytest.raises(ConfigError, match=r"fid\.weights=nowhere\.pth: no such file"):
        InceptionFeatures("nowhere.pth")


def test_weights_of_the_hub_are_found_or_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What pytorch-fid or torch-fidelity fetched is taken; else it is fetched once, and its checksum compared."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    ways = r"; fetch https://\S+ and name the file, or write fid\.weights=hub, or fid\.weights=hf:ORG/REPO/FILE@COMMIT$"
    source = tmp_path / "published.pth"
    monkeypatch.setattr(module, "SOURCE", source.as_uri())
    with pytest.raises(ConfigError, match=rf"^fid\.weights=hub: cannot be fetched to .*{ways}"):
        find_weights("hub")
    source.write_bytes(b"other content")
    with pytest.raises(ConfigError, match=rf"^fid\.weights=hub: .*invalid hash value.*{ways}"):
        find_weights("hub")
    monkeypatch.setattr(module, "PUBLISHED", hashlib.sha256(b"other content").hexdigest()[:8])
    found = find_weights("hub")
    assert found == tmp_path / "home" / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    source.unlink()
    assert find_weights("hub") == found
    other = found.with_name("weights-inception-2015-12-05-6726825d.pth")
    found.rename(other)
    assert find_weights("hub") == other
    with pytest.raises(ConfigError, match=rf"^fid\.weights=nowhere\.pth: no such file{ways}"):
        find_weights("nowhere.pth")
    with pytest.raises(ConfigError, match=r"^fid\.weights=hf:a/b/c\.pth@main: not of the form hf:ORG/REPO"):
        find_weights("hf:a/b/c.pth@main")
