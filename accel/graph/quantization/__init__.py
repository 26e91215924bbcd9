"""Low-bit weights of matrix products: formats, the products that can take them, and their conversion."""
