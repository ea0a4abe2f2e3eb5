"""Landmark attention in portable Triton kernels: forward and backward, on any NVIDIA GPU."""
