"""On a GPU, with Transformer Engine: isolation between documents, packed = unpacked, work for trained tokens only.

Skipped without CUDA; run on a GPU machine with: python -m pytest tests/gpu -q -s
"""

import importlib.util
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from nemotron_sft.data.packed import empty_packs, pack_dtype  # noqa: E402
from nemotron_sft.train.batches import collate  # noqa: E402
from nemotron_sft.train.tuning import use_what_is_installed  # noqa: E402

PACK, VOCABULARY = 1024, 512
LENGTHS = [[100, 300, 500, 60], [1, 2, 3, 700, 200], [1024], [513, 511]]


def make_packs(lengths_per_pack, seed=0):
    rng = np.random.default_rng(seed)
    records = empty_packs(len(lengths_per_pack), pack_dtype(PACK, 8))
    for record, lengths in zip(records, lengths_per_pack, strict=True):
        ends = np.cumsum([0, *lengths])
        record["cu_seqlens"] = ends[-1]
        record["cu_seqlens"][: len(ends)] = ends
        record["input_ids"][: ends[-1]] = rng.integers(1, VOCABULARY, ends[-1])
        for start, end in itertools.pairwise(ends):
            record["loss_mask"][(start + end) // 2 : end] = 1
    return records


@pytest.fixture(scope="module")
def context():
    from nemotron_sft.train.start import start_bridge

    start_bridge()
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    with temporary_distributed_context("nccl"):
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1234)
        yield


COMMON = dict(
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    normalization="RMSNorm",
    add_bias_linear=False,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    vocab_size=VOCABULARY,
    seq_length=PACK,
    gradient_accumulation_fusion=False,
    share_embeddings_and_output_weights=False,
    bf16=True,
    params_dtype=torch.bfloat16,
    init_method_std=0.1,
)

EXPERTS = dict(
    num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=256, moe_shared_expert_intermediate_size=256,
    moe_router_score_function="sigmoid", moe_router_dtype="fp32", moe_grouped_gemm=True,
    moe_token_dispatcher_type="alltoall", moe_aux_loss_coeff=0.0,
)  # fmt: skip

OTHERWISE = {
    "mamba, a key per head": dict(num_query_groups=4),
    "fp32": dict(bf16=False, params_dtype=torch.float32, **EXPERTS),
    # wide enough for all kernels of nemotron_sft/train/kernels
    "experts": dict(hidden_size=1536, kv_channels=64, init_method_std=0.05, **EXPERTS),
}


def largest(differences, model):
    """The largest difference of a token; with experts, all but a hundredth of the tokens are looked at.

    Where two experts are as good, rounding sends a token to the other.
    """
    return float(differences.quantile(0.99 if model.config.num_moe_experts else 1.0))


@pytest.fixture(scope="module", params=["attention", "mamba", "mamba, a key per head", "fp32", "experts"])
def model(request, context):
    if request.param != "attention":
        if importlib.util.find_spec("mamba_ssm") is None:
            pytest.skip("mamba-ssm is not installed")
        from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider

        # Attention on a GPU is bf16 only, so the model in fp32 has none.
        pattern = {"fp32": "M-ME", "experts": "M*ME"}.get(request.param, "M*M-")
        provider = HybridModelProvider(
            num_layers=4, hybrid_layer_pattern=pattern, mamba_num_heads=8, mamba_head_dim=64,
            mamba_state_dim=64, mamba_num_groups=2, position_embedding_type="none",
            **COMMON | OTHERWISE.get(request.param, {}),
        )  # fmt: skip
    else:
        from megatron.bridge.models.gpt_provider import GPTModelProvider

        provider = GPTModelProvider(
            num_layers=4, position_embedding_type="rope", gated_linear_unit=True, apply_rope_fusion=True,
            activation_func=torch.nn.functional.silu, bias_activation_fusion=True, **COMMON,
        )  # fmt: skip
    use_what_is_installed(provider)
    provider.finalize()
    built = provider.provide_distributed_model(wrap_with_ddp=False)[0].eval()
    built.kind, built.hybrid = request.param, request.param != "attention"
    return built


def token_losses(model, records):
    """fp32 loss of every position (T,) and its mask (T,), through the batch that a training step would get."""
    from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

    batch = collate(records)
    keys = {k: (v.cuda() if k.startswith("cu_") else v) for k, v in batch.items() if "seqlen" in k}
    if model.hybrid:
        keys["total_tokens"] = batch["tokens"].shape[1]
    tokens, positions, labels = (batch[k].cuda() for k in ("tokens", "position_ids", "labels"))
    with torch.no_grad():
        losses = model(tokens, positions, None, labels=labels, packed_seq_params=get_packed_seq_params(keys))
    return losses[0].float().cpu(), batch["loss_mask"][0]


def test_changing_one_document_leaves_the_losses_of_the_others(model):
    records = make_packs(LENGTHS)
    before, _ = token_losses(model, records)
    again, _ = token_losses(model, records)
    changed = records.copy()
    changed["input_ids"][0, 100:400] = changed["input_ids"][0, 100:400] % (VOCABULARY - 1) + 1
    after, _ = token_losses(model, changed)
    difference = (after - before).abs()
    inside = torch.zeros(len(before), dtype=torch.bool)
    inside[100:400] = True
    print(
        f"\nchanged document: up to {difference[inside].max():.3g} nats; others: {difference[~inside].max():.3g}; ",
        end="",
    )
    print(f"same input twice: {(again - before).abs().max():.3g}")
    assert difference[inside].max() > 0.1
    if not model.hybrid:  # the same kernels on the same numbers: nothing may move beyond what a repetition moves
        assert difference[~inside].max() <= (again - before).abs().max()
        return
    # A Mamba kernel adds up decay over a chunk of 128 tokens, whatever documents are in it, and takes differences of
    # the sums: the document behind the changed one is rounded otherwise, and what is in its last chunk, too.
    assert difference[:100].max() == 0 and difference[PACK:].max() == 0
    joined = make_packs([[100, 800, 60], *LENGTHS[1:]])
    joined["input_ids"] = records["input_ids"]
    joined_changed = joined.copy()
    joined_changed["input_ids"] = changed["input_ids"]
    leak = (token_losses(model, joined_changed)[0] - token_losses(model, joined)[0]).abs()[400:900].max()
    worst = largest(difference[400:PACK], model)
    print(f"the next document: {worst:.3g}; without the boundary between them: {leak:.3g}")
    assert worst < min(leak / 10, 0.02 if model.kind == "fp32" else 0.15)


