"""Landmark attention for Hopper GPUs in Gluon: forward and backward for the plain case."""
