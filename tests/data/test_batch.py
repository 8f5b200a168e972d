"""The memory of batches: two live batches never share it, and later batches reuse it."""

from __future__ import annotations

import gc

import pytest
import torch

from vdtrain.data.batch import BatchMemory

SHAPE = (4, 8, 8, 4)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch's own allocator keeps pinned memory")


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    memory = BatchMemory()
    first = memory.take(SHAPE, torch.uint8)
    place = first.data_ptr()
    second = memory.take(SHAPE, torch.uint8)
    assert second.data_ptr() != place
    del first
    gc.collect()
    assert memory.take(SHAPE, torch.uint8).data_ptr() == place


@pytest.mark.parametrize(
    "held",
    [
        lambda tensor: tensor[1:2],
        lambda tensor: tensor.permute(0, 3, 1, 2),
        lambda tensor: tensor.numpy()[2],
        lambda tensor: tensor.view(torch.float16).view(-1),
        lambda tensor: torch.from_dlpack(tensor),
        lambda tensor: tensor.untyped_storage(),
    ],
    ids=["slice", "permuted", "numpy", "other type", "dlpack", "storage"],
)
def test_whatever_shares_the_memory_keeps_it(held) -> None:
    memory = BatchMemory()
    tensor = memory.take(SHAPE, torch.uint8)
    place, kept = tensor.data_ptr(), held(tensor)
    del tensor
    gc.collect()
    assert memory.take(SHAPE, torch.uint8).data_ptr() != place
    del kept
    gc.collect()
    # The other tensor is freed too, so either memory may come first.
    assert place in {tensor.data_ptr() for tensor in [memory.take(SHAPE, torch.uint8) for _ in range(2)]}


def test_shapes_and_types_of_one_size_take_each_others_memory() -> None:
    memory = BatchMemory()
    place = memory.take((2, 16), torch.float16).data_ptr()
    gc.collect()
    tensor = memory.take((64,), torch.uint8)
    assert (tensor.data_ptr(), tensor.shape, tensor.dtype) == (place, (64,), torch.uint8)
