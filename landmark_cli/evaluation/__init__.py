"""Measure models: perplexity of all tokens or of those that need a long context, pass keys, RULER, the harness."""
