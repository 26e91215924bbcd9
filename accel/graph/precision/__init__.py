"""Which nodes stay in FP32 and why, and the conversion to 16 bits."""
