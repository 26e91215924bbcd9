"""Comparison of accel's server with those of other libraries, under the same load over HTTP."""
