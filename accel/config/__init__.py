"""The types of the configuration, and where its YAML files lie.

A type stands here, its values in `conf/`. Imports neither torch nor transformers, so that `--help` is quick.
"""
