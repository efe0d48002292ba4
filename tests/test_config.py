"""Every configuration composes and checks; misspelled and mistyped keys are refused by name."""

import re
import time

import pytest
from conftest import ROOT, recipe
from hydra import compose, initialize_config_dir

from nemotron_sft import app, config, paths
from nemotron_sft.bridge_fields import SECTIONS, bridge_fields
from nemotron_sft.errors import UserError

SCHEMAS = {"prep": config.Prep, "train": config.TrainConfig}
MANDATORY = {  # what an option leaves to the user
    "blend=file": "blend.path=mine.json",
    "template=file": "template.name=mine.jinja",
    "model=hf": "model.hf=Qwen/Qwen3-8B",
}


def groups_of(name):
    """The config groups that an app's defaults list names."""
    return re.findall(r"^  - (?:optional )?(\w+): ", (paths.CONF / f"{name}.yaml").read_text(), flags=re.MULTILINE)


def options():
    for name in SCHEMAS:
        yield name, None
        for group in groups_of(name):
            for file in sorted((paths.CONF / group).glob("*.yaml")):
                yield name, f"{group}={file.stem}"


def composed(name, *overrides):
    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        return compose(name, [app.open_key(override) for override in overrides])


@pytest.mark.parametrize(("name", "option"), list(options()))
def test_every_option_composes_and_checks(name, option):
    extra = [option] if option else []
    if option in MANDATORY:
        extra.append(MANDATORY[option])
    if option and option.startswith("experiment="):
        app_of = re.search(r"recipes/(\w+)\.py", (paths.CONF / "experiment" / f"{option[11:]}.yaml").read_text())[1]
        if app_of != name:
            pytest.skip(f"belongs to recipes/{app_of}.py")
    config.check(composed(name, *extra), SCHEMAS[name])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate: did you mean optimizer.lr?"),
        ("optimizer.adam_epz=1e-8", "did you mean optimizer.adam_eps?"),
        ("train.train_itrs=5", "did you mean train.train_iters?"),
        ("model.hiden_size=5", "did you mean model.hidden_size?"),
        ("optimizer.lr=fast", "optimizer.lr: Value 'fast'"),
        ("train.train_iters=1.5", "train.train_iters: Value '1.5'"),
    ],
)
def test_wrong_keys_and_types_are_named(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config.check(composed("train", override), config.TrainConfig)


def test_bridge_keys_pass_without_being_listed():
    checked = config.check(composed("train", "optimizer.adam_eps=1e-7", "train.manual_gc=true"), config.TrainConfig)
    assert checked.optimizer.bridge == {"adam_eps": 1e-7}
    assert checked.train.bridge == {"manual_gc": True}


def test_bridge_fields_are_those_of_the_classes():
    known = {
        "model": "num_layers tensor_model_parallel_size hybrid_layer_pattern rotary_base",
        "train": "manual_gc exit_interval",
        "validation": "eval_iters",
        "optimizer": "adam_eps use_distributed_optimizer",
        "scheduler": "lr_warmup_iters max_steps",
        "checkpoint": "most_recent_k async_save",
        "peft": "dim alpha target_modules",
        "ddp": "overlap_grad_reduce grad_reduce_in_fp32",
        "logger": "log_interval tensorboard_dir",
        "dist": "distributed_timeout_minutes",
    }
    assert known.keys() == SECTIONS.keys()
    for section, names in known.items():
        assert set(names.split()) <= bridge_fields(section), section


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("blend=a/my.json", ["blend=file", "blend.path=a/my.json"]),
        ("template=b/my.jinja", ["template=file", "template.name=b/my.jinja"]),
        ("blend=tiny", ["blend=tiny"]),
        ("blend.path=my.json", ["blend.path=my.json"]),
    ],
)
def test_files_may_stand_where_an_option_does(typed, meant):
    assert app.spelled_out(typed) == meant


def test_nearest():
    assert config.nearest("learning_rate", ["lr", "min_lr"]) == "lr"
    assert config.nearest("warmupiters", ["lr_warmup_iters", "warmup_iters"]) == "warmup_iters"
    assert config.nearest("zzz", ["lr"]) is None


@pytest.mark.timed
@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("flag", [["--help"], ["--cfg", "job"]])
def test_help_and_config_come_at_once(name, flag):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = recipe(name, *flag)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert min(seconds) < 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.learning_rate=1"], "error: unknown key optimizer.learning_rate: did you mean optimizer.lr?"),
        (["sed=3"], "error: unknown key sed: did you mean seed?"),
        (["model=tinny"], "error: no model named tinny: did you mean model=tiny?"),
        (["data=/nowhere"], "/nowhere"),
        (["output_dir=/nowhere"], "run python recipes/prep.py first"),
    ],
)
def test_bad_arguments_of_train_are_one_line(arguments, message):
    done = recipe("train", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_truncated_data_is_refused(tiny_data, tmp_path):
    for file in tiny_data.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (tmp_path / "training.npy").read_bytes()
    (tmp_path / "training.npy").write_bytes(data[:-1])
    done = recipe("train", f"data={tmp_path}", f"output_dir={tmp_path}/out")
    assert done.returncode == 2 and "training.npy is truncated" in done.stderr
    assert not (tmp_path / "out").exists()


def test_data_without_metadata_is_refused(tiny_data, tmp_path):
    (tmp_path / "training.npy").write_bytes((tiny_data / "training.npy").read_bytes())
    done = recipe("train", f"data={tmp_path}", f"output_dir={tmp_path}/out")
    assert done.returncode == 2 and "metadata.json" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_readme_and_make_agree():
    readme, make = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", readme)):
        assert re.search(rf"^{target}:", make, flags=re.MULTILINE), target
