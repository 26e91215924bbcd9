"""Adapters, one module per shape of model. Loaded by name through `accel.registry`, never imported statically."""
