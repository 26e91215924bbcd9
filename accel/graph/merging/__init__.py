"""Both decoders in one graph, every weight stored once."""
