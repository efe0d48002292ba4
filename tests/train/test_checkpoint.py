"""Weights from and to Hugging Face directories and Megatron checkpoints, whole or with LoRA, on the CPU."""

import pytest
from conftest import losses, recipe

from nemotron_sft.errors import UserError
from nemotron_sft.train import checkpoints, export
from nemotron_sft.train.checkpoints import newest_iteration
from nemotron_sft.train.weights import Skeleton

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
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = dict(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True)),
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

    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def converted(hf_models, tiny_data, tmp_path_factory):
    """Llama, converted and exported without a step of training."""
    run_dir = tmp_path_factory.mktemp("converted") / "llama"
    shown = train(tiny_data, run_dir, f"model.hf={hf_models}/llama", "train.train_iters=0", "export.hf=true")
    return run_dir, shown


@pytest.fixture(scope="module")
def trained(hf_models, tiny_data, tmp_path_factory):
    """Qwen3 after some training, exported."""
    run_dir = tmp_path_factory.mktemp("trained") / "qwen3"
    options = ["train.train_iters=60", "optimizer.lr=1e-2", "export.hf=true"]
    return run_dir, train(tiny_data, run_dir, f"model.hf={hf_models}/qwen3", *options)


@pytest.mark.slow
def test_no_steps_leave_the_weights_as_they_were(hf_models, converted):
    run_dir, shown = converted
    before, after = weights(hf_models / "llama"), weights(run_dir / "hf")
    assert before.keys() == after.keys()
    assert all((before[key] == after[key]).all() for key in before)
    assert "largest difference of a logit" in shown


@pytest.mark.slow
def test_the_export_answers_as_the_trained_model_does(hf_models, trained, bridge):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, _ = trained
    before, after = weights(hf_models / "qwen3"), weights(run_dir / "hf")
    assert before.keys() == after.keys() and any((before[key] != after[key]).any() for key in before)
    theirs = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32).eval()
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
        (spoiled, False, "its logits differ by"),
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
        export.export(trained[0], tmp_path / "out")
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


@pytest.mark.slow
def test_export_of_a_run_by_command(trained, tmp_path):
    done = recipe("export", trained[0], "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    first, second = weights(trained[0] / "hf"), weights(tmp_path / "out")
    assert all((first[key] == second[key]).all() for key in first)
    refused = recipe("export", tmp_path)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "no config.yaml" in refused.stderr
