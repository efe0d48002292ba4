"""Every patch of Megatron, Transformer Engine and torch; each says why, for which version, and when it can go."""
