"""Decoding of a server's requests: a running batch where the model can have rows, else padded batches.

Schedulers know token ids only, and nothing of HTTP.
"""
