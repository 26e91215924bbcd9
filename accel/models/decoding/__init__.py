"""Decoding: the loops that `generate` runs, and the selection of the next tokens from logits."""
