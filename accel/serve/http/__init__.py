"""The application that answers over HTTP: its routes, limits, metrics and page, and the server around it."""
