"""Order and reuse of stages; artifacts on disk and the keys that name them.

Refers to stages by name only: a module of `accel.stages` is imported when its stage is needed. Stages import
`pipeline.stage`.
"""
