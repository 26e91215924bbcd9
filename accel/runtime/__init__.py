"""Where a graph runs: sessions, binding and DLPack. Knows neither Hydra nor the stages."""
