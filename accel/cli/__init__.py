"""The command line: composes and validates the configuration, runs the stages, prints what they found.

The only package that knows Hydra's application and the only one that prints.
"""
