"""Schedulers in a process of their own, beside the one that answers HTTP: each has a Python interpreter to itself.

In one process both compute Python under one lock. A step of 64 rows then waits for HTTP several times, each time until
the lock is free: emulated steps of 1.9 ms took 3.4 ms, and 7 with streamed replies.
"""
