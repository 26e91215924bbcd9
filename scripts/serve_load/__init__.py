"""Measurement of accel's server under load, over HTTP."""
