"""`vdtrain bench` as typed, on one and two processes, and the times that `vdtrain plan` predicts from its rates."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.programs import program
from tests.settings import TINY
from vdtrain.commands.bench import main
from vdtrain.commands.plan import main as plan
from vdtrain.config.compose import compose, to_object
from vdtrain.config.schema import RatesConfig, TrainConfig
from vdtrain.planning.memory import PhaseMemory, StagePlan, plan_stage
from vdtrain.planning.speed import step_time
from vdtrain.tracking.speed import BACKWARD, EXCHANGE, INSIDE, OPTIMISER, OperatorCount, StepClock
from vdtrain.training.bench import kept_by_graphs, kernel_kind

STAGE = ("stage=stage3_four_flow", *TINY)
SMALL = ("hardware.micro_batch_size={32:4,64:4}", "warmup_steps=1", "timed_steps=3")
PARTS = {"data_wait", "encode", "forward", "backward", "exchange", "optimiser"}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of one process that has neither data nor weights."""
    output = tmp_path_factory.mktemp("bench") / "new" / "one.json"
    missing = ["data.manifest=none", "model.modalities.text.vae.encoder_tokenizer=none.json"]
    missing += ["model.modalities.image.vae.weights=none.safetensors"]
    words = [*STAGE, *SMALL, *missing, "micro_batches=2", "resolution=64", "profile=true", f"output={output}"]
    assert main(words) == 0
    return output


def test_one_process_is_measured(single: Path) -> None:
    result: dict[str, Any] = json.loads(single.read_text())
    settings = result["settings"]
    assert (settings["pairs"], settings["micro_batch"], settings["micro_batches"]) == (8, 4, 2)
    assert (settings["resolution"], settings["latents"]) == (64, "inline")
    assert result["hardware"]["device"] == "cpu"
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    speed = result["speed"]
    assert len(speed["steps_ms"]) == 3
    assert 0 < speed["least"] <= speed["pairs_per_second"] <= speed["most"]
    assert speed["pairs_per_second"] == pytest.approx(8e3 / speed["step_ms"])
    parts = result["parts_ms"]
    assert parts.keys() == PARTS
    assert all(parts[part] > 0 for part in PARTS - {"exchange"})
    assert 0.5 < sum(parts.values()) / (sum(speed["steps_ms"]) / 3) < 1.01
    flops = result["flops"]
    assert flops["tflops"] == pytest.approx(flops["per_step"] / speed["step_ms"] / 1e9)
    assert flops["share"] == pytest.approx(flops["tflops"] / flops["matmul_tflops"])
    assert result["waits"] is None
    assert result["memory"].keys() == {"peak_gb", "planned_gb"}
    assert json.loads(Path(result["trace"]).read_text())["traceEvents"]
    assert Path(result["trace"]).parent == single.parent
    # Only a GPU has kernels.
    assert result["kernels"] is None
    copied = result["copies"]
    assert all(row["calls"] > 0 for row in copied)
    assert [row["ms"] for row in copied] == sorted((row["ms"] for row in copied), reverse=True)
    # The uint8 images, which each micro-batch converts.
    assert any(row["shape"].startswith("[[4, 3, ") and "aten::" in row["within"] for row in copied)


def test_memory_that_graphs_keep_is_counted_though_no_tensor_holds_it() -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 10},
        {"segment_pool_id": (0, 3), "total_size": 100, "allocated_size": 60},
        {"segment_pool_id": (0, 3), "total_size": 20, "allocated_size": 0},
    ]
    assert kept_by_graphs(segments) == 60


