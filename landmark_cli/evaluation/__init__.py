"""Measure models: perplexity on held-out text, pass keys hidden in filler, EleutherAI's harness."""
