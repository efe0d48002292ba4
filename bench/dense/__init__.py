"""The dense model of bench/train_gpu.py (conf/model/dense_1b.yaml), and the contestants that train it."""

PACK, STEP_PACKS, VOCABULARY = 4096, 8, 32768
LAYERS, HIDDEN, FFN, HEADS, GROUPS = 16, 2048, 8192, 32, 8


def flops_per_step(effective_context: float) -> float:
    """6 FLOPs per matrix parameter and token, and causal attention: 2 products, half of them masked, 3 passes."""
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * GROUPS // HEADS
    matrices = LAYERS * (attention + 3 * HIDDEN * FFN) + HIDDEN * VOCABULARY
    return PACK * STEP_PACKS * (6 * matrices + 6 * LAYERS * HIDDEN * effective_context)
