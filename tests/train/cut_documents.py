"""Run by torchrun on two ranks: change one document of a row that context parallelism divides, and print who moved."""

import numpy as np
import torch
from test_batches import PACK, VOCABULARY, make_packs

from nemotron_sft.train.batches import collate
from nemotron_sft.train.start import start_bridge

machine = start_bridge()

from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider  # noqa: E402
from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from nemotron_sft.train.compat.attention import share_of  # noqa: E402
from nemotron_sft.train.compat.cpu import adapt_model  # noqa: E402

torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel(context_parallel_size=2)
model_parallel_cuda_manual_seed(1)
provider = HybridModelProvider(
    hybrid_layer_pattern="M*M-", hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2,
    kv_channels=16, mamba_num_heads=4, mamba_head_dim=16, mamba_num_groups=2, mamba_state_dim=16, mamba_chunk_size=16,
    vocab_size=VOCABULARY, seq_length=PACK, init_method_std=0.3, context_parallel_size=2,
)  # fmt: skip
adapt_model(provider)
provider.finalize()
(model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def token_losses(records):
    """This rank's share of the losses (t / 2,), and which of its tokens are of the second document."""
    batch = collate(records, 2)
    ends = batch["cu_seqlens_q_padded"][0]
    mine = share_of(machine.rank, 2, ends)
    packed = {key: value for key, value in batch.items() if "seqlen" in key}
    tokens, positions, labels = (batch[name][:, mine] for name in ("tokens", "position_ids", "labels"))
    with torch.no_grad():
        losses = model.eval()(tokens, positions, None, labels=labels, packed_seq_params=get_packed_seq_params(packed))
    return losses[0], (mine >= ends[1]) & (mine < ends[2])


records = make_packs([[10, 20, 30], [33, 31]])
before, second = token_losses(records)
changed = records.copy()
changed["input_ids"][0, 10:30] = (changed["input_ids"][0, 10:30] + 7) % VOCABULARY
after, _ = token_losses(changed)
moved = np.abs((after - before).numpy())
own = "moved" if moved[second].max() > 0.01 else "did not move"
print(f"rank {machine.rank}: others {moved[~second].max()}, own {own}")
torch.distributed.destroy_process_group()
