"""Adapter types (`Architecture`, components, tensor specs) and the registry that finds adapters.

Imported by third parties. Imports `config`, `errors` and `system` only.
"""
