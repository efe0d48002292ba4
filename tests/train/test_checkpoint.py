"""Weights from and to Hugging Face directories and Megatron checkpoints, whole or with LoRA, on the CPU."""

import dataclasses
import functools
import shutil
import weakref
from pathlib import Path

import pytest
from conftest import losses, recipe

from nemotron_sft.errors import UserError
from nemotron_sft.train import checkpoints, export, logits
from nemotron_sft.train import weights as translated
from nemotron_sft.train.checkpoints import newest_iteration
from nemotron_sft.train.compat.conversion import SAVED_AS
from nemotron_sft.train.weights import CheckpointReader, Skeleton

SHORT = ["train.global_batch_size=4", "scheduler.lr_warmup_iters=1", "validation.eval_interval=0"]


@pytest.mark.parametrize(
    ("init_from", "message"),
    [
        ("/nowhere", "no such directory, and not a hub id"),
        ("llama", "no such directory, and not a hub id"),
        (".", "holds neither a Megatron checkpoint nor a Hugging Face model"),
    ],
)
def test_wrong_starting_points_are_one_line(init_from, message):
    with pytest.raises(UserError, match=message) as refused:
        checkpoints.starting_point(init_from)
    assert "\n" not in str(refused.value)


def test_starting_points(tmp_path, monkeypatch):
    assert checkpoints.starting_point("random") is None
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds neither"):  # a config without weights
        checkpoints.starting_point(str(hf))
    (hf / "model.safetensors").write_bytes(b"")
    assert checkpoints.starting_point(str(hf)) == str(hf)
    saved = tmp_path / "run" / "checkpoints"
    (saved / "iter_0000010").mkdir(parents=True)
    with pytest.raises(UserError, match="holds neither"):  # a save that was interrupted
        checkpoints.starting_point(str(saved.parent))
    (saved / "latest_checkpointed_iteration.txt").write_text("10")
    named = saved / "iter_0000010"  # of Megatron-LM: named, and that is all
    assert checkpoints.starting_point(str(saved.parent)) == checkpoints.starting_point(str(saved)) == str(named)
    (named / "train_state.pt").write_bytes(b"")
    (named / "run_config.yaml").write_text("model:\n  x: 1\nvalid")
    assert newest_iteration(saved) is None  # Bridge names a checkpoint before it writes the last file
    (named / "run_config.yaml").write_text("model:\n  x: 1\nvalidation:\n  x: 1\n")
    (saved / "iter_0000020").mkdir()
    assert newest_iteration(saved) == named


@pytest.fixture(scope="module")
def hf_models(tmp_path_factory):
    """Random small models as transformers saves them: norms away from one, so that a mix-up of norms shows."""
    import torch
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        NemotronHConfig,
        NemotronHForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    shape = dict(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    nemotron = dict(  # Mamba, attention, experts
        hybrid_override_pattern="M*ME", mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=16,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, moe_shared_expert_intermediate_size=96,
        n_group=1, topk_group=1, num_nextn_predict_layers=0, chunk_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True)),
        "nemotron_h": NemotronHForCausalLM(NemotronHConfig(**shape | nemotron, tie_word_embeddings=False)),
    }
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/tokenizer")
    root = tmp_path_factory.mktemp("hf")
    for name, model in models.items():
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "norm" in key:
                    weight.uniform_(0.5, 1.5)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def train(data, run_dir, *overrides):
    done = recipe("train", "model=hf", f"data={data}", f"run_dir={run_dir}", *SHORT, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(directory):
    from safetensors.torch import load_file

    found = load_file(directory / "model.safetensors")
    return {SAVED_AS.get(key, key): weight for key, weight in found.items()}


@pytest.fixture(scope="module")
def convert(hf_models, tiny_data, tmp_path_factory):
    """A function of a family: its model, converted and exported without a step of training."""
    root = tmp_path_factory.mktemp("converted")

    @functools.cache
    def converted(family):
        options = [f"model.hf={hf_models}/{family}", "train.train_iters=0", "export.hf=true"]
        return root / family, train(tiny_data, root / family, *options)

    return converted


@pytest.fixture(scope="module")
def train_some(hf_models, tiny_data, tmp_path_factory):
    """The same after some training."""
    root = tmp_path_factory.mktemp("trained")
    steps = {"qwen3": 60, "nemotron_h": 20}

    @functools.cache
    def trained(family):
        options = [f"train.train_iters={steps[family]}", "optimizer.lr=1e-2", "export.hf=true"]
        train(tiny_data, root / family, f"model.hf={hf_models}/{family}", *options)
        return root / family

    return trained


@pytest.fixture
def trained(train_some):
    return train_some("qwen3")


@pytest.fixture
def converted(convert):
    return convert("llama")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "nemotron_h"])
