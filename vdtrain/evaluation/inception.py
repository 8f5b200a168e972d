"""The network that defines FID: TensorFlow's Inception of December 2015, up to its last pooling.

It differs from torchvision's Inception v3 in its weights and in the pooling of some blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.inception import Inception3  # type: ignore[import-untyped]

from vdtrain.errors import one_line
from vdtrain.models.frozen_weights import WeightsError, compare, device_and_dtype, freeze, locate
from vdtrain.weights.hub import PREFIX, fetched
from vdtrain.weights.tensor_files import open_tensors

WIDTH, SIDE = 2048, 299
CLASSES = 1008
# First digits of the published weights' SHA-256, also in the file's name.
PUBLISHED = "6726825d"
SOURCE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
HUB = "hub"
# What pytorch-fid and torch-fidelity leave in torch.hub's folder, with the same weights.
HUB_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
WAYS = f"fetch {SOURCE} and name the file, or write fid.weights={HUB}, or fid.weights=hf:ORG/REPO/FILE@COMMIT"

Pool = Callable[[Tensor], Tensor]


def _average(features: Tensor) -> Tensor:
    """A 3 x 3 mean over the places inside the image. torchvision's mean includes the padding."""
    return functional.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=False)


def _largest(features: Tensor) -> Tensor:
    return functional.max_pool2d(features, 3, stride=1, padding=1)


# torchvision's blocks in order, and the pooling before the last branch in place of torchvision's mean.
BLOCKS: tuple[tuple[str, Pool | None], ...] = (
    ("Conv2d_1a_3x3", None),
    ("Conv2d_2a_3x3", None),
    ("Conv2d_2b_3x3", None),
    ("maxpool1", None),
    ("Conv2d_3b_1x1", None),
    ("Conv2d_4a_3x3", None),
    ("maxpool2", None),
    ("Mixed_5b", _average),
    ("Mixed_5c", _average),
    ("Mixed_5d", _average),
    ("Mixed_6a", None),
    ("Mixed_6b", _average),
    ("Mixed_6c", _average),
    ("Mixed_6d", _average),
    ("Mixed_6e", _average),
    ("Mixed_7a", None),
    ("Mixed_7b", _average),
    ("Mixed_7c", _largest),
)


def find_weights(weights: str) -> Path:
    """The file of the weights that `fid.weights` names; what is not on this machine is fetched.

    Args:
        weights: a file; "hub" for the copy in torch.hub's folder, which pytorch-fid and torch-fidelity share; or an
            address hf:ORG/REPO/FILE@COMMIT of Hugging Face's hub.

    Raises:
        WeightsError: there is no such file, or it cannot be fetched.
    """
    setting = "fid.weights"
    if weights == HUB:
        folder = Path(torch.hub.get_dir(), "checkpoints")
        known = next((folder / name for name in HUB_FILES if (folder / name).is_file()), None)
        return known or _download(folder / HUB_FILES[0])
    if weights.startswith(PREFIX):
        try:
            return fetched(weights, ())
        except WeightsError as error:
            raise WeightsError(str(error).replace("path=", f"{setting}=", 1)) from error
    try:
        return locate(weights, setting)
    except WeightsError as error:
        raise WeightsError(f"{str(error).partition(';')[0]}; {WAYS}") from error


def _download(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(SOURCE, str(path), hash_prefix=PUBLISHED, progress=False)
    # Errors of the network, of the disk and of the checksum.
    except (OSError, RuntimeError) as error:
        reason = one_line(error)
        raise WeightsError(f"fid.weights={HUB}: cannot be fetched to {path} ({reason}); {WAYS}") from error
    return path


class InceptionFeatures(nn.Module):
    """Images uint8 [B, 3, H, W] to features float32 [B, 2048].

    Args:
        weights: the published state dict, or the same as safetensors; None gives random weights.

    Raises:
        WeightsError: the file is missing, damaged, or of another network.
    """

    def __init__(self, weights: str | None, setting: str = "fid.weights") -> None:
        super().__init__()
        self.network = Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)
        # The classifier is not used.
        self.network.fc = nn.Identity()
        if weights is not None:
            self._load(weights, setting)
        freeze(self)

    def _load(self, weights: str, setting: str) -> None:
        found = open_tensors(locate(weights, setting), setting)
        expected = {name: value for name, value in self.network.state_dict().items() if _is_weight(name)}
        state = {name: found[name] for name in found if _is_weight(name) and not name.startswith("fc.")}
        if differences := compare(expected, state):
            raise WeightsError(f"{setting}={weights}: weights of another network: {differences}; give {SOURCE}")
        self.network.load_state_dict(state, strict=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images, on the device of the weights. `scores.in_batches` runs it without TF32."""
        device, _ = device_and_dtype(self)
        hidden = (resize_like_tensorflow(images.to(device).float(), SIDE) - 128) / 128
        for name, pool in BLOCKS:
            block = self.network.get_submodule(name)
            hidden = block(hidden) if pool is None else _with_pool(block, hidden, pool)
        return hidden.mean(dim=(2, 3))


def _with_pool(block: nn.Module, hidden: Tensor, pool: Pool) -> Tensor:
    """A block whose last branch pools with `pool`."""
    outputs: Tensor = block(hidden)
    branch = block.get_submodule("branch_pool")(pool(hidden))
    return torch.cat([outputs[:, : -branch.shape[1]], branch], dim=1)


def _is_weight(name: str) -> bool:
    # Only some published files have the count of batches, and it is not used.
    return not name.endswith("num_batches_tracked")


def resize_like_tensorflow(images: Tensor, side: int) -> Tensor:
    """Resize [B, C, H, W] to [B, C, side, side] as TensorFlow 1: bilinear, no half-pixel centres, no antialiasing."""
    rows, columns = (_weights(length, side).to(images) for length in images.shape[-2:])
    return rows @ images @ columns.T


def _weights(length: int, side: int) -> Tensor:
    """The matrix float64 [side, length] of a linear resize."""
    places = torch.arange(side, dtype=torch.float64) * length / side
    lower = places.floor().long()
    upper = (lower + 1).clamp(max=length - 1)
    share = (places - lower)[:, None]
    rows = torch.eye(length, dtype=torch.float64)
    return rows[lower] * (1 - share) + rows[upper] * share
