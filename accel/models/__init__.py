"""What a user's process imports: a deployable's folder opened as a model with transformers' `generate`.

Imports `runtime` and what is below it; no stage, no graph pass, no Hydra.
"""
