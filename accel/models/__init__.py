"""Loading of deployables: a folder opened as a model with transformers' `generate`.

A user's process imports this package, so it imports `accel.runtime` and the layers below only: no stage, no graph pass,
no Hydra.
"""
