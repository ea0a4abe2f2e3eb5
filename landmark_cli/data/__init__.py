"""From raw text to batches with landmarks: corpora, tokenizers, token files, landmarks, batches."""
