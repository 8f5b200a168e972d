"""Where Stable Diffusion's weights go, against the reference map of all 686 keys."""

import os
from pathlib import Path

import pytest

from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import TrainConfig
from vdtrain.models.layer_plan import make_plan
from vdtrain.weights.stable_diffusion import UNET_PREFIX, own_names
from vdtrain.weights.versatile_diffusion import to_released

GOLDEN = Path(os.environ.get("VDTRAIN_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
MAP = GOLDEN / "sd_v1_to_vd_map.tsv"


@pytest.mark.skipif(not MAP.is_file(), reason=f"no reference map in {GOLDEN} (set VDTRAIN_GOLDEN)")
def test_every_key_goes_where_the_reference_map_sends_it() -> None:
    model = to_object(compose("train", []), TrainConfig).model
    plan = make_plan(model.diffuser)
    rows = [line.split("\t") for line in MAP.read_text().splitlines() if not line.startswith("#")]
    assert len(rows) == 686
    for key, _, _, *released in rows:
        names = own_names(plan, key.removeprefix(UNET_PREFIX), "image", ["image", "text"])
        assert [to_released(name) for name in names] == released, key
