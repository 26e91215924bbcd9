"""From logits to sequences: the loops that `generate` runs, and the choice of a token inside them."""
