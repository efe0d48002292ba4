"""Where everything came from: lineage.json, digests, Weights & Biases."""
