"""Which stages run, in which order, and what is reused; artifacts on disk and the keys that name them.

Knows stages by name only: `accel.stages` is loaded when a stage is needed. A stage imports `pipeline.stage`.
"""
