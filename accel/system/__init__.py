"""State of this process and this machine: memory, processor, device, environment, other libraries' messages.

Imports nothing of accel but `errors` and `config`.
"""
