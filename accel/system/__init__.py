"""This process and this machine: memory, processor and device, other libraries' messages.

Imports nothing of accel but `errors` and `config`.
"""
