"""Compares a model's components and tokens with a reference: sample inputs, error measures, metrics, trials of a plan.

Used by the stages. Imports `models`, `runtime`, `graph` and `data`; no stage.
"""
