"""Weights that are quantized once."""