@pytest.mark.slow
def test_a_plan_from_its_rates_takes_as_long(single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its counted operations are those of the step, but for the captions, and so is the time of computing."""
    result = json.loads(single.read_text())
    words = [*STAGE, SMALL[0], "stage.global_batch_size=8", "gpus=1", f"rate={single}"]
    assert plan([*words, "format=json"]) == 0
    time = json.loads(capsys.readouterr().out)["times"][1]
    assert time["flops"] == pytest.approx(result["flops"]["per_step"], rel=0.02)
    parts = result["parts_ms"]
    computing = sum(parts[part] for part in ("encode", "forward", "backward"))
    assert time["compute"] * 1e3 == pytest.approx(computing, rel=0.02)
    assert time["exchange"] == 0
    assert time["seconds"] == pytest.approx(time["compute"] + time["update"])
    assert time["pairs_per_second"] == pytest.approx(8 / time["seconds"])
    assert plan(words) == 0
    shown = capsys.readouterr().out
    assert all(row in shown for row in ("TFLOP a step", "ms of exchange", "of which exposed", "days", "GPU hours"))


@pytest.mark.slow
def test_two_processes_exchange(tmp_path: Path) -> None:
    words = ["-m", "vdtrain", "bench", *STAGE, *SMALL, "micro_batches=1", "data.latents=cached"]
    words += [f"output={tmp_path}/two.json"]
    done = subprocess.run(
        [program("torchrun"), "--nproc-per-node=2", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "two.json").read_text())
    assert result["settings"]["pairs"] == 8
    assert result["hardware"]["processes"] == 2
    assert result["parts_ms"]["exchange"] > 0
    assert result["rates"]["link"] > 0
    config = to_object(compose("train", [*STAGE, "stage.global_batch_size=8"]), TrainConfig)
    weights = sum(plan_stage(config, 2).parameters.values())
    # Gradients and weights, in float32; beside them, losses and norms.
    assert sum(result["exchange"]["bytes"].values()) == pytest.approx(2 * 4 * weights, abs=1000)
    # Each part has one line, of one process.
    for name in ("settings", "speed", "parts ms", "exchange", "flops", "rates", "waits", "memory"):
        assert sum(line.startswith(f"{name} ") for line in done.stdout.splitlines()) == 1, done.stdout


def test_collectives_are_taken_out_of_the_parts_that_they_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = StepClock(torch.device("cpu")), iter([0.0, 1.0, 1.5, 3.5, 4.0, 10.0])
    monkeypatch.setattr("vdtrain.tracking.speed.time.perf_counter", lambda: next(now))
    for part in (None, INSIDE, EXCHANGE, BACKWARD, None, OPTIMISER):
        clock.mark(part)
    assert clock.seconds() == {EXCHANGE: 0.5, BACKWARD: 3.0, OPTIMISER: 6.0}


def test_operations_are_counted_as_they_are_defined() -> None:
    weight = torch.randn(5, 7, requires_grad=True)
    with OperatorCount() as count:
        (torch.randn(3, 5) @ weight).sum().backward()
    # The product, and the gradient of the weight alone.
    assert count.flops == 2 * (2 * 3 * 5 * 7)


def phase_of(
    gpus: int, micro_batches: int = 1, exchange: str = "sharded", zero_stage: int = 1, **rates: Any
) -> tuple[TrainConfig, StagePlan, PhaseMemory]:
    """A stage of a billion weights, planned by hand."""
    from vdtrain.planning.dry_run import MicroBatchMemory
    from vdtrain.planning.memory import StandingMemory

    config = to_object(
        compose(
            "train",
            [
                *STAGE,
                "hardware.precision=bf16",
                f"hardware.exchange={exchange}",
                f"hardware.zero_stage={zero_stage}",
            ],
        ),
        TrainConfig,
    )
    known = {"tflops": 100.0, "memory": 1000.0, "link": 100.0, "network": 400.0}
    config.hardware.rates = RatesConfig(**{**known, **rates})
    standing = StandingMemory(2 * 10**9, 0, 4 * 10**9, 0, 0, 0)
    measured = MicroBatchMemory(0, 0, 0, flops=10**13, encoding_flops=10**12)
    phase = PhaseMemory(64, 64_000, 1000, 64, micro_batches, measured, 0, 0, 0, None)
    parameters = {"global": 10**8, "data.image": 3 * 10**8, "data.text": 6 * 10**8}
    plan = StagePlan("by hand", gpus, None, parameters, 0, 64, standing, [phase], 0, 0, [])
    return config, plan, phase


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused_cat_gelu_gelu_backward_mul_split_view_2", "triton"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k65536_sm80(PyTorchMemEffAttention::AttentionBackwardKernel", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collective"),
        ("sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256x128x64", "convolution"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_64x3_tn_align2>", "matrix product"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "matrix product"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>", "layout"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorList", "optimiser"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>", "normalisation"),
        ("Memcpy DtoD (Device -> Device)", "copy or fill"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add", "elementwise"),
        ("void cudnn::fusion::compute_dot_do_o<true>(void const*", "other"),
    ],
)
def test_what_kernels_of_an_h200_do(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind


def test_a_step_follows_from_operations_and_bytes() -> None:
    one = step_time(*phase_of(1))
    assert one is not None
    # The norm, AdamW, the copy in bf16 and the average of each weight; the gradients are zeroed.
    assert (one.compute, one.update, one.exchange) == pytest.approx((0.1, 0.058, 0.0))
    assert (one.days, one.gpu_hours) == pytest.approx((1000 * 0.158 / 86_400, 1000 * 0.158 / 3600))
    eight, many = step_time(*phase_of(8)), step_time(*phase_of(64))
    assert eight is not None
    assert many is not None
    # Gradients in float32 and weights in bf16, once each, at 100 GB/s within a node.
    assert eight.exchange == pytest.approx(6 * 7 / 8 / 100)
    # The last output's gradients cross during backward; the weights while a tenth of the operations encode.
    assert eight.exposed == pytest.approx(eight.exchange - 2.4 * 7 / 8 / 100 - 0.01)
    assert many.exchange == pytest.approx(6 * 63 / 64 / 100)
    shared = step_time(*phase_of(8, exchange="deepspeed"))
    assert shared is not None
    # DeepSpeed reduces everything to everyone, and joins a buffer first.
    assert shared.exchange == shared.exposed == pytest.approx(10 * 7 / 8 / 100)
    assert shared.update == pytest.approx(eight.update + 0.024)
    assert many.flops == 8 * eight.flops
    # A slow network is the limit; the launches of a micro-batch are the limit.
    slow = step_time(*phase_of(64, network=50.0))
    assert slow is not None
    assert slow.exchange == pytest.approx(6 * 7 / 8 / 50)
    launched = step_time(*phase_of(1, 3, micro_batch_ms=150.0))
    assert launched is not None
    assert launched.compute == pytest.approx(0.45)


def test_what_hides_an_exchange_and_what_other_strategies_move() -> None:
    # A slow link: no more is hidden than two thirds of the work after encoding, and the encoding itself.
    slow = step_time(*phase_of(8, link=10.0))
    assert slow is not None
    assert slow.exchange == pytest.approx(6 * 7 / 8 / 10)
    assert slow.exposed == pytest.approx(slow.exchange - 2 / 3 * 0.09 - 0.01)
    replicated = step_time(*phase_of(8, zero_stage=0))
    assert replicated is not None
    # An all-reduce is a reduce-scatter and an all-gather of the float32 gradients.
    assert replicated.exchange == pytest.approx(2 * 4 * 7 / 8 / 100)
    assert replicated.exposed == pytest.approx(replicated.exchange - 2 * 2.4 * 7 / 8 / 100)
    # Every process updates all weights, and averages its own part.
    assert replicated.update == pytest.approx(0.042 + 0.012 / 8 + 0.004)
    # ZeRO 2 reduces after every micro-batch.
    two = step_time(*phase_of(8, 3, exchange="deepspeed", zero_stage=2))
    assert two is not None
    assert two.exchange == two.exposed == pytest.approx((3 * 2 * 4 + 2) * 7 / 8 / 100)


@pytest.mark.parametrize(("gpus", "rate"), [(1, "tflops"), (1, "memory"), (2, "link"), (64, "network")])
def test_no_time_is_predicted_from_unknown_rates(gpus: int, rate: str) -> None:
    assert step_time(*phase_of(gpus, **{rate: None})) is None


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        (main, ["profile=true"], ["profile=true", "output=FILE.json"]),
        (main, ["resolution=128"], ["no entry for resolution 128"]),
        (main, ["timed_steps=0"], ["timed_steps=0", "at least 1"]),
        (main, ["output=/proc/none/x.json"], ["output=/proc/none/x.json"]),
        (plan, ["gpus=1", "rate=none.json"], ["rate=none.json", "No such file"]),
        (plan, ["gpus=1", f"rate={__file__}"], ["not a result of `vdtrain bench`"]),
    ],
)
def test_a_mistake_is_one_line(
    command: Any, words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([*STAGE, *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert all(part in shown.err for part in expected), shown.err
