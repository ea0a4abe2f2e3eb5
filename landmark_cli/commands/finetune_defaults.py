"""What `landmark finetune` takes where nobody says more: on the text alone (PLAIN), and beside a teacher (TAUGHT)."""

from __future__ import annotations

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
    "steps": 400,
    "lr": 1e-4,
    "answer_weight": 0.1,
    "answer_divergence_weight": 1.0,
}
