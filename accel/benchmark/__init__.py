"""Timing and memory of a deployable beside other ways to run the same model.

A benchmark compares backends (`backends`), which generate in turn (`schedule`), each model in a worker process of its
own (`worker`). Imports `models`, `runtime` and everything below them; no stage.
"""
