"""A fine-tuned model published as its difference from weights that may not be passed on.

`make` writes the difference, `recover` adds the difference to the raw weights again. Two formats are read:

- ours (`manifest`): integer differences of bit patterns, new rows as they are, and a manifest with the sha256 of every
  tensor, so that recovering gives the tuned model bit for bit;
- that of the landmark attention authors' weight_diff.py (`authors`): float32 differences and one sum to check.

Everything goes tensor by tensor and piece by piece from mapped files to new ones.
"""
