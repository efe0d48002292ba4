"""What Bridge's forward step gets of a batch, and what it makes of it."""

from types import SimpleNamespace

import pytest
from test_batches import make_packs

from nemotron_sft.train.batches import collate, packed_dataset_provider
from nemotron_sft.train.checkpoints import alone


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
