"""Other programs that load a deployable's folder: Optimum and Transformers.js."""
