"""Landmark attention in kernels of its own: each package stands by itself and takes from `common` what it shares."""
