"""What the training variants draw: the same for every split of a step, and what the paper says."""

import numpy as np
import torch

from landmark_cli.data.batches import Batches
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.data.variants import VariantBatches
from landmark_cli.data.windows import Windows


def make(folder, **settings) -> VariantBatches:
    with TokenFileWriter(folder / "train.bin", load_tokenizer("gpt2"), source="random ids") as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 50000, 3000))
    windows = Windows(sequence_length=33, landmark_freq=4, landmark_token_id=50260, eot_id=50256)
    batches = Batches([TokenFile.open(folder / "train.bin")], None, windows, global_batch=8, seed=3)
    return VariantBatches(batches, seed=3, **settings)


def test_positions_jump_ahead_after_landmarks_only(tmp_path):
    batch = make(tmp_path, position_jump=10).batch(2, 0, 8)
    positions = batch["position_ids"]
    steps = positions.diff(dim=1)
    after_landmark = (batch["input_ids"] == 50260)[:, :-1]
    assert torch.equal(positions[:, 0], torch.zeros(8, dtype=torch.long))
    assert (steps[~after_landmark] == 1).all()
    jumps = steps[after_landmark] - 1
    assert jumps.min() == 0 and jumps.max() == 9 and "controlled" not in batch


def test_controlled_landmarks_have_their_share(tmp_path):
    variants = make(tmp_path, controlled_landmarks=0.3)
    controlled = torch.cat([variants.batch(step, 0, 8)["controlled"] for step in range(20)])
    assert controlled.shape == (160, 33) and controlled.dtype == torch.bool
    assert abs(controlled.float().mean() - 0.3) < 0.03


def test_any_split_of_a_step_draws_the_same(tmp_path):
    variants = make(tmp_path, position_jump=5, controlled_landmarks=0.5)
    whole = variants.batch(7, 0, 8)
    parts = [variants.batch(7, start, stop) for start, stop in ((0, 3), (3, 4), (4, 8))]
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts])), name
    assert not torch.equal(whole["position_ids"], variants.batch(8, 0, 8)["position_ids"])
