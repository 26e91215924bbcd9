"""Command line: compose and validate the configuration, run the stages, print the results.

The only package that runs as a Hydra application, and the only one that prints.
"""