def test_no_steps_leave_the_weights_as_they_were(family, hf_models, convert):
    run_dir, shown = convert(family)
    before, after = weights(hf_models / family), weights(run_dir / "hf")
    assert before.keys() == after.keys()
    assert all((before[key] == after[key]).all() for key in before)
    assert "largest difference of a logit" in shown


@pytest.mark.slow
def test_many_files_are_written_a_few_experts_at_a_time(hf_models, convert, bridge, tmp_path, monkeypatch):
    """Large models: experts of a layer share a name in checkpoints, and are of several groups, of which one is held."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(translated, "GROUP", 4000)
    read, earlier = CheckpointReader.read, []

    def reading(self, names):
        assert not any(tensor() is not None for tensor in earlier)
        found = read(self, names)
        earlier[:] = map(weakref.ref, found.values())
        return found

    monkeypatch.setattr(CheckpointReader, "read", reading)
    export.export(convert("nemotron_h")[0], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 20
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (hf_models / "nemotron_h", tmp_path / "out")
    )
    assert before.keys() == after.keys() and all((before[key] == after[key]).all() for key in before)


@pytest.mark.slow
def test_weights_saved_in_bf16_are_read_as_they_were_saved(convert, bridge, tmp_path):
    """As a GPU saves them: all in bf16, Mamba's A_log too, which a new model has in fp32."""
    import torch
    from megatron.core import dist_checkpointing

    job = export._job(convert("nemotron_h")[0], tmp_path)
    with checkpoints.together(), torch.no_grad():
        skeleton, _, reader, _ = export._opened(job)
        names = [name for group in skeleton.groups() for name in group.names]
        short = {name: weight.bfloat16() for name, weight in reader.read(names).items()}
        entries = {}
        for name, weight in short.items():
            dtype = {"dtype": weight.dtype} if hasattr(reader._entries[name], "dtype") else {}
            entries[name] = dataclasses.replace(reader._entries[name], data=weight, **dtype)
        dist_checkpointing.save(entries, str(tmp_path))
        again = CheckpointReader(skeleton.model, tmp_path)
        assert again.dtype == torch.bfloat16
        found = again.read(names)
    assert any("A_log" in name for name in names)
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], short[name]) for name in names)


@pytest.mark.slow
def test_logits_of_a_wrapped_model_are_compared(trained, tiny_data, bridge, monkeypatch, tmp_path):
    """On a GPU Bridge wraps a model that it loads in bf16."""
    import torch
    from megatron.core.transformer.module import Float16Module
    from safetensors.torch import save_file

    load, iteration = checkpoints._load, newest_iteration(trained / "checkpoints")

    def wrapped(*given):
        model = load(*given)[0]
        model.config.bf16 = True
        return [Float16Module(model.config, model)]

    monkeypatch.setattr(checkpoints, "_load", wrapped)
    with checkpoints.trained_model(iteration) as model:
        assert next(model.parameters()).dtype == torch.bfloat16
    result = logits.compare(iteration, trained / "hf", Path(tiny_data))
    assert 0 < result.largest <= result.tolerance and result.noise is None

    monkeypatch.setitem(logits.TOLERANCE, "bfloat16", 0)  # as in deep models, which make more of a rounding
    result = logits.compare(iteration, trained / "hf", Path(tiny_data))
    assert result.equal and result.noise > 0, str(result)
    wrong = shutil.copytree(trained / "hf", tmp_path / "wrong")
    changed = weights(wrong)
    for key, weight in changed.items():
        if "q_proj" in key:
            changed[key] = weight.roll(16, 0)  # heads of 16, one on
    save_file(changed, wrong / "model.safetensors", metadata={"format": "pt"})
    result = logits.compare(iteration, wrong, Path(tiny_data))
    assert not result.equal, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "nemotron_h"])
def test_the_export_answers_as_the_trained_model_does(family, hf_models, train_some, bridge):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemotron_sft.train.compat.transformers import exact_scan

    run_dir = train_some(family)
    before, after = weights(hf_models / family), weights(run_dir / "hf")
    assert before.keys() == after.keys() and any((before[key] != after[key]).any() for key in before)
    theirs = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32).eval()
    exact_scan(theirs, 64)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert "<|im_start|>assistant" in text  # the template of the data
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        expected = theirs.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    tokens = prompt
    iteration = newest_iteration(run_dir / "checkpoints")
    with checkpoints.trained_model(iteration) as model, torch.no_grad():
        for _ in range(24):
            logits = model(tokens, torch.arange(tokens.shape[1])[None], None)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert tokens.tolist() == expected.tolist()
    assert len(set(tokens[0, prompt.shape[1] :].tolist())) > 1


def spoiled(skeleton, group, weights):
    """A translation that gets one weight wrong."""
    named = original_to_hf(skeleton, group, weights)
    return {key: value + 0.05 if key.endswith("down_proj.weight") else value for key, value in named.items()}


