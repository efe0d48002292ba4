"""Every configuration composes and checks; misspelled and mistyped keys are refused by name."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, composed, recipe, run

from nemotron_sft import app, config, paths
from nemotron_sft import bridge_fields as bridge_fields_module
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


@pytest.fixture
def without_bridge(monkeypatch):
    """As on a login node: no Megatron, no torch."""
    for package in ("megatron", "torch"):
        monkeypatch.setitem(sys.modules, package, None)
    caches = (bridge_fields, bridge_fields_module._class_fields, bridge_fields_module._file, config._say_unchecked)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_bridge_its_keys_pass_with_one_line(without_bridge, capsys):
    for _ in range(2):
        checked = config.check(composed("train", "train.manual_gc=true", "model.anything=1"), config.TrainConfig)
    assert checked.train.bridge == {"manual_gc": True} and checked.model.bridge["anything"] == 1
    told = capsys.readouterr().err
    assert told.startswith("Megatron-Bridge is not installed here: ") and told.count("\n") == 1
    with pytest.raises(UserError, match=r"unknown key data\.paht: did you mean data\.path\?"):  # our own are checked
        config.check(composed("train", "data.paht=x"), config.TrainConfig)
    config.check(composed("prep"), config.Prep)
    assert not capsys.readouterr().err


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
        "rng": "te_rng_tracker data_parallel_random_init",
        "mixed_precision": "grad_reduce_in_fp32 fp8_recipe",
        "comm_overlap": "tp_comm_overlap overlap_grad_reduce",
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


def cpu_seconds(*command):
    """The least CPU time of two calls, which other load on the machine hardly changes."""
    seconds = []
    for _ in range(2):
        before = os.times()
        done = run(sys.executable, *command)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    return min(seconds)


def test_help_takes_at_most_twice_as_long_as_that_of_an_empty_hydra_app(tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text(
        "import hydra, sys\n"
        f"sys.modules.update(dict.fromkeys({app.UNUSED_PLUGINS}))  # the same plugins as ours\n"
        "hydra.main(version_base='1.3', config_path=None)(lambda cfg: None)()\n"
    )
    reference = cpu_seconds(empty, "--help")
    for name in SCHEMAS:
        assert cpu_seconds(f"recipes/{name}.py", "--help") < 2 * reference


@pytest.mark.parametrize(
    "command", ["prep.py --help", "train.py --help", "train.py --cfg job", "export.py --help", "train.py sed=3"]
)
def test_help_config_and_errors_import_nothing_heavy(command):
    name, *arguments = command.split()
    done = run(sys.executable, "-X", "importtime", f"recipes/{name}", *arguments)
    assert done.returncode == (2 if "sed=3" in arguments else 0), done.stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "nemotron_sft" in imported
    assert not imported & {"numpy", "torch", "transformers", "tokenizers", "pyarrow", "numba", "huggingface_hub",
                           "megatron", "wandb", "multistorageclient"}  # fmt: skip


@pytest.mark.parametrize("command", ["prep.py --help", "train.py --cfg job", "show.py --help"])
def test_output_that_nobody_reads_ends_without_a_traceback(command):
    reader, writer = os.pipe()
    os.close(reader)
    name, *arguments = command.split()
    with open(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, f"recipes/{name}", *arguments], cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_names_the_groups_that_the_app_uses(name):
    shown = recipe(name, "--help").stdout
    listed = re.findall(r"^(\w+): .*", shown.split("Groups (group=option)")[1].split("Keys (")[0], flags=re.MULTILINE)
    assert listed == [group for group in sorted(groups_of(name)) if group != "local"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.learning_rate=1"], "error: unknown key optimizer.learning_rate: did you mean optimizer.lr?"),
        (["sed=3"], "error: unknown key sed: did you mean seed?"),
        (["model=tinny"], "error: no model named tinny: did you mean model=tiny?"),
        (["blend=tiny"], "error: blend is a key of recipes/prep.py: recipes/train.py has no use for it"),
        (["lineage=a/b"], "error: lineage= is a command of its own: python recipes/show.py a/b"),
        (["export=a/b"], "error: export= is a command of its own: python recipes/export.py a/b"),
        (["data=/nowhere"], "/nowhere"),
        (["output_dir=/nowhere"], "run python recipes/prep.py first"),
    ],
)
def test_bad_arguments_of_train_are_one_line(arguments, message):
    done = recipe("train", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=nano3_sft"], "error: experiment is a key of recipes/train.py: recipes/prep.py has no use for it"),
        (["optimizer.lr=1"], "error: optimizer is a key of recipes/train.py: recipes/prep.py has no use for it"),
        (["inspect=a/b"], "error: inspect= is a command of its own: python recipes/show.py a/b"),
        (["pack=3"], "error: pack= is a command of its own: python recipes/show.py PATH --pack 3"),
        (["lineage=a/b"], "error: lineage= is a command of its own: python recipes/show.py a/b"),
    ],
)
def test_bad_arguments_of_prep_are_one_line(arguments, message):
    done = recipe("prep", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")


@pytest.mark.parametrize(
    "command", ["show", "show /nowhere", "show . --pack x", "show . --pack 0", "export", "export /nowhere", "show a b"]
)
def test_bad_arguments_of_plain_commands_are_one_line(command):
    done = recipe(*command.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .+\n", done.stderr), done.stderr


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
