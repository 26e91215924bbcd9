"""Times a deployable beside other ways to run the same model, each backend in a process of its own.

Holds the backends, the timer, the schedule and the worker processes. Imports `models`, `runtime` and everything below
them; no stage.
"""
