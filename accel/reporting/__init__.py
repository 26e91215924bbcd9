"""The certificate and the plots.

Imports no stage: what it draws is handed to it.
"""
