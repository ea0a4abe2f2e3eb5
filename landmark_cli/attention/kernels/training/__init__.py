"""Landmark attention in portable Triton kernels: forward, backward, and the operator that autograd sees."""

from .op import landmark_attention, why_not

__all__ = ["landmark_attention", "why_not"]
