"""What a run will take, before it starts: parameters, tokens, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from landmark_cli.attention.backends import BACKENDS, Problem
from landmark_cli.attention.window import WindowSettings
from landmark_cli.models.layers import key_heads
from landmark_cli.softmax import is_joint
from landmark_cli.training.linear_cross_entropy import piece_rows
from landmark_cli.training.setup import has_plain_head, uses_cpu

# Bytes that the backward pass keeps of one token in one layer, for each unit of the width: the residual stream and the
# norms' inputs in float32; inputs of the four linear layers, queries, keys, values and the MLP's hidden layer, twice.
LAYER_BYTES_16, LAYER_BYTES_32 = 50, 84
# What reading chunk by chunk adds to that at most, as benchmarks/results/long-training-h200.md has it of attention in
# bf16 (5.8 GiB at 128k tokens of width 4096): of each token and unit of the width, what chunks and blocks gave and
# their gradients; of each token and head, its blocks' turns and their places in the lists, and log-sum-exps.
JOIN_BYTES_16, JOIN_BYTES_32 = 11, 20
CHOICE_BYTES, STATISTIC_BYTES, LSE_BYTES = 10, 20, 4
# What goes into a layer, and as much is what attention gives.
OUTPUT_BYTES_16, OUTPUT_BYTES_32 = 2, 4
# Without the fused loss, bytes of one token for each entry of the vocabulary: the logits, their float32 copy and its
# gradient.
LOGIT_BYTES_16, LOGIT_BYTES_32 = 12, 16
# Where attention is eager, bytes that the backward pass keeps of a layer for each query head, query and key, and as
# much while the layer is computed: logits, weights, and the block of each key.
EAGER_BYTES = 20
# Where hidden states are compared, bytes that the loss keeps of a token in one layer, for each unit of the width: how
# far it is from the teacher's, in float32; beside what the teacher's layer gave, in the run's precision.
DISTANCE_BYTES = 4
# Bytes of one parameter: float32 weight, AdamW's two moments, and in memory the gradient.
PARAMETER_BYTES, CHECKPOINT_BYTES = 16, 12


@dataclass(frozen=True)
class Estimate:
    """What a run will take. trained: of the parameters. memory: bytes on each device, state and activations together,
    in eager mode."""

    parameters: int
    trained: int
    state: int
    activations: int

    @property
    def memory(self) -> int:
        return self.state + self.activations

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint."""
        return CHECKPOINT_BYTES * self.trained


def estimate(
    model: nn.Module,
    batch_size: int,
    precision: str,
    fused_loss: bool = True,
    *,
    sequence_length: int | None = None,
    read: WindowSettings | None = None,
    checkpointing: bool = False,
    keep_retrieved: bool = True,
    frozen_bytes: float | None = None,
    fused_attention: bool = True,
    teacher: nn.Module | None = None,
    teacher_beside: bool = True,
    hidden_states: bool = False,
) -> Estimate:
    """Estimate a run of `model` (on the meta device is enough) on micro-batches of windows.

    Memory is counted for a replica on every device (one process, DDP). fused_attention: attention keeps no (T, T)
    matrices, as on a GPU. fused_loss: logits are formed piece by piece, and gradients with them, where the heads of
    model and teacher are such that they can be. sequence_length: tokens of a window, by default the model's trained
    length. read: how windows are read chunk by chunk, if they are.
    checkpointing: activations are computed again in the backward pass, one layer after the other. keep_retrieved: then
    all but what was retrieved, if windows are read. frozen_bytes: of a weight that is not trained; by default of the
    run's precision. teacher: the model that is learned from, held beside this one where `teacher_beside`; else it is
    this one without its adapters, of which embedding and head alone are held. hidden_states: its layers' outputs are
    compared with this one's.
    """
    config, half = model.config.get_text_config(), precision != "fp32"
    width, vocabulary, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    length = sequence_length or model.config.trained_length
    rows = batch_size * length
    layer = width * (LAYER_BYTES_16 if half else LAYER_BYTES_32)
    output = width * (OUTPUT_BYTES_16 if half else OUTPUT_BYTES_32)
    kept = output
    if read is not None:
        heads = config.num_attention_heads
        layer += width * (JOIN_BYTES_16 if half else JOIN_BYTES_32)
        layer += heads * (CHOICE_BYTES * read.top_k + STATISTIC_BYTES)
        if keep_retrieved:
            kept += output + heads * (CHOICE_BYTES * read.top_k + LSE_BYTES)
    matrices = 0
    if not fused_attention:
        matrices = EAGER_BYTES * batch_size * config.num_attention_heads * length * (read.chunk if read else length)
    number = 2 if half else 4
    logits_a_row = vocabulary + (teacher.config.get_text_config().vocab_size if teacher is not None else 0)
    if fused_loss and all(has_plain_head(one) for one in (model, teacher) if one is not None):
        loss = number * (piece_rows(rows, logits_a_row) * logits_a_row + (rows + vocabulary) * width)
    else:
        loss = rows * logits_a_row * (LOGIT_BYTES_16 if half else LOGIT_BYTES_32)
    if teacher is not None:
        # What it gave for its tokens, and the same at the student's positions.
        loss += number * 2 * rows * teacher.config.get_text_config().hidden_size
    if checkpointing:
        # Of the layers that little is kept, and all of one of them, after the loss has let go of its logits.
        activations = rows * layers * kept + max(rows * layer + 2 * matrices, loss)
    else:
        activations = layers * (rows * layer + matrices) + max(matrices, loss)
    if hidden_states:
        activations += layers * rows * width * (DISTANCE_BYTES + number)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state = PARAMETER_BYTES * trained + round((parameters - trained) * (frozen_bytes or number))
    if teacher is not None:
        layers = (teacher.get_input_embeddings(), teacher.get_output_embeddings())
        held = teacher.parameters() if teacher_beside else {id(layer.weight): layer.weight for layer in layers}.values()
        state += number * sum(parameter.numel() for parameter in held)
    return Estimate(parameters, trained, state, activations)


def attention_is_fused(model: nn.Module, device: str, read: WindowSettings | None, packed: bool) -> bool:
    """Whether attention keeps no (T, T) matrices: by kernels, which a GPU has, and on a CPU by PyTorch's own attention,
    where that serves.

    device: of the run's options. read: how windows are read chunk by chunk, if they are, which asks attention within
    chunks for its log-sum-exp. packed: documents do not see each other.
    """
    if not uses_cpu(device):
        return True
    config = model.config.get_text_config()
    freq = getattr(model.config, "landmark_freq", None)
    problem = Problem(
        "cpu",
        torch.float32,
        key_heads(config, 0)[1],
        None if freq is None else freq + 1,
        packed=packed,
        joint=is_joint(model.config),
        lse=read is not None,
    )
    return BACKENDS["sdpa"].why_not(problem) is None
