"""What stands around the loop: the accelerate object, the model as its loss, the seed of a step."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
    parse_flag_from_env,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from landmark_cli.attention import window_operators
from landmark_cli.attention.dispatch import LandmarkLayout
from landmark_cli.attention.window import ReadingWindow, WindowSettings
from landmark_cli.data.landmarks import IGNORED_TARGET
from landmark_cli.errors import LandmarkError, UsageError, import_extra
from landmark_cli.evaluation.score import score
from landmark_cli.families import FAMILIES
from landmark_cli.models.device import find_device
from landmark_cli.models.rotary import landmark_angles
from landmark_cli.training.compiled import of_any_length
from landmark_cli.training.linear_cross_entropy import linear_cross_entropy

T = TypeVar("T")

SUMS = torch.float64
"""Of the sums that evaluation adds up over many windows."""
SCORED_ROWS = 4096


def uses_cpu(device: str) -> bool:
    """Whether a run is on the CPU: device is "cpu", accelerate was told so, or there is nothing else."""
    return (
        device.partition(":")[0] == "cpu"
        or parse_flag_from_env("ACCELERATE_USE_CPU")
        or not torch.accelerator.is_available()
    )


def use_device(name: str) -> None:
    """Have a run be on the device that `--device` names, before anything else asks for one.

    name: as `find_device` takes it. Raises UsageError where there is no such device, and for one of several where each
    process of a launch has its own.
    """
    if name == "auto":
        return
    device = find_device(name)
    if device.index is None or device.type == "cpu":
        return
    if "LOCAL_RANK" in os.environ:
        raise UsageError(
            f"--device {name}: each process of a launch has a device of its own; leave --device out, and let the "
            "launcher name devices (CUDA_VISIBLE_DEVICES, accelerate's --gpu_ids)"
        )
    # What accelerate and the kernels run on is the current device.
    torch.accelerator.set_device_index(device.index)


def process_state(device: str) -> PartialState:
    """Which process this is, of how many. The processes of a launch find each other in this call."""
    if not torch.distributed.is_initialized():
        # Forget what an earlier run of this Python process left, which may have been on another device.
        PartialState._reset_state()
    return PartialState(cpu=uses_cpu(device))


def by_main_process(work: Callable[[], T]) -> T:
    """What `work` returns in the main process, in every process. Every process calls it.

    Raises the LandmarkError that the main process raises, in every process, so that none waits for it in vain.
    """
    result = None
    if PartialState().is_main_process:
        try:
            result = work()
        except LandmarkError as error:
            result = error
    (result,) = broadcast_object_list([result])
    if isinstance(result, LandmarkError):
        raise result
    return result


def make_accelerator(
    *,
    precision: str,
    accumulation: int,
    batch_size: int = 1,
    clip: float = 0.0,
    device: str = "auto",
    compile: bool = False,
    tf32: bool = True,
    log_with: list[str] | None = None,
    output: Path | None = None,
) -> Accelerator:
    """The accelerate object of a run; how many processes there are, FSDP and DeepSpeed come from the launcher.

    batch_size, clip: only DeepSpeed has to know these beforehand.

    Raises LandmarkError where a tracker's package is missing or the precision needs a GPU.
    """
    for tracker in log_with or ():
        import_extra(tracker, tracker)
    dynamo = {"dynamo_plugin": TorchDynamoPlugin(backend="inductor", dynamic=False)} if compile else {}
    # Another run in this process may have been of another precision.
    AcceleratorState._reset_state()
    cpu = uses_cpu(device)
    if precision == "fp16" and cpu:
        raise LandmarkError("--precision fp16 needs a GPU, and none is in use: take bf16 or fp32")
    if tf32 and not cpu:
        allow_tf32()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=log_with or None,
        project_dir=output,
        deepspeed_plugin=_deepspeed(batch_size, accumulation, clip),
        **dynamo,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations import unset_hf_deepspeed_config

        # Else transformers would open models in shards already, and landmarks are added to whole models.
        unset_hf_deepspeed_config()
    if accelerator.distributed_type == DistributedType.FSDP:
        _keep_sums_exact(accelerator)
        # Else all processes but one would open models without weights, and landmarks are added, and teachers compared,
        # in each.
        disable_fsdp_ram_efficient_loading()
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return accelerator


def allow_tf32() -> None:
    """Let products of float32 matrices be made of tf32 on a GPU, whichever of torch's two settings for this was used
    before: the older one, which compilers still ask, raises an error where the newer one has been set already."""
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        torch.set_float32_matmul_precision("high")


def _keep_sums_exact(accelerator: Accelerator) -> None:
    """Have FSDP add up gradients in float32, as DDP does, and FSDP 2 hand out the loss as it was computed. Weights and
    activations stay in the precision of the run."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is None:
        return
    outputs = {"output_dtype": None} if accelerator.is_fsdp2 else {}
    plugin.mixed_precision_policy = dataclasses.replace(
        plugin.mixed_precision_policy, reduce_dtype=torch.float32, **outputs
    )


