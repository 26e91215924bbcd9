"""HTTP server over deployables.

`requests` turns bodies into sequences of tokens, `scheduling` decodes them and `http` answers; `protocol` is what they
know of each other. `replicas` runs the server's application in several processes. `triton` offers the same to Triton's
server.
"""