def incomplete(skeleton, group, weights):
    """A translation that loses one."""
    return {
        key: value for key, value in original_to_hf(skeleton, group, weights).items() if "layers.1.mlp.up" not in key
    }


original_to_hf = Skeleton.to_hf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("translate", "look_back", "message"),
    [
        (spoiled, True, r"read back, decoder.layers.0.mlp.linear_fc2.weight differs from the checkpoint's"),
        (spoiled, False, "its logits differ: largest difference of a logit"),
        (incomplete, True, r"decoder.layers.1.mlp.linear_fc1.weight became no weight model.layers.1.mlp.up_proj"),
        (incomplete, False, r"transformers reports missing keys: model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_an_export_that_differs_leaves_no_directory(
    trained, bridge, tmp_path, monkeypatch, translate, look_back, message
):
    monkeypatch.setattr(Skeleton, "to_hf", translate)
    if not look_back:
        monkeypatch.setattr(Skeleton, "check_back", lambda *_: 0)
    with pytest.raises(UserError, match=f"not exported: {message}") as refused:
        export.export(trained, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_lora_trains_adapters_alone_and_exports_them_merged(hf_models, converted, tiny_data, tmp_path, bridge):
    """From the Megatron checkpoint that the conversion wrote; stopped half-way and resumed."""
    import torch

    run_dir = tmp_path / "lora"
    options = [f"model.hf={hf_models}/llama", f"init_from={converted[0]}", "peft=lora", "peft.dim=4",
               "train.train_iters=8", "optimizer.lr=1e-2"]  # fmt: skip
    train(tiny_data, run_dir, *options, "train.exit_interval=4")
    iteration = newest_iteration(run_dir / "checkpoints")
    with checkpoints.trained_model(iteration) as model:
        halfway = {key: weight.clone() for key, weight in model.named_parameters()}
    shown = train(tiny_data, run_dir, *options, "export.hf=true")
    found = losses(run_dir)
    assert sorted(found) == list(range(1, 9)) and found[8] < found[1]
    with checkpoints.trained_model(newest_iteration(run_dir / "checkpoints")) as model:
        moved = {key for key, weight in model.named_parameters() if not torch.equal(weight, halfway[key])}
        adapters = {key for key in halfway if ".adapter." in key}
        assert moved == adapters and len(adapters) == 2 * 4 * 2  # layers x targets x two matrices
    before, after = weights(hf_models / "llama"), weights(run_dir / "hf")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "_proj.weight" in key}
    assert "largest difference of a logit" in shown  # of the merged weights from the unmerged adapters
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(run_dir / "checkpoints" / "iter_0000008").read_metadata().state_dict_metadata
    tensors = [key for key in stored if key.endswith("weight")]
    assert tensors and all(".adapter." in key for key in tensors)
    assert_peft_and_merged_weights_agree_with_megatron(run_dir, hf_models / "llama")


def assert_peft_and_merged_weights_agree_with_megatron(run_dir, base):
    """Logits of 200 tokens: adapters in Megatron, merged in the export, and those of the export's adapter/ by peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from nemotron_sft.train.compat.transformers import exact_scan

    def loaded(directory):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        exact_scan(model, 200)
        return model

    tokens = torch.randint(5, 2048, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with checkpoints.trained_model(newest_iteration(run_dir / "checkpoints")) as model:
            expected = model(tokens, torch.arange(200)[None], None)
        frozen, merged = loaded(base), loaded(run_dir / "hf")
        before, after = frozen(tokens).logits, merged(tokens).logits
        by_peft = PeftModel.from_pretrained(frozen, run_dir / "hf" / "adapter", torch_device="cpu")(tokens).logits
    scale = float(expected.abs().max())
    assert (before - expected).abs().max() > 1e-2 * scale
    assert torch.allclose(after, expected, atol=1e-4 * scale) and torch.allclose(by_peft, expected, atol=1e-4 * scale)


@pytest.mark.slow
def test_dora_of_a_hybrid_is_the_same_merged_and_in_peft(hf_models, tiny_data, tmp_path, bridge):
    """On attention and shared experts; DoRA has the magnitudes beside LoRA's two matrices."""
    layers = "peft.target_modules=[linear_qkv,linear_proj,*.shared_experts.*]"
    options = ["peft=dora", layers, "peft.dim=4", "train.train_iters=6", "optimizer.lr=1e-2", "export.hf=true"]
    base = hf_models / "nemotron_h"
    train(tiny_data, tmp_path / "run", f"model.hf={base}", f"init_from={base}", *options)
    assert_peft_and_merged_weights_agree_with_megatron(tmp_path / "run", base)


@pytest.mark.slow
def test_export_of_a_run_by_command(trained, tmp_path):
    done = recipe("export", trained, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    first, second = weights(trained / "hf"), weights(tmp_path / "out")
    assert all((first[key] == second[key]).all() for key in first)
    refused = recipe("export", tmp_path)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "no config.yaml" in refused.stderr
