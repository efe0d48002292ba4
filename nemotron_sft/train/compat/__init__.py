"""The one drawer for everything that reaches into other packages: torch, Megatron-Core, Megatron-Bridge, submitit.

    slim.py       import Megatron-Bridge without what fine-tuning never touches
    cpu.py        Megatron on a machine without a GPU, by means of
    cuda.py         requests for CUDA answered by the CPU
    attention.py    attention and rotary positions of packed rows
    mamba.py        Mamba layers
    gpu.py        what Megatron lacks, or does slowly, on a GPU
    optimizer.py  gradients scaled once; a resumed run at another learning rate
    adam.py         the update of weights in one fast pass
    adapters.py   LoRA's adapters inside the products that they belong to
    experts.py    mixtures of experts: all experts of a layer in one product
    bandwidth.py  norms, convolutions, gradients of embeddings and the norm of all in one pass over the memory
    last_layer.py the last MLP, or the last experts, for the tokens that have a loss
    mtp.py        heads that predict further tokens
    bridge.py     Bridge on either: where it finds configs, what it builds, what an adapter checkpoint holds
    conversion.py Hugging Face weights into a model: all of them, or none
    transformers.py what transformers computes on the CPU
    submitit.py   the sbatch script

To add a patch, write a function whose docstring says why it is needed, and register the names it replaces:

    @patch(
        {"megatron.core.some.module:Class.method": "(self, hidden_states, *args)"},
        seen="megatron-core 0.19.2",
        until="core accepts packed rows there",
    )
    def accept_packed_rows() -> None:
        '''Core's method refuses packed rows, although what it calls can take them.'''
        from megatron.core.some.module import Class

        def method(self, hidden_states, *args): ...

        Class.method = method

and call it from `use_cpu` or `use_gpu`. `registry.patch` compares what is installed with what the patch expects before
the function runs: a name that is gone, or has other parameters now, ends the command with one line that names the
patch. A private name that is only called is registered in the same way. tests/train/test_compat.py checks every entry,
also of patches that the test machine does not need, and that no name is replaced without one.
"""
