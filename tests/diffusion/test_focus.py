import pytest
import torch

from vdtrain.diffusion.contexts import factors_of, focus, low_rank


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(3, 33, 4, generator=generator) @ torch.randn(3, 4, 48, generator=generator)
    return low_rank + 0.3 * torch.randn(3, 33, 48, generator=generator)


def spectrum(context: torch.Tensor) -> torch.Tensor:
    local = context[:, 1:]
    return torch.linalg.svdvals(local - local.mean(dim=-1, keepdim=True))


def test_the_middle_changes_nothing() -> None:
    assert torch.equal(focus(tokens(), 0.5), tokens())


@pytest.mark.parametrize("level", [0.0, 0.2, 0.4999, 0.501, 0.8, 1.0])
def test_global_token_and_spread_stay(level: float) -> None:
    before, after = tokens(), focus(tokens(), level)
    assert torch.equal(after[:, 0], before[:, 0])
    torch.testing.assert_close(after[:, 1:].flatten(1).std(dim=1), before[:, 1:].flatten(1).std(dim=1))
    assert not torch.equal(after, before)


def test_content_without_its_leading_components_and_style_without_the_others() -> None:
    whole, content, style = (spectrum(focus(tokens(), level)) for level in (0.5, 0.0, 1.0))
    # The result has the same standard deviation, so the test compares ratios within a spectrum.
    torch.testing.assert_close(content[:, 1:20] / content[:, :1], whole[:, 3:22] / whole[:, 2:3], atol=1e-4, rtol=1e-3)
    assert (style[:, 5:] < 1e-3 * style[:, :1]).all()
    torch.testing.assert_close(style[:, :5] / style[:, :1], whole[:, :5] / whole[:, :1], atol=1e-4, rtol=1e-3)


def test_factors() -> None:
    """The released application's scale: linear over the components, exponential in the level."""
    assert factors_of(0.0, 6).tolist() == [0, 0, 1, 1, 1, 1]
    assert factors_of(1.0, 25).tolist() == [1] * 5 + [0] * 20
    assert factors_of(0.25, 3)[1] == pytest.approx(0.3775, abs=1e-4)
    assert factors_of(0.75, 25)[5:7].tolist() == pytest.approx([0.5973, 0.1946], abs=1e-4)
    assert factors_of(0.51, 30)[20:].tolist() == [0] * 10


def test_samples_do_not_depend_on_those_beside_them() -> None:
    torch.testing.assert_close(focus(tokens(), 0.2)[1:2], focus(tokens()[1:2], 0.2))


@pytest.mark.parametrize("level", [-0.1, 1.1])
def test_levels_off_the_scale_are_refused(level: float) -> None:
    with pytest.raises(ValueError, match=f"focus={level}: must be from 0"):
        focus(tokens(), level)


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_a_low_rank_keeps_the_leading_components(rank: int) -> None:
    given = tokens()[:, 1:]
    found = low_rank(given, rank)
    mean = given.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(found.mean(dim=-1, keepdim=True), mean, atol=1e-5, rtol=0)
    kept, whole = (torch.linalg.svdvals(each - mean) for each in (found, given))
    torch.testing.assert_close(kept[:, :rank], whole[:, :rank], atol=1e-4, rtol=1e-4)
    assert (kept[:, rank:] < 1e-4 * whole[:, :1]).all()
    # What is left out are the other components: no matrix of this rank is nearer (Eckart and Young 1936).
    left_out = (given - found).flatten(1).norm(dim=1)
    torch.testing.assert_close(left_out, whole[:, rank:].norm(dim=1), atol=1e-3, rtol=1e-3)
