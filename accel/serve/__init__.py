"""HTTP server over deployables.

`app` speaks HTTP, `opening` chooses the scheduler that decodes, `protocol` is what the two know of each other.
"""
