"""Packs in, checkpoints out."""
