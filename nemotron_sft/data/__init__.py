"""Chat records in, packs out."""
