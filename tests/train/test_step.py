"""What Bridge's forward step gets of a batch, and what it makes of it."""

from types import SimpleNamespace

import pytest
from test_batches import make_packs

from nemotron_sft.train.batches import collate, packed_dataset_provider
from nemotron_sft.train.checkpoints import alone
from nemotron_sft.train.compat.cpu import adapt_model
from nemotron_sft.train.generate import _for_inference
from nemotron_sft.train.step import ForwardStep

SMALL = dict(
    hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, num_query_groups=2, kv_channels=16, mamba_num_heads=2,
    mamba_head_dim=16, mamba_num_groups=2, mamba_state_dim=16, vocab_size=256, seq_length=64,
    calculate_per_token_loss=True,
)  # fmt: skip


@pytest.mark.parametrize("stage", ["first", "middle", "last"])
def test_every_pipeline_stage_learns_where_documents_begin(stage, bridge, monkeypatch):
    from megatron.bridge.training import gpt_step
    from megatron.core.parallel_state import get_context_parallel_group

    for other in ("first", "last"):
        monkeypatch.setattr(gpt_step, f"is_pp_{other}_stage", lambda group, other=other: other == stage)
    batch = collate(make_packs([[10, 20, 30], [64]]))
    config = SimpleNamespace(dataset=packed_dataset_provider("nowhere", {}, 0, 0, (1, 1)), model=SimpleNamespace())
    with alone():
        groups = SimpleNamespace(pp=None, cp=get_context_parallel_group())
        *_, packed = gpt_step.get_batch(iter([batch]), config, pg_collection=groups)
    assert packed["cu_seqlens_q"].tolist() == batch["cu_seqlens_q"].tolist()


def test_a_batch_that_every_chunk_of_an_interleaved_pipeline_reads_counts_once(bridge, monkeypatch):
    def forward_step(state, batches, model, return_schedule_plan):
        next(batches)
        return None, None

    monkeypatch.setattr("megatron.bridge.training.gpt_step.forward_step", forward_step)
    step, batch = ForwardStep(), collate(make_packs([[10, 20, 30], [64]]))
    monkeypatch.setattr(step.losses, "watch", lambda *arguments: None)
    state = SimpleNamespace(_flops_seqlen_sum=0)
    for stage in (0, 1, 2):
        step(state, iter([batch]), SimpleNamespace(vp_stage=stage))
    counts = batch["counts"]
    assert (step.tokens, step.trained, step.packs) == (counts["tokens"], counts["trained"], counts["packs"])


def test_heads_that_predict_further_learn_no_label_that_is_not_trained(bridge):
    import torch
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

    batch = collate(make_packs([[10, 20, 30], [33, 31]]), mtp_depth=1)
    packed = get_packed_seq_params({key: value for key, value in batch.items() if "seqlen" in key})
    other_labels = torch.where(batch["loss_mask"] > 0, batch["labels"], 7)
    provider = HybridModelProvider(hybrid_layer_pattern="M*/*-", mtp_num_layers=1, **SMALL)
    adapt_model(provider)
    with alone():
        provider.finalize()
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        step = ForwardStep()
        step._hook(model)
        step._batch, step._loss_mask = batch, batch["loss_mask"]
        gradients = []
        for labels, positions in ((batch["labels"], None), (other_labels, None), (other_labels, True)):
            step._positions = positions and batch["trained_positions"]
            model.zero_grad()
            losses = model(batch["tokens"], batch["position_ids"], None, labels=labels, packed_seq_params=packed)
            (losses * batch["loss_mask"]).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "mtp" in name]))
    plain, other, kept = gradients
    assert plain.abs().max() > 0.01
    assert torch.allclose(plain, other, atol=1e-6) and torch.allclose(plain, kept, atol=1e-5)


@pytest.mark.parametrize("last", ["E", "-"])
def test_the_last_layer_works_for_trained_tokens_alone_and_routes_all(last, bridge):
    import torch
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

    batch = collate(make_packs([[10, 20, 30], [33, 31]]))
    packed = get_packed_seq_params({key: value for key, value in batch.items() if "seqlen" in key})
    kept = torch.nonzero(batch["loss_mask"][0])[:, 0]
    provider = HybridModelProvider(
        hybrid_layer_pattern=f"M*E{last}", num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24,
        moe_shared_expert_intermediate_size=40, moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True, moe_aux_loss_coeff=0.1, moe_token_dispatcher_type="alltoall", **SMALL,
    )  # fmt: skip
    adapt_model(provider)
    results = []
    with alone():
        provider.finalize()
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        step, rows, layer = ForwardStep(), [], model.decoder.layers[-1]
        step._hook(model)
        (layer.mlp.experts if last == "E" else layer.mlp).register_forward_hook(
            lambda module, given, output: rows.append(len(given[0]))
        )
        for positions in (None, kept):
            step._positions = positions
            model.zero_grad()
            losses = model(
                batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed
            )
            (losses * batch["loss_mask"]).sum().backward()
            counts = [
                module.local_tokens_per_expert.clone() for module in model.modules() if hasattr(module, "expert_bias")
            ]
            results.append([losses * batch["loss_mask"], *(p.grad.clone() for p in model.parameters())])
            assert sum(map(torch.sum, counts)) == 128 * 2 * (2 if last == "E" else 1) * len(results)
    assert rows == ([128 * 2, len(kept) * 2] if last == "E" else [128, len(kept)])
    assert len(kept) < 100 and all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*results, strict=True))
    one = 32 * 24 * 2 * 2 + 32 * 40 * 2 if last == "E" else 32 * 48 * 2
    assert step._flops_per_token == 6 * (32 * 256 + one)


def test_answering_leaves_every_switch_of_sequence_parallelism_as_it_was(bridge):
    import torch

    def module(*children, **switches):
        made = torch.nn.Sequential(*children)
        vars(made).update(switches)
        return made

    config, own = SimpleNamespace(sequence_parallel=True), SimpleNamespace(sequence_parallel=True)
    layer = module(config=config, sequence_parallel=True)
    inner = module(config=own, sequence_parallel=False)  # as of an adapter
    adapter = module(inner, disable_sequence_parallel_comm=False)
    model = module(layer, adapter, config=config, scatter_to_sequence_parallel=True)
    owners = (config, own, layer, inner, adapter, model)
    before = [{name: value for name, value in vars(each).items() if "sequence" in name} for each in owners]
    with _for_inference([model]):
        assert not any(getattr(each, "sequence_parallel", False) for each in owners)
        assert adapter.disable_sequence_parallel_comm and not model.scatter_to_sequence_parallel
    assert before == [{name: value for name, value in vars(each).items() if "sequence" in name} for each in owners]
