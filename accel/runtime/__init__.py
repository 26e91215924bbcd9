"""Execution of exported graphs: sessions, tensor exchange, KV caches, CUDA graphs. Imports neither Hydra nor stages."""
