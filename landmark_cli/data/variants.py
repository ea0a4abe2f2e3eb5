"""What the paper's training variants draw at random for every row of a batch.

Source: arXiv 2305.16300, section 4.1.3 (context-miss token) and appendix (positions that jump).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from landmark_cli.data.batches import Batches


@dataclass(frozen=True)
class VariantBatches:
    """Batches with what the variants add to every row: a pure function of (seed, step, row), as the batches are.

    position_jump: after every landmark the positions jump ahead by a random whole number below this; 0 or 1 for no
    jumps. controlled_landmarks: probability that a landmark is controlled by the context-miss token.
    """

    batches: Batches
    seed: int
    position_jump: int = 0
    controlled_landmarks: float = 0.0

    @property
    def global_batch(self) -> int:
        return self.batches.global_batch

    def batch(self, step: int, start: int, stop: int) -> dict[str, Tensor]:
        """Rows `start` to `stop` of a step: input_ids and labels, with position_ids and controlled where wanted, each
        (n, T)."""
        batch = self.batches.batch(step, start, stop)
        length = batch["input_ids"].shape[1]
        block_size = self.batches.windows.landmark_freq + 1
        generators = [np.random.default_rng((self.seed, step, row)) for row in range(start, stop)]
        if self.position_jump > 1:
            blocks = -(-length // block_size)
            jumps = np.stack([generator.integers(0, self.position_jump, blocks) for generator in generators])
            # The first block stands at the positions that it has without jumps.
            ahead = (jumps.cumsum(1) - jumps).repeat(block_size, axis=1)[:, :length]
            batch["position_ids"] = torch.from_numpy(np.arange(length) + ahead)
        if self.controlled_landmarks > 0:
            drawn = np.stack([generator.random(length, dtype=np.float32) for generator in generators])
            batch["controlled"] = torch.from_numpy(drawn < self.controlled_landmarks)
        return batch
