"""A dry run: a stage's networks process one micro-batch of tensors without values, which measures its memory.

The networks, the objective and the operators are the real ones; the tensors are those of PyTorch's FakeTensorMode. They
are on the CPU, whose fused attention keeps the same tensors for the backward pass as the GPU's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdtrain.config.schema import ModelConfig, TrainConfig
from vdtrain.config.validation import stage_flows
from vdtrain.data.latents import MODALITY
from vdtrain.diffusion.objective import Objective, StepRandom
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import active_groups
from vdtrain.models.diffuser import Diffuser, DiffuserInput
from vdtrain.models.execution import checkpoint_activations
from vdtrain.models.frozen import Encoded, build_frozen
from vdtrain.models.frozen_weights import WeightsError, locate, without_weights
from vdtrain.models.trained import trained_parameters
from vdtrain.tracking.speed import OperatorCount


class LiveMemory(TorchDispatchMode):
    """`with LiveMemory() as memory:` counts every storage that an operator creates inside, once, until it is freed.

    It counts neither older storages nor a kernel's internal buffers.

    Attributes:
        now: bytes alive.
        peak: largest value of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # An output that shares an argument's storage is not new.
        self._count((args, kwargs), new=False)
        out = func(*args, **(kwargs or {}))
        self._count(out, new=True)
        return out

    def _count(self, tensors: Any, new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self._sizes:
                continue
            self._sizes[id(storage)] = storage.nbytes() if new else 0
            weakref.finalize(storage, self._release, id(storage))
            self.now += self._sizes[id(storage)]
            self.peak = max(self.peak, self.now)

    def _release(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


# Vocabularies for networks without values or with random ones; every one of their ids is in a larger vocabulary too.
STAND_INS = {
    "encoder_tokenizer": "asset:tiny/encoder_tokenizer.json",
    "decoder_tokenizer": "asset:tiny/decoder_tokenizer.json",
}
# Longer than the part of a caption that any text encoder keeps.
LONG_CAPTION = "a word " * 200


@dataclass(frozen=True)
class MicroBatchMemory:
    """The memory of one micro-batch in bytes, beyond the memory that stays between steps, and its operations.

    Attributes:
        encoding: peak of the frozen parts.
        kept: bytes that the forward pass keeps for the backward pass.
        peak: of the forward and backward passes, with `kept` and the gradient of one parameter at a time.
        flops: floating-point operations of encoding, forward and backward; see `OperatorCount`.
        encoding_flops: those of encoding alone.
    """

    encoding: int
    kept: int
    peak: int
    flops: int
    encoding_flops: int


class DryRun:
    """The diffuser with the layers that a stage trains, and the frozen parts, all without memory.

    Attributes:
        diffuser: has its parameters in the compute dtype; those that the stage does not train get no gradient.
        frozen_bytes, frozen_parameters: of the frozen parts, in the compute dtype.
        unmeasured: setting names of the frozen parts whose encoding was not measured.

    Raises:
        ConfigError: a `_target_` or one of its arguments does not exist.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.unmeasured: set[str] = set()
        self._measured: dict[tuple[int, int], MicroBatchMemory] = {}
        self._mode = FakeTensorMode()
        self._dtype = torch.bfloat16 if config.hardware.precision == "bf16" else torch.float32
        flows = stage_flows(config)
        diffuser = meta_diffuser(config)
        with torch.device("meta"), without_weights():
            frozen = build_frozen(with_stand_ins(config.model))
        self.frozen_parameters = sum(parameter.numel() for parameter in frozen.parameters())
        with self._mode:
            self.diffuser, self.frozen = _fake(diffuser, self._dtype), _fake(frozen, self._dtype)
            self._objective = Objective(flows, Schedule(config.model.schedule), self.frozen, config.objective)
        self.frozen_bytes = tensor_bytes(self.frozen)
        checkpoint_activations(self.diffuser, config.hardware.activation_checkpointing)
        for parameter in self.diffuser.parameters():
            if parameter.requires_grad:
                # The memory that stays between steps already counts the gradients.
                parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def measure(self, resolution: int, micro_batch: int) -> MicroBatchMemory:
        """Measure encoding, the losses of all flows, and backward of one micro-batch; each size is measured once."""
        if (resolution, micro_batch) not in self._measured:
            self._measured[resolution, micro_batch] = self._measure(resolution, micro_batch)
        return self._measured[resolution, micro_batch]

    def _measure(self, resolution: int, micro_batch: int) -> MicroBatchMemory:
        # The search for the largest micro-batch also looks beyond the batch.
        batch = max(self.config.stage.global_batch_size, micro_batch)
        rng = StepRandom("dry run", 0, batch, slice(0, micro_batch), torch.device("cpu"))
        count = OperatorCount()

        def denoise(inputs: Sequence[DiffuserInput]) -> list[Tensor]:
            # Unconditional contexts, which are encoded once in a run, are outside.
            with count:
                predicted: list[Tensor] = self.diffuser(inputs)
            return predicted

        with self._mode:
            with count:
                encoding = self._encoding(resolution, micro_batch)
            encoding_flops = count.flops
            encoded = self.encoded(resolution, micro_batch)
            with LiveMemory() as memory:
                total = self._objective.total(self._objective.losses(denoise, encoded, rng))
                kept = memory.now
                with count:
                    total.backward()
        return MicroBatchMemory(encoding, kept, memory.peak, count.flops, encoding_flops)

    def encoded(self, resolution: int, rows: int) -> Encoded:
        """Latents and contexts of `rows` pairs, without values."""
        size = (resolution, resolution)
        with self._mode:
            latents = {name: self.frozen.latent_shape(name, size) for name in self._objective.outputs}
            contexts = {flow.context: self.frozen.unconditional(flow, 1) for flow in stage_flows(self.config)}
            return Encoded(
                {name: torch.empty(rows, *shape, dtype=self._dtype) for name, shape in latents.items()},
                {name: torch.empty(rows, *tokens.shape[1:], dtype=self._dtype) for name, tokens in contexts.items()},
            )

    def _encoding(self, resolution: int, rows: int) -> int:
        """The largest peak of the frozen parts, which run one after another."""
        # As from `vdtrain.data.stream.PairStream`; those of other streams are unknown.
        images = torch.empty(rows, 3, resolution, resolution, dtype=torch.uint8)
        samples: dict[str, Any] = {"image": images, "text": [LONG_CAPTION] * rows}
        cached = {MODALITY} if self.config.data.latents == "cached" else set()
        peak = 0
        for kind, parts, names in (
            ("vae", self.frozen.vaes, self._objective.outputs - cached),
            ("context_encoder", self.frozen.context_encoders, self._objective.contexts),
        ):
            for name in sorted(names):
                setting = f"model.modalities.{name}.{kind}"
                part: Any = parts[name]
                # A part without its tokenizer raises ValueError for captions.
                with LiveMemory() as memory, torch.no_grad(), suppress(ValueError):
                    if name in samples:
                        part.encode(samples[name])
                        peak = max(peak, memory.peak)
                        continue
                self.unmeasured.add(setting)
        return peak


def meta_diffuser(config: TrainConfig) -> Diffuser:
    """A stage's diffuser without memory; those of its parameters that the stage does not train get no gradient."""
    with torch.device("meta"), without_weights():
        diffuser = Diffuser(config.model, active_groups(stage_flows(config)))
        trained_parameters(diffuser, config)
    return diffuser


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; shared ones count once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def with_stand_ins(config: ModelConfig) -> ModelConfig:
    """The model with the package's own small vocabularies for missing ones of the text VAE, and without other ones."""

    def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: STAND_INS.get(key) if _is_missing_file(value) else value for key, value in arguments.items()}
        return {key: value for key, value in kept.items() if value is not None or arguments[key] is None}

    modalities = {
        name: replace(modality, vae=given(modality.vae), context_encoder=given(modality.context_encoder))
        for name, modality in config.modalities.items()
    }
    return replace(config, modalities=modalities)


def _is_missing_file(value: object) -> bool:
    if not isinstance(value, str) or not value.endswith(".json"):
        return False
    try:
        locate(value, "")
    except WeightsError:
        return True
    return False


def _fake(module: nn.Module, dtype: torch.dtype) -> Any:
    """A meta module with its tensors replaced by fake ones: shared ones stay shared, and floats get `dtype`."""
    made: dict[int, Tensor] = {}
    for child in module.modules():
        own: list[tuple[str, Tensor]] = [
            *child.named_parameters(recurse=False, remove_duplicate=False),
            *child.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name, tensor in own:
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            setattr(child, name, made[id(tensor)])
    return module


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