def test_packed_loss_is_the_loss_of_the_documents_alone(model):
    records = make_packs(LENGTHS)
    losses, mask = token_losses(model, records)
    packed = float((losses * mask).sum() / mask.sum())
    total, apart_by = 0.0, []
    for number, (record, lengths) in enumerate(zip(records, LENGTHS, strict=True)):
        ends = np.cumsum([0, *lengths])
        for start, end in itertools.pairwise(ends):
            alone = empty_packs(1, pack_dtype(-(-(end - start) // 16) * 16, 1))
            alone["cu_seqlens"][0] = 0, end - start
            alone["input_ids"][0, : end - start] = record["input_ids"][start:end]
            alone["loss_mask"][0, : end - start] = record["loss_mask"][start:end]
            own, own_mask = token_losses(model, alone)
            total += float((own * own_mask).sum())
            together = losses[number * PACK + start : number * PACK + end - 1]
            apart_by.append((own[: end - start - 1] - together).abs())
    apart, apart_by = total / float(mask.sum()), torch.cat(apart_by)
    worst = largest(apart_by, model)
    print(f"\npacked {packed:.6f}, alone {apart:.6f}, largest difference of a token {worst:.3g}")
    assert packed == pytest.approx(apart, rel=2e-3)
    assert worst < 0.15  # bf16: other tile shapes round otherwise


def test_what_trained_tokens_alone_need_gives_the_same_loss_and_gradients(model):
    from nemotron_sft.train.step import ForwardStep

    records = make_packs(LENGTHS)
    batch = collate(records)
    step = ForwardStep()
    step._hook(model)
    results = []
    for positions in (None, batch["trained_positions"].cuda()):
        from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

        keys = {k: (v.cuda() if k.startswith("cu_") else v) for k, v in batch.items() if "seqlen" in k}
        step._positions = positions
        model.zero_grad()
        losses = model(
            input_ids=batch["tokens"].cuda(), position_ids=batch["position_ids"].cuda(), attention_mask=None,
            labels=batch["labels"].cuda(), packed_seq_params=get_packed_seq_params(keys),
        )  # fmt: skip
        (losses * batch["loss_mask"].cuda()).sum().backward()
        gradients = torch.cat([p.grad.float().flatten() for p in model.parameters()])
        results.append((losses.detach().float() * batch["loss_mask"].cuda(), gradients))
    step._positions = None
    (every, every_gradient), (few, few_gradient) = results
    error = float((every_gradient - few_gradient).norm() / every_gradient.norm())
    print(f"\nloss {float(every.sum()):.4f} and {float(few.sum()):.4f}; relative difference of gradients {error:.2g}")
    assert torch.allclose(every, few, atol=0.02)
    assert error < 0.01


def test_answers_are_what_the_whole_text_makes_most_likely(model):
    """Prompts of all lengths at once, with caches, against one forward pass over prompt and answer."""
    from nemotron_sft.train.generate import Sampling, generate

    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 5, 17, 18, 20, 31, 40, 64, 65, 70, 96, 100, 127, 128, 129, 190, 192, 200]
    prompts = [rng.integers(1, VOCABULARY, length).astype(np.int32) for length in lengths]
    answers = generate([model], prompts, [24 - i % 3 for i in range(len(prompts))], -1, Sampling(), 16)
    gaps, spread = [], 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64)).cuda()[None]
        with torch.no_grad():
            logits = model(tokens, torch.arange(tokens.shape[1]).cuda()[None], None).float()[0, len(prompt) - 1 : -1]
        gaps += (logits.max(-1).values - logits.gather(-1, tokens[0, len(prompt) :, None])[:, 0]).tolist()
        spread = max(spread, float(logits.std()))
    worst = largest(torch.tensor(gaps), model)
    print(f"\n{sum(gap > 0 for gap in gaps)} of {len(gaps)} tokens, by {worst:.3g} at most of {spread:.3g}")
    assert [len(answer) for answer in answers] == [24 - i % 3 for i in range(len(prompts))]
    assert worst < (0.01 if model.kind == "fp32" else 0.3) * spread  # bf16 rounds


def test_heads_of_the_model_stand_their_trial(model, monkeypatch):
    from types import SimpleNamespace

    from nemotron_sft.errors import UserError
    from nemotron_sft.train import trial

    started, random = SimpleNamespace(model=[model]), torch.cuda.get_rng_state()
    trial.AttentionTrial().on_train_start(started)
    assert torch.equal(random, torch.cuda.get_rng_state())
    monkeypatch.setattr(trial, "TOLERANCE", 0.0)
    if model.kind == "fp32":
        return trial.AttentionTrial().on_train_start(started)  # it has no attention to be tried
    with pytest.raises(UserError, match="attention with heads of 64 has wrong gradients for packed rows"):
        trial.AttentionTrial().on_train_start(started)
