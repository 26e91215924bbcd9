"""From the nodes of a static decode graph to a plan of few fused operations."""
