"""Analysis and rewriting of ONNX graphs with onnx_ir, independent of torch and Hydra."""
