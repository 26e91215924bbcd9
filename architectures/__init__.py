"""Adapters, one module per kind of model. `accel.adapters.registry` loads them by name; accel never imports them."""
