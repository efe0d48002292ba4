"""Runs that are planned and never started: containers of composed configs, and what there is to compose."""

from hydra import compose, initialize_config_dir

from nemotron_sft import app, config, paths

GIB = 2**30
H100 = 79 * GIB

# Parameters as the published checkpoints have them, multi-token prediction included, the router's balancing bias (a
# buffer) left out: Lightning's 32,913,266,240 elements have 3,072 of it, Super's 123,611,033,088 have 20,992, Ultra's
# index counts 1,121,049,257,984 bytes, 25,088 elements of it in fp32. Of Nano 12B v2 only "12.3 billion" is published.
PUBLISHED = {
    "nemotron_3_nano": 31_577_937_344,
    "nemotron_35_lightning": 32_913_266_240 - 24 * 128,
    "nemotron_3_nano_4b": 3_973_556_832,
    "nemotron_nano_9b_v2": 8_888_227_328,
    "nemotron_nano_12b_v2": 12_310_001_152,
    "nemotron_3_super": 123_611_033_088 - 41 * 512,
    "nemotron_3_ultra": (1_121_049_257_984 - 4 * 49 * 512) // 2,
    "llama32_1b": 1_235_814_400,
    "qwen3_8b": 8_190_735_360,
}


def typed(*overrides):
    """The checked config of a command."""
    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        composed = compose("train", [app.open_key(override) for override in overrides])
    return config.check(composed, config.TrainConfig)


def container(world_size, *overrides, gpu_bytes=None, checked=True):
    """The ConfigContainer of a command on so many processes, without data."""
    from nemotron_sft.train.container import build
    from nemotron_sft.train.start import Machine

    machine = Machine(gpu_bytes, world_size=world_size)
    return build(typed(*overrides), None, None, paths.ROOT / "output", machine, checked)


def models():
    return sorted(file.stem for file in (paths.CONF / "model").glob("*.yaml"))


def experiments():
    return sorted(file.stem for file in (paths.CONF / "experiment").glob("*.yaml"))


def options(name, hf_dir):
    """What a model needs to be planned without data."""
    if name == "hf":
        return [f"model={name}", f"model.hf={hf_dir}"]
    # Models without a published checkpoint take their vocabulary and pack size from the data.
    return [f"model={name}", *([] if name in PUBLISHED else ["model.vocab_size=32768", "model.seq_length=512"])]
