"""Landmarks' own queries in the joint softmax, in portable Triton kernels; text's are a library's matter."""
