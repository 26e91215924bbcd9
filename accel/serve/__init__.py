"""HTTP server over deployables: `app` speaks HTTP, `opening` chooses what decodes, `protocol` is what they know of each other."""
