"""A CUDA kernel that runs all fused operations of a plan in one launch."""
