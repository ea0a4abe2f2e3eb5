"""What the kernels of several packages need."""
