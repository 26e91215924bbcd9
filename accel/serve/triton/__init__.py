"""Model repositories for Triton: https://github.com/triton-inference-server/python_backend.

`repository` writes one, and `model.py` is copied into it; when Triton runs it, `answering` answers the requests.
"""
