"""Graph passes that put several nodes into one, often an operator of ONNX Runtime's own."""
