import torch

from vdtrain.diffusion.objective import StepRandom
from vdtrain.training.validation import PairRandom

CPU = torch.device("cpu")


def draw_all(rows: slice, step: int = 7, purpose: str = "noise") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = StepRandom("seed", step, 12, rows, CPU)
    return rng.normal(purpose, (2, 3)), rng.integers(purpose, 1000), rng.chance(purpose, 0.5)


def test_rows_are_the_same_however_the_batch_is_split() -> None:
    whole = draw_all(slice(0, 12))
    for parts in (2, 3, 4):
        size = 12 // parts
        pieces = [draw_all(slice(index * size, (index + 1) * size)) for index in range(parts)]
        for kind, expected in enumerate(whole):
            assert torch.equal(torch.cat([piece[kind] for piece in pieces]), expected)


def test_steps_and_purposes_draw_differently() -> None:
    here = draw_all(slice(0, 12))[0]
    assert not torch.equal(here, draw_all(slice(0, 12), step=8)[0])
    assert not torch.equal(here, draw_all(slice(0, 12), purpose="other")[0])


def test_chance_keeps_its_probability() -> None:
    dropped = StepRandom("seed", 0, 20_000, slice(0, 20_000), CPU).chance("dropout", 0.1)
    assert abs(float(dropped.float().mean()) - 0.1) < 0.01


def test_a_held_out_pair_has_its_own_numbers_in_every_quarter() -> None:
    for quarter in range(4):
        whole, one = (PairRandom(numbers, quarter, torch.device("cpu")) for numbers in (range(50), [7]))
        steps = whole.integers("timestep", 1000)
        assert steps.min() >= 250 * quarter
        assert steps.max() < 250 * (quarter + 1)
        assert len(set(steps.tolist())) > 30
        assert one.integers("timestep", 1000) == steps[7]
        noise = whole.normal("noise", [3])
        assert torch.equal(one.normal("noise", [3])[0], noise[7])
        assert len(noise.unique()) == noise.numel()
