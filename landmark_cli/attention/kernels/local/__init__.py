"""Attention of layers with a sliding window in portable Triton kernels: forward and backward, on any NVIDIA GPU."""
