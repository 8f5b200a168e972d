"""The diffuser against what the original modules gave (random weights, float32; reference/README.md)."""

import pytest
import torch

from tests.parity.recorded import drawn, drawn_weights, recorded
from vdtrain.config.schema import DiffuserConfig, ModalityConfig, ModelConfig, ScheduleConfig
from vdtrain.diffusion.contexts import by_layer, mixed
from vdtrain.diffusion.sampling import DDIM, ddim_timesteps, denoise, guided
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import Flow, active_groups, all_flows
from vdtrain.models.diffuser import Context, Diffuser, DiffuserInput, layer_group, timestep_sinusoid
from vdtrain.weights.published.versatile_diffusion import from_released, to_released

SCHEDULE = Schedule(ScheduleConfig())
FLOWS = [flow.name for flow in all_flows(["image", "text"])]


def model_config(golden: dict) -> ModelConfig:
    sizes = golden["config"]
    context = {"_target_": "vdtrain.models.context_layers.ContextLayers", "context_width": sizes["context_dim"]}
    image = {"_target_": "vdtrain.models.image_layers.ImageDataLayers", "latent_channels": sizes["in_channels"]}
    text = {
        "_target_": "vdtrain.models.text_layers.TextDataLayers",
        "latent_width": sizes["text_latent"],
        "tokens": sizes["second_dim"][0],
    }
    return ModelConfig(
        name="micro",
        base_weights=None,
        diffuser=DiffuserConfig(
            channels=[sizes["model_channels"] * factor for factor in sizes["channel_mult"]],
            blocks_per_level=sizes["num_res_blocks"][0],
            attention_levels=[level for level, attends in enumerate(sizes["with_attn"]) if attends],
            heads=sizes["num_heads"],
            norm_groups=32,
        ),
        modalities={
            "image": ModalityConfig(data_layers=image, context_layers=context),
            "text": ModalityConfig(data_layers=text, context_layers=context),
        },
    )


@pytest.fixture(scope="module")
def golden() -> dict:
    return recorded("diffuser")


@pytest.fixture(scope="module")
def diffuser(golden: dict) -> Diffuser:
    model = Diffuser(model_config(golden), active_groups(all_flows(["image", "text"])))
    weights = drawn_weights(golden["shapes"], golden["sha256"])
    # Strict: every released key has its place, and every place its key.
    model.load_state_dict({from_released(key): value for key, value in weights.items()})
    return model


def released_flow(flow: Flow) -> str:
    return f"{flow.output}<-{flow.context}"


