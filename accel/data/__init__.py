"""What models are asked with: tokenised text, files of text, sound; and what ships with accel: sample texts, a model.

Imports torch and transformers; no graph, no runtime.
"""
