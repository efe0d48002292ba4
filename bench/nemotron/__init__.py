"""A slice of Nemotron 3 Nano (bench/train_hybrid.py): real widths and vocabulary, 6 layers; and who trains it."""

PACK, VOCABULARY = 4096, 131072
PATTERN = "MEM*ME"  # Mamba, mixture of experts, attention
HIDDEN, HEADS, GROUPS, WIDTH = 2688, 32, 2, 128
MAMBA_HEADS, MAMBA_WIDTH, MAMBA_GROUPS, STATE = 64, 64, 8, 128
EXPERTS, TOP, EXPERT, SHARED = 128, 6, 1856, 3712


def matrices(pattern: str = PATTERN) -> int:
    """Parameters of the matrix products that a token passes through, without the output layer."""
    inner = MAMBA_HEADS * MAMBA_WIDTH
    per_layer = {
        "M": HIDDEN * (2 * inner + 2 * MAMBA_GROUPS * STATE + MAMBA_HEADS) + inner * HIDDEN,
        "*": HIDDEN * (HEADS + 2 * GROUPS) * WIDTH + HEADS * WIDTH * HIDDEN,
        "E": HIDDEN * EXPERTS + 2 * HIDDEN * (TOP * EXPERT + SHARED),
    }
    return sum(per_layer[layer] for layer in pattern)


def flops_per_token(effective_context: float, pattern: str = PATTERN, frozen: bool = False) -> float:
    """FLOPs of a token in a step in which every token gets logits.

    6 per matrix parameter and token (4 where weights are frozen: there is no product for their gradients); causal
    attention inside documents, 2 products, half of them masked, 3 passes; Mamba's scan as Megatron-Bridge counts it
    (training/utils/flop_utils.py), 7 per element of the state and token, 3 passes. What is computed again is not
    counted.
    """
    passes = 4 if frozen else 6
    products = passes * (matrices(pattern) + HIDDEN * VOCABULARY)
    attention = 6 * pattern.count("*") * HEADS * WIDTH * effective_context
    scan = 3 * 7 * pattern.count("M") * MAMBA_HEADS * MAMBA_WIDTH * STATE
    return products + attention + scan
