"""Comparison with other libraries that run the same models on a CPU: `python -m scripts.peers --help`.

The peers have a virtual environment of their own. `worker` and `libraries` run there as well, so they import nothing of
accel at the top.
"""
