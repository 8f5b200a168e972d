"""Where Stable Diffusion's weights go, against the reference map of all 686 keys."""

from tests.parity.recorded import rows
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.models.layer_plan import make_plan
from vdtrain.weights.published.diffusers_names import translated
from vdtrain.weights.published.stable_diffusion import UNET_PREFIX, compvis_modules
from vdtrain.weights.published.versatile_diffusion import to_released


def test_every_key_goes_where_the_reference_map_sends_it() -> None:
    model = to_object(compose("train", []), TrainConfig).model
    plan = make_plan(model.diffuser)
    both = [{theirs: own for own, theirs in compvis_modules(plan, name).items()} for name in ("image", "text")]
    mapped = rows("sd_v1_to_vd_map.tsv")
    assert len(mapped) == 686
    for key, _, _, *released in mapped:
        names = [translated(key.removeprefix(UNET_PREFIX), modules) for modules in both]
        shared = "context_layers" in str(names[0])
        assert [to_released(str(name)) for name in names[: 1 + shared]] == released, key