def _deepspeed(batch_size: int, accumulation: int, clip: float) -> DeepSpeedPlugin | None:
    """The run's settings for DeepSpeed, where the launcher chose DeepSpeed; its other settings are the launcher's."""
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    import_extra("deepspeed", "deepspeed")
    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=accumulation, gradient_clipping=clip, zero3_save_16bit_model=True
    )
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size
    return plugin


class LossModel(nn.Module):
    """A causal language model as its summed loss, so that logits never leave what is wrapped or compiled around it.

    For all else it stands in for the model: accelerate asks for its layers to shard, its tied weights, its config.

    group_dropout: probability that attention leaves an earlier block out. fused_loss: work the loss out without holding
    the logits (see linear_cross_entropy.py), where the model's head is such that the result is the same. fp32_residual:
    whether under bf16 autocast the residual stream, the sum that every layer adds to, stays in float32. With the
    residual stream in bfloat16, as in a model that is bfloat16 throughout, a step takes some 5% less time. read: have
    windows read chunk by chunk, as a reader would (see attention/window.py); None has them attended to as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        group_dropout: float = 0.0,
        fused_loss: bool = False,
        fp32_residual: bool = False,
        read: WindowSettings | None = None,
    ) -> None:
        super().__init__()
        self.wrapped = model
        if not fp32_residual:
            # The residual stream begins with the embeddings.
            model.get_input_embeddings().register_forward_hook(bf16_under_autocast)
        self.group_dropout = group_dropout
        self.fused_loss = fused_loss and has_plain_head(model)
        self.read = read
        self._angles = None if read is None else landmark_angles(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        controlled: Tensor | None = None,
        weights: Tensor | None = None,
        answers: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Sum over the targets that are not -100 of their negative log-likelihood, each times its weight.

        input_ids, labels: (B, T), labels being the targets of their own positions. position_ids, controlled: (B, T), of
        the paper's variants. weights: (B, T) float32, of the targets; None weighs all 1. answers: (B, T) bool, for
        evaluation: with it (4,) float64 is returned, the sum and `score` of those targets alone. cu_seqlens: boundaries
        of documents that do not see each other, counted over all rows one after the other.
        """
        extra = self.extra(input_ids, position_ids, controlled, cu_seqlens)
        if self.fused_loss:
            hidden, head = self.states(input_ids, extra)
            loss = linear_cross_entropy(hidden, head, labels, weights)
            if answers is None:
                return loss
            return with_score(loss, hidden, labels, answers, lambda piece: nn.functional.linear(piece, head))
        if weights is not None:
            logits = self.wrapped(input_ids=input_ids, use_cache=False, **extra).logits.float()
            losses = nn.functional.cross_entropy(
                logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
            )
            # A target that weighs nothing adds nothing, even where its loss is infinite.
            return torch.where(weights.flatten() > 0, losses * weights.flatten(), 0.0).sum()
        output = self.wrapped(input_ids=input_ids, labels=labels, shift_labels=labels, use_cache=False, **extra)
        count = (labels != IGNORED_TARGET).sum()
        loss = torch.where(count > 0, output.loss * count, 0.0)
        return loss if answers is None else with_score(loss, output.logits, labels, answers, lambda piece: piece)

    def states(self, input_ids: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The model's last hidden states, (B, T, E), and the weight of its head, (V, E). extra: see `extra`."""
        model = without_adapters(self.wrapped)
        hidden = model.base_model(input_ids=input_ids, use_cache=False, **extra).last_hidden_state
        return hidden, model.get_output_embeddings().weight

    def extra(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        controlled: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> dict[str, Any]:
        """What the model is called with besides its tokens, so that it attends as `forward` and the settings say."""
        extra = {} if position_ids is None else {"position_ids": position_ids}
        if self.read is not None:
            window = self._window(input_ids, cu_seqlens)
            extra |= {"position_ids": window.position_ids, "landmark_window": window}
        elif controlled is not None or cu_seqlens is not None or (self.group_dropout and self.training):
            extra["landmark_layout"] = self._layout(controlled, cu_seqlens)
        return extra

    def _window(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> ReadingWindow:
        settings = self.read
        if not self.training:
            settings = dataclasses.replace(settings, explore=0.0)
        seed = torch.randint(1 << 62, ()) if settings.explore else None
        angles = self._angles.values
        return ReadingWindow.make(settings, *input_ids.shape, angles, cu_seqlens=cu_seqlens, explore_seed=seed)

    def _layout(self, controlled: Tensor | None, cu_seqlens: Tensor | None) -> LandmarkLayout:
        if cu_seqlens is not None:
            of_any_length(cu_seqlens)
        dropout = {}
        if self.group_dropout and self.training:
            # The seed is on the CPU, where reading it waits for nothing; the loop seeds torch for every step.
            dropout = {"dropout_p": self.group_dropout, "dropout_seed": torch.randint(1 << 62, ())}
        return LandmarkLayout(controlled=controlled, cu_seqlens=cu_seqlens, **dropout)


@torch.compiler.disable
def with_score(
    loss: Tensor, states: Tensor, labels: Tensor, answers: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """(4,) float64: a loss, and `score` of the targets that are of answers.

    states: (B, T, E), of which `logits_of` makes the logits, (rows, V); labels, answers: (B, T), see
    `LossModel.forward`. No more rows than there are answers get logits, and only some at a time.
    """
    wanted = answers & (labels != IGNORED_TARGET)
    sums = torch.zeros(3, dtype=SUMS, device=states.device)
    for rows, targets in zip(states[wanted].split(SCORED_ROWS), labels[wanted].split(SCORED_ROWS), strict=True):
        sums += score(logits_of(rows), targets)
    return torch.cat([loss.to(SUMS)[None], sums])


def bf16_under_autocast(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A forward hook: a module's output in bfloat16 under bf16 autocast. Not in float16: sums can leave its range."""
    device = output.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return output.to(torch.bfloat16)
    return output


def checkpoint_activations(model: nn.Module, keep_retrieved: bool = False) -> None:
    """Have a transformers model compute its activations again in the backward pass, in place of keeping them.

    keep_retrieved: all but what layers that read windows chunk by chunk retrieved with kernels, which is kept (see
    `window_operators.keep_retrieved`)."""
    # Newer versions of transformers say activation, not gradient, checkpointing.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False} | ({"context_fn": window_operators.keep_retrieved} if keep_retrieved else {}))


def without_adapters(model: nn.Module) -> nn.Module:
    """The transformers model that peft's wrapper holds, whose layers have the adapters in them; any other model as it
    is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_plain_head(model: nn.Module) -> bool:
    """Whether a model's logits are known to be its last hidden states times its head's weight, and nothing else."""
    model = without_adapters(model)
    family = FAMILIES.get(model.config.model_type) if isinstance(model, PreTrainedModel) else None
    if family is None:
        return False
    if family.beyond_head and (family.only_with is None or getattr(model.config, family.only_with) is not None):
        return False
    head = model.get_output_embeddings()
    return type(head) is nn.Linear and head.bias is None


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch for one step of one process, so that dropout needs no saved state to be repeated."""
    digest = hashlib.blake2b(f"{seed}/{step}/{process}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Show none of transformers' own progress bars while the block runs."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
