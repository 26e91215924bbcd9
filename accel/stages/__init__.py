"""One module per stage, each ending in its `STAGE`: what it takes, what its key depends on, and what runs.

A stage is a pure function of its configuration, the artifacts it takes and the adapter. Imports everything but `cli`.
"""
