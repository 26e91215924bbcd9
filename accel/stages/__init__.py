"""Stages of the pipeline, one module each.

Each module ends in its `STAGE`: the artifacts it reads, what its key depends on, and the function that runs it. A stage
is a pure function of its configuration, its input artifacts and the adapter. May import every package but `cli`.
"""
