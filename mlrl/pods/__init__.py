"""Pods without a TPU: what an experiment's own programs would need of a named TPU topology."""
