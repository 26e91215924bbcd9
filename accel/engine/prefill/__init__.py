"""Prompts of decoder-only models on a GPU, by the plan of a decode step: every token is a row of it."""
