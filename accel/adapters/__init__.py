"""Adapter types (`Architecture`, components, tensor specs) and the registry that finds adapters.

Third parties import it. It imports `config`, `errors` and `system` only.
"""
