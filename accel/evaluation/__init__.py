"""Comparison of a model's components and tokens with a reference: sample inputs, error measures, metrics, plan trials.

Used by the stages. Imports `models`, `runtime`, `graph` and `data`; no stage.
"""
