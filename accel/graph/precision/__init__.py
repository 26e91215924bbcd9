"""Precision plans: which nodes stay in FP32 and why, and the conversion of the others to FP16 or bfloat16."""
