"""Every shipped configuration composes with the numbers of the paper, and every mistake is one line."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vdtrain.commands.train import main
from vdtrain.config.command_schema import BlendConfig, DataPipelineConfig, SampleConfig
from vdtrain.config.compose import SCHEMAS, ConfigError, compose, options, to_object
from vdtrain.config.fields import check_values, keys, look_up, value_problems
from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import check, gradient_scales, micro_batches
from vdtrain.data.manifest import SHARDS_FILE

MINIATURE = ["model=tiny", "data=shapes", "hardware=cpu", "tracking=none"]
STAGES = {
    "stage1_single_flow": (1e-4, 2048, ["image-to-image"]),
    "stage2_dual_flow": (1e-4, 1024, ["image-to-image", "text-to-image"]),
    "stage3_four_flow": (5e-5, 512, ["image-to-image", "text-to-image", "image-to-text", "text-to-text"]),
}


def load(*overrides: str) -> TrainConfig:
    return to_object(compose("train", list(overrides)), TrainConfig)


@pytest.mark.parametrize("group", ["stage", "model", "data", "hardware", "tracking"])
def test_every_shipped_option_composes(group: str) -> None:
    for option in options(group):
        load(f"{group}={option}")
        load(*(choice for choice in MINIATURE if not choice.startswith(group)), f"{group}={option}")


@pytest.mark.parametrize("name", STAGES)
def test_full_size_numbers_are_the_default(name: str) -> None:
    config = load(f"stage={name}")
    rate, batch, flows = STAGES[name]
    assert (config.stage.learning_rate, config.stage.global_batch_size, config.stage.flows) == (rate, batch, flows)
    phases = [(phase.resolution, phase.samples) for phase in config.stage.phases]
    assert phases == [(256, 30_000_000), (512, 6_400_000)]
    assert config.optimizer.learning_rate_scale == 1
    assert (config.model.schedule.beta_start, config.model.schedule.beta_end) == (0.00085, 0.012)


def test_noise_schedules_by_name() -> None:
    """The released code's is the default; numbers of one's own still count, over a name before them too."""
    assert load("model.schedule=released").model.schedule == load().model.schedule
    for model in ("versatile_diffusion", "tiny"):
        paper = load(f"model={model}", "model.schedule=paper").model.schedule
        assert (paper.steps, paper.beta_start, paper.beta_end) == (1000, 0.000085, 0.012)
    own = load("model.schedule=paper", "model.schedule.beta_end=0.02").model.schedule
    assert (own.beta_start, own.beta_end) == (0.000085, 0.02)
    assert load("model.schedule={beta_start: 0.001}").model.schedule.beta_start == 0.001


def test_a_stream_by_name_replaces_the_whole_table(tmp_path: Path) -> None:
    """With a dot as with a slash, also where a user's own data set names its own class; single settings still count."""
    shipped = load().data.stream
    assert shipped["_target_"] == "vdtrain.data.stream.PairStream"
    for word in ("data.stream=indexed", "data/stream=indexed"):
        assert load("data.stream.lanes=3", word).data.stream == {**shipped, "lanes": 3}
    assert load("data.stream={lanes: 2}").data.stream == {**shipped, "lanes": 2}
    (tmp_path / "data/stream").mkdir(parents=True)
    (tmp_path / "data/stream/mine.yaml").write_text("{_target_: my.Stream, tone: 3}")
    inherited = "defaults: [shapes, _self_]\nstream: {_target_: my.Other, loud: 1}\n"
    (tmp_path / "data/inherited.yaml").write_text(inherited)
    # A data set as users copied it before its stream was a group: every setting in one file, and no defaults.
    written = OmegaConf.to_container(compose("train", ["data=shapes"]).data)
    written["stream"] |= {"_target_": "my.Other", "loud": 1}
    (tmp_path / "data/whole.yaml").write_text(OmegaConf.to_yaml(written))
    own = f"hydra.searchpath=[{tmp_path}]"
    for data in ("inherited", "whole"):
        assert load(own, f"data={data}").data.stream == {**shipped, "_target_": "my.Other", "loud": 1}
        assert load(own, f"data={data}", "data.stream=indexed").data.stream == shipped
        assert load(own, f"data={data}", "data.stream=mine").data.stream == {"_target_": "my.Stream", "tone": 3}
    with pytest.raises(ConfigError, match=r"^data\.stream=nope: no such option; choose from indexed"):
        load("data.stream=nope")
    with pytest.raises(ConfigError, match=r"exactly one data\.stream"):
        load("+data.stream=indexed")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A folder that passes for a manifest until it is read."""
    folder = tmp_path / "manifest"
    folder.mkdir()
    (folder / SHARDS_FILE).touch()
    return folder


def test_each_stage_starts_from_the_one_before() -> None:
    starts = [load(f"stage={name}", "runs_dir=r").stage.init_from for name in STAGES]
    assert starts == ["weights/stable_diffusion_v1", "r/stage1_single_flow", "r/stage2_dual_flow"]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("hardware", options("hardware"))
def test_shipped_batches_divide_on_a_node(name: str, hardware: str, manifest: Path) -> None:
    overrides = [f"stage={name}", f"hardware={hardware}", f"data.manifest={manifest}"]
    overrides += ["model=tiny", "data=shapes"] if hardware == "cpu" else []
    config = load(*overrides)
    for modality in config.model.modalities.values():  # weights are not part of the repository
        modality.vae, modality.context_encoder = (
            {"_target_": each["_target_"]} for each in (modality.vae, modality.context_encoder)
        )
    check(config, world_size=2 if hardware == "cpu" else 8)


def test_gradient_scales_cover_the_trained_groups() -> None:
    assert gradient_scales(load("stage=stage2_dual_flow")) == {
        "global": 0.1,
        "data.image": 0.1,
        "context.image": 0.1,
        "context.text": 1.0,
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("stage.learnig_rate=1", ["stage.learnig_rate", "did you mean 'stage.learning_rate'"]),
        ("stage=stage4", ["stage=stage4", "stage3_four_flow"]),
        ("hardware=tpu", ["hardware=tpu", "h100"]),
        ("stage.learning_rate=fast", ["stage.learning_rate", "fast"]),
        ("stage.flows=[image-to-sound]", ["stage.flows", "sound", "image, text"]),
        ("stage.flows=[image_variation]", ["stage.flows", "image_variation", "CONTEXT-to-OUTPUT"]),
        ("stage.flows=[]", ["stage.flows", "empty"]),
        ("stage.flows=[image-to-image,image-to-image]", ["stage.flows", "twice"]),
        ("hardware.micro_batch_size.32=0", ["hardware.micro_batch_size.32=0", "at least 1"]),
        ("stage.phases=[{resolution:40,samples:640}]", ["stage.phases.0.resolution=40", "multiple of 16", "try 48"]),
        (
            "stage.phases=[{resolution:48,samples:640}]",
            ["hardware.micro_batch_size", "+hardware.micro_batch_size={48: N}"],
        ),
        ("stage.phases=[{resolution:32,samples:5}]", ["stage.phases.0.samples=5", "one batch"]),
        ("stage.gradient_scales.data.image=-1", ["stage.gradient_scales.data.image=-1: give a number", "0 freezes"]),
        ("stage.gradient_scales.data.image=true", ["stage.gradient_scales.data.image=true: give a number"]),
        ("stage.gradient_scales.data.image=nan", ["stage.gradient_scales.data.image=nan: must be a finite number"]),
        (
            "stage.gradient_scales={global:0,data:{image:0},context:{image:0}}",
            ["0 for every layer group", "nothing is trained", "global, data.image, context.image"],
        ),
        ("optimizer.schedule=step", ["optimizer.schedule=step: choose from constant, linear, cosine"]),
        ("optimizer.final_share=0.1", ["optimizer.schedule=constant does not fall", "linear or cosine"]),
        ("optimizer.schedule=cosine optimizer.final_share=2", ["optimizer.final_share=2: must be from 0 to 1"]),
        ("objective.min_snr_gamma=0", ["objective.min_snr_gamma=0: must be above 0; 5 is usual"]),
        ("objective.offset_noise=-1", ["objective.offset_noise=-1: must be at least 0"]),
        ("data.flip=true data.latents=cached", ["data.flip=true", "not mirrored", "data.latents=inline"]),
        ("lora.rank=0", ["lora.rank=0: must be at least 1; null trains the weights themselves"]),
        ("lora.alpha=8", ["lora.rank=null: trains no adapters", "give it a number"]),
        ("lora.rank=4 lora.groups=[data.text]", ["lora.groups=[data.text]: data.text is not trained by this stage"]),
        (
            "lora.rank=4 lora.groups=[global] stage.gradient_scales.global=0",
            ["lora.groups=[global]: global is not trained", "it trains data.image, context.image"],
        ),
        ("stage.gradient_scale_mode=both", ["stage.gradient_scale_mode=both", "learning_rate, gradient"]),
        ("hardware.zero_stage=3", ["hardware.zero_stage=3: choose from 0, 1, 2"]),
        ("hardware.zero_stage=4", ["hardware.zero_stage=4", "0, 1, 2"]),
        ("hardware.offload_optimizer=true", ["hardware.offload_optimizer: removed", "leave it out"]),
        ("optimizer.gradient_clip=-1", ["optimizer.gradient_clip=-1: must be at least 0; 0 does not clip"]),
        ("optimizer.max_bad_steps=0", ["optimizer.max_bad_steps=0", "at least 1"]),
        ("hardware.attention=xformers", ["hardware.attention=xformers", "sdpa"]),
        ("hardware.activation_checkpointing=all", ["hardware.activation_checkpointing=all", "none, context, blocks"]),
        ("+objective.flow_weights.text-to-text=2", ["objective.flow_weights.text-to-text", "not a flow of this stage"]),
        ("objective.context_dropout=1.5", ["objective.context_dropout=1.5"]),
        ("objective.flow_weights={image-to-image:-1}", ["flow_weights.image-to-image=-1: must be at least 0"]),
        ("seed=-1", ["seed=-1: must be at least 0"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]: AdamW has two; give two, e.g. [0.9, 0.999]"]),
        ("model.diffuser.channels=[]", ["model.diffuser.channels=[]: empty", "at least one level"]),
        ("model.diffuser.channels=[64,60]", ["channels=[64, 60]: model.diffuser.norm_groups=8 does not divide 60"]),
        ("model.diffuser.attention_levels=[0,9]", ["attention_levels=[0, 9]: there is no level 9; choose from 0 to 1"]),
        ("model.diffuser.heads=7", ["channels=[64, 64]: model.diffuser.heads=7 does not divide 64", "multiple of 7"]),
        (
            "model.modalities.image.vae._target_=os.system",
            ["model.modalities.image.vae.block_out_channels: os.system takes no such argument"],
        ),
        (
            "model.modalities.image.context_layers._target_=vdtrain.models.Nope",
            ["model.modalities.image.context_layers._target_=vdtrain.models.Nope: cannot be imported"],
        ),
        ("ema.decay=1", ["ema.decay=1"]),
        ("ema.length=0.6", ["ema.length=0.6", "0.1 its last tenth"]),
        ("model.schedule=papre", ["model.schedule=papre", "choose from paper, released"]),
        (
            "model.schedule.beta_start=0.5",
            ["model.schedule.beta_start=0.5: above beta_end=0.012", "model.schedule=released"],
        ),
        ("data.manifest=nowhere", ["data.manifest=nowhere", "data_pipeline index"]),
        ("data.manifest=.", ["data.manifest=.: shards.parquet is not there; make it with `python -m data_pipeline"]),
        ("stage=stage2_dual_flow", ["stage.init_from=", "stage1_single_flow", "train that stage first"]),
        ("stage.init_from=weights.safetensors", ["stage.init_from=weights.safetensors", "vdtrain weights import"]),
        ("--fast", ["unknown flag --fast"]),
    ],
)
def test_a_mistake_is_one_line_that_names_setting_and_remedy(
    overrides: str, expected: list[str], manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*MINIATURE, f"data.manifest={manifest}", f"runs_dir={tmp_path}/runs", *shlex.split(overrides)]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("error: ")
    for part in expected:
        assert part in shown.err


def test_arguments_that_a_part_refuses_are_one_line(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"data.manifest={manifest}", f"run_dir={tmp_path}/run"]
    assert main([*MINIATURE, *places, "model.modalities.image.vae.block_out_channels=[1]"]) == 2
    expected = "model.modalities.image.vae: norm_num_groups=2 does not divide block_out_channels=[1]"
    assert capsys.readouterr().err == f"error: {expected}; correct its arguments\n"


def test_a_run_folder_that_cannot_be_made_is_one_line(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for place in (file, file / "run"):
        assert main([*MINIATURE, f"data.manifest={manifest}", f"run_dir={place}"]) == 2
        shown = capsys.readouterr()
        why = f"cannot be written ({file} is a file, not a folder); move {file} away, or choose another place"
        assert shown.err == f"error: run_dir={place}: {why}\n"
        assert shown.out == ""


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.shapes.pictures=5", "data.shapes.pictures: renamed; write data.shapes.images\n"),
        ("data.inspect.pictures=5", "data.inspect.pictures: renamed; write data.inspect.images\n"),
        (
            "data.select.filters.duplicate_pictures=keep",
            "data.select.filters.duplicate_pictures: renamed; write data.select.filters.duplicate_images\n",
        ),
    ],
)
def test_a_renamed_setting_is_named_with_its_new_name(
    word: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MINIATURE, word]) == 2
    assert capsys.readouterr().err == f"error: {expected}"


def test_a_removed_setting_is_accepted_with_its_only_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an old command has it; any other value, and a file of options that has it, get the same line as an error."""
    line = "hardware.offload_optimizer: removed, as false was its only legal value; leave it out\n"
    assert main([*MINIATURE, "hardware.offload_optimizer=false", "--cfg", "job"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"warning: {line}"
    assert "offload" not in shown.out
    assert main([*MINIATURE, "hardware.offload_optimizer=true", "--cfg", "job"]) == 2
    assert capsys.readouterr().err == f"error: {line}"
    (tmp_path / "hardware").mkdir()
    own = (Path(__file__).parents[1] / "conf/hardware/cpu.yaml").read_text() + "offload_optimizer: false\n"
    (tmp_path / "hardware/own.yaml").write_text(own)
    assert main([f"hydra.searchpath=[{tmp_path}]", "hardware=own", "--cfg", "job"]) == 2
    assert capsys.readouterr().err.endswith(line)


def test_the_choices_of_the_schema_are_those_of_the_code() -> None:
    from data_pipeline.download.download import ENGINES
    from data_pipeline.select.sources import SCHEMAS as METADATA
    from vdtrain.diffusion.contexts import MIXINGS
    from vdtrain.diffusion.sampling import SOLVERS
    from vdtrain.engine.deepspeed import PRECISIONS
    from vdtrain.inference.sampler import DTYPES

    for schema, key, known in (
        (TrainConfig, "hardware.precision", PRECISIONS),
        (SampleConfig, "solver", SOLVERS),
        (SampleConfig, "precision", ["auto", *DTYPES]),
        (BlendConfig, "mixing", MIXINGS),
        (DataPipelineConfig, "data.download.distributor", ENGINES),
        (DataPipelineConfig, "data.sources.x.schema", METADATA),
    ):
        setting = look_up(schema, key)
        assert setting is not None
        assert set(setting.about.choices) == set(known), key


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_default_is_one_that_its_setting_takes(name: str) -> None:
    for choices in ([], [word for word in MINIATURE if word.partition("=")[0] in keys(SCHEMAS[name])]):
        check_values(to_object(compose(name, choices), SCHEMAS[name]))


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_setting_has_a_help(name: str) -> None:
    """Unless it is a table of settings; `sources` and `phases` have entries that are."""
    tables = {"data.sources", "stage.phases", "model.modalities"}
    for key in keys(SCHEMAS[name]):
        setting = look_up(SCHEMAS[name], key)
        assert setting is not None
        assert bool(setting.about.help) != (setting.fields is not None or key in tables), key


def test_bounds_hold_for_each_number_in_a_list_or_a_table() -> None:
    config = load("hardware.micro_batch_size={256: 0}", "optimizer.betas=[0.9, 1.0]", "watchdog_seconds=0.5")
    assert list(value_problems(config)) == [
        "hardware.micro_batch_size.256=0: must be at least 1",
        "optimizer.betas.1=1: must be at least 0 and below 1",
        "watchdog_seconds=0.5: must be at least 1; null waits without limit",
    ]
    with pytest.raises(ConfigError, match=r"^hardware\.micro_batch_size\.256=0: must be at least 1$"):
        check_values(config)


def test_mistakes_are_said_before_a_process_group_starts() -> None:
    script = (
        "import sys; from vdtrain.commands.train import main; status = main(sys.argv[1:]); "
        "print(status, sorted({'deepspeed', 'diffusers', 'wandb'} & set(sys.modules)))"
    )
    arguments = [*MINIATURE, "stage.global_batch_size=33"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 []\n"
    assert done.stderr.count("\n") == 1


def test_full_size_configuration_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "stage=stage1_single_flow"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "learning_rate: 0.0001",
        "global_batch_size: 2048",
        "samples: 30000000",
        "- 1280",
        "latent_width: 768",
    ):
        assert line in shown


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in STAGES)


def test_a_misspelt_part_is_a_configuration_error() -> None:
    from vdtrain.config.instantiate import instantiate

    with pytest.raises(ConfigError, match=r"model.x.*latent_chanels"):
        instantiate(
            {"_target_": "vdtrain.models.image_layers.ImageDataLayers", "latent_chanels": 4}, "model.x", plan=None
        )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("hardware", ["a100_40gb", "h100", "h200"])
def test_a_stage_starts_on_any_number_of_gpus_that_its_batch_divides_over(stage: str, hardware: str) -> None:
    config = to_object(compose("train", [f"stage={stage}", f"hardware={hardware}"]), TrainConfig)
    batch = config.stage.global_batch_size
    for gpus in (1, 2, 3, 6, 8, 12, 24, 64, 128):
        for resolution, limit in config.hardware.micro_batch_size.items():
            if batch % gpus:
                with pytest.raises(
                    ConfigError, match=rf"={batch}: does not divide over {gpus} processes; choose \d+ or"
                ):
                    micro_batches(config, resolution, gpus)
                continue
            local = batch // gpus
            size = local // micro_batches(config, resolution, gpus)
            assert size == max(divisor for divisor in range(1, limit + 1) if local % divisor == 0)