@pytest.mark.parametrize("name", FLOWS)
def test_flow_output(golden: dict, diffuser: Diffuser, name: str) -> None:
    flow, inputs = Flow.parse(name), golden["inputs"]
    context = Context(flow.context, inputs[f"c_{flow.context}"])
    with torch.no_grad():
        (out,) = diffuser([DiffuserInput(flow.output, inputs[f"x_{flow.output}"], inputs["t"], [context])])
    torch.testing.assert_close(out, golden["outputs"][released_flow(flow)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("output", ["image", "text"])
def test_flows_sharing_data_layers_go_through_together(golden: dict, diffuser: Diffuser, output: str) -> None:
    inputs = golden["inputs"]
    contexts = [Context(modality, inputs[f"c_{modality}"]) for modality in ("text", "image")]
    with torch.no_grad():
        (out,) = diffuser(
            [
                DiffuserInput(
                    output, inputs[f"x_{output}"].repeat_interleave(2, 0)[[0, 2, 1, 3]], inputs["t"].repeat(2), contexts
                )
            ]
        )
    for part, context in zip(out.chunk(2), contexts, strict=True):
        expected = golden["outputs"][f"{output}<-{context.modality}"]
        torch.testing.assert_close(part, expected, atol=1e-4, rtol=0)


def test_non_square_latent(golden: dict, diffuser: Diffuser) -> None:
    case = golden["nonsquare"]
    context = Context("text", case["c_text"])
    with torch.no_grad():
        (out,) = diffuser([DiffuserInput("image", case["x"], golden["inputs"]["t"], [context])])
    torch.testing.assert_close(out, case["out"], atol=1e-4, rtol=0)


def test_time_embedding(golden: dict, diffuser: Diffuser) -> None:
    sinusoid = timestep_sinusoid(golden["time"]["t"], 32)
    torch.testing.assert_close(sinusoid, golden["time"]["sinusoid"], atol=1e-5, rtol=0)
    torch.testing.assert_close(diffuser.global_layers(sinusoid), golden["time"]["emb"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FLOWS)
def test_loss_and_gradients(golden: dict, diffuser: Diffuser, name: str) -> None:
    flow, inputs = Flow.parse(name), golden["inputs"]
    expected = golden["train"][released_flow(flow)]
    noise = inputs[f"noise_{flow.output}"]
    noisy = SCHEDULE.add_noise(inputs[f"x_{flow.output}"], noise, inputs["t"])
    torch.testing.assert_close(noisy, golden["train"][f"q_sample {flow.output}"], atol=1e-5, rtol=0)

    diffuser.zero_grad(set_to_none=True)
    context = Context(flow.context, inputs[f"c_{flow.context}"])
    (out,) = diffuser([DiffuserInput(flow.output, noisy, inputs["t"], [context])])
    loss = (out - noise).pow(2).mean()
    loss.backward()
    assert abs(loss.item() - float(expected["loss"])) < 1e-4

    trained = {to_released(key) for key, value in diffuser.named_parameters() if value.grad is not None}
    assert {layer_group(key) for key, value in diffuser.named_parameters() if value.grad is not None} == set(
        flow.groups
    )
    assert trained == set(expected["gradients"])
    gradients = {to_released(key): value.grad for key, value in diffuser.named_parameters()}
    assert len(expected["grad"]) == 15
    for key, gradient in expected["grad"].items():
        torch.testing.assert_close(gradients[key], gradient, atol=1e-4, rtol=1e-3)
    for key, (norm, along) in expected["gradients"].items():
        assert abs(float(gradients[key].norm()) - norm) <= 1e-4 + 1e-4 * norm, key
        # Unlike the norm, this notices values that are in another place, or have another sign.
        found = (gradients[key] * drawn(f"direction of {key}", gradients[key].shape)).sum()
        assert abs(float(found) - along) <= 1e-4 + 1e-4 * norm, key


def test_buffers_of_the_original_have_no_place(golden: dict) -> None:
    assert len(golden["buffers"]) == 12
    assert {from_released(key) for key in golden["buffers"]} == {None}


def test_schedule(golden: dict) -> None:
    expected = golden["schedule"]["alphas_cumprod"]
    torch.testing.assert_close(SCHEDULE.alphas_cumprod, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [5, 7, 50])
def test_ddim_timesteps(golden: dict, steps: int) -> None:
    expected = golden["ddim"][f"schedule {steps}"]["timesteps"]
    assert ddim_timesteps(SCHEDULE, steps) == expected[::-1]


@pytest.mark.parametrize(
    ("name", "scale", "eta"),
    [(name, 7.5, 0) for name in FLOWS] + [("text-to-image", 1, 0), ("text-to-image", 3, 1)],
)
def test_ddim(golden: dict, diffuser: Diffuser, name: str, scale: float, eta: int) -> None:
    flow, inputs = Flow.parse(name), golden["inputs"]
    case = golden["ddim"][f"{released_flow(flow)} steps5 scale{scale:g} eta{eta}"]
    predict = guided(diffuser, flow.output, [given(inputs, flow.context)], [without(inputs, flow.context)], scale)
    noises = case.get("noises")
    solver = DDIM(SCHEDULE, 5, eta, None if noises is None else noises.__getitem__)
    close(denoise(predict, case["xT"], solver), case["out"])


def given(inputs: dict, modality: str) -> Context:
    return Context(modality, inputs[f"c_{modality}"])


def without(inputs: dict, modality: str) -> Context:
    return Context(modality, inputs[f"uc_{modality}"])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-4, relative where the trajectory of a network with random weights has left the unit range."""
    torch.testing.assert_close(found, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)


def test_image_to_image_from_partly_noised_latents(golden: dict, diffuser: Diffuser) -> None:
    """The original noises to one timestep and begins at the one before; ours begins where it noised to."""
    case, inputs = golden["ddim"]["img2img steps10 forward6 scale7.5"], golden["inputs"]
    solver = DDIM(SCHEDULE, 10)
    begin = len(solver.timesteps) - 6
    noisy = SCHEDULE.add_noise(case["x0"], case["noise"], torch.full((2,), solver.timesteps[begin - 1]))
    predict = guided(diffuser, "image", [given(inputs, "image")], [without(inputs, "image")], 7.5)
    close(denoise(predict, noisy, solver, begin), case["out"])


MIXED = {
    "attention text=0.5 image=0.5": (0.5, 0.5),
    "attention text=0.3 image=0.7": (0.3, 0.7),
    "attention text=3.0 image=1.0": (3.0, 1.0),
}


@pytest.mark.parametrize("name", MIXED)
def test_attention_mixing(golden: dict, diffuser: Diffuser, name: str) -> None:
    inputs = golden["inputs"]
    route = mixed([given(inputs, "text"), given(inputs, "image")], MIXED[name])
    with torch.no_grad():
        out = diffuser.predict("image", inputs["x_image"], inputs["t"], route)
    torch.testing.assert_close(out, golden["multi"][name], atol=1e-4, rtol=0)


def test_attention_mixing_of_three(golden: dict, diffuser: Diffuser) -> None:
    inputs = golden["inputs"]
    flat = Context("image", torch.full_like(inputs["c_image"], 0.1))
    route = mixed([given(inputs, "image"), flat, given(inputs, "text")], (1, 1, 2))
    with torch.no_grad():
        out = diffuser.predict("image", inputs["x_image"], inputs["t"], route)
    expected = golden["multi"]["attention three: image=1, image(const 0.1)=1, text=2"]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_layer_mixing(golden: dict, diffuser: Diffuser) -> None:
    inputs, choices = golden["inputs"], golden["multi"]["layer choices"]
    route = by_layer([given(inputs, "text"), given(inputs, "image")], choices)
    with torch.no_grad():
        out = diffuser.predict("image", inputs["x_image"], inputs["t"], route)
    expected = golden["multi"]["layer text=0.4 image=0.6 (np.random.seed(5))"]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_ddim_with_two_contexts(golden: dict, diffuser: Diffuser) -> None:
    inputs, case = golden["inputs"], golden["ddim"]["multicontext text0.6 image0.4 steps5 scale7.5"]
    modalities = ("text", "image")
    predict = guided(
        diffuser,
        "image",
        [given(inputs, modality) for modality in modalities],
        [without(inputs, modality) for modality in modalities],
        7.5,
        lambda contexts, timestep: mixed(contexts, (0.6, 0.4)),
    )
    close(denoise(predict, case["xT"], DDIM(SCHEDULE, 5)), case["out"])
