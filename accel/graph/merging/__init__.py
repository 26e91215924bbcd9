"""Merging of prefill and decode graphs into one model that stores every weight once."""
