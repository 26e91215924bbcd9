"""Inputs of models: tokenized text, text files, datasets and sound; and the sample texts and model that accel ships.

Imports torch and transformers; no graph, no runtime.
"""
