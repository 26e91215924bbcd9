"""HTTP server over deployables: `app` speaks HTTP, `scheduler` decodes, `protocol` is what they know of each other."""
