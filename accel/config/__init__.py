"""Types of the configuration, and the packages that hold its YAML files.

The values are in `conf/`. Imports neither torch nor transformers, so that `--help` is fast.
"""
