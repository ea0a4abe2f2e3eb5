"""Landmark attention: its definition, its fused twins, and the block cache that reads any length."""
