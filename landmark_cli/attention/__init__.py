"""Landmark attention: its definition, its twins in kernels, and the block cache that reads any length."""
