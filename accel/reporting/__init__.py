"""Certificate and plots.

Imports no stage: all data is passed in.
"""
