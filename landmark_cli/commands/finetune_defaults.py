"""What `landmark finetune` takes where nobody says more: on the text alone (PLAIN), and beside a teacher (TAUGHT)."""

from __future__ import annotations

# SmolLM2-135M kept most of what it could do and found facts eight times past its positions after so many steps with
# these weights (docs/results.md). Its highest learning rate is less for wider models: it goes by WIDTH over theirs.
WIDTH = 576
PLAIN = {
    "sequence_length": 2048,
    "batch_size": 2,
    "accumulation": 8,
    "steps": 15_000,
    "lr": 2e-5,
    "eval_windows": 128,
    "answer_weight": 1.0,
}
TAUGHT = {
    "steps": 900,
    "lr": 3e-4,
    "answer_weight": 0.02,
    "answer_divergence_weight": 0.05,
}
# Of the gate's loss, where landmarks learn by it alone.
GATE = 1.0
# What answers weigh where nobody has said so, in recipes that runs of earlier versions saved too.
UNASKED = {
    "answer_weight": (0.0, 1.0, TAUGHT["answer_weight"]),
    "answer_divergence_weight": (0.0, TAUGHT["answer_divergence_weight"]),
}
