"""How transformers' own methods come to read with memory: `generate` and `forward` of every landmark model lead to
inference/calls.py, `save_pretrained` writes a model card, and `push_to_hub` uploads it.

`generate` and `save_pretrained` are one method of all models, so they are led here once. `forward` is each class's own:
a class is led here when the first of its models has landmarks. All are public, and their arguments are all that is
relied on, but for two. `_upload_modified_files`: transformers writes a card of its own between saving and that, and a
version without it uploads that card. `_sample`, the loop that `generate` runs in, where the same loop over a reader is
faster: a version in which it is called otherwise keeps its own. What has no landmarks goes to transformers' own as
before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from landmark_cli.errors import LandmarkError
from landmark_cli.families import is_ours

from .card import CARD, keep_card, write_card
from .layers import settle_layers

# The parameters of transformers' loop, and of what begins it.
LOOP = {
    "_sample": (
        "self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
        "model_kwargs",
    ),
    "_prefill": ("self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
}  # fmt: skip


def register() -> None:
    """Lead transformers' methods here. May be called again."""
    for owner, name, leading in (
        (GenerationMixin, "generate", _generating),
        (GenerationMixin, "_sample", _sampling),
        (GenerationMixin, "init_continuous_batching", _refusing),
        (PreTrainedModel, "post_init", _made),
        (PreTrainedModel, "save_pretrained", _saving),
        (PreTrainedModel, "_upload_modified_files", _uploading),
    ):
        plain = getattr(owner, name, None)
        if plain is None or _leads_here(plain) or (name == "_sample" and not _is_known_loop()):
            continue
        method = functools.wraps(plain)(leading(plain))
        method.reads_with_memory = True
        setattr(owner, name, method)


def reads_with_memory(model: PreTrainedModel) -> bool:
    """Whether a model was opened with landmark attention, or is one of ours, which generates by the reader it has."""
    config = model.config
    if getattr(config, "landmark_freq", None):
        return config._attn_implementation == "landmark"
    return is_ours(config.model_type)


def lead_forward(model: PreTrainedModel) -> None:
    """Have the forward of a model's class lead to inference/calls.py, if it generates text and does not yet."""
    kind = type(model)
    if isinstance(model, GenerationMixin) and not _leads_here(kind.forward):
        kind.forward = _forwarding(kind.forward)


def _leads_here(method: Callable) -> bool:
    return getattr(method, "reads_with_memory", False)


def _is_known_loop() -> bool:
    """Whether transformers' loop is called as it was when the one that takes its place was written."""
    methods = {name: getattr(GenerationMixin, name, None) for name in LOOP}
    return all(
        method is not None and tuple(inspect.signature(method).parameters) == LOOP[name]
        for name, method in methods.items()
    )


def _generating(plain: Callable) -> Callable:
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not reads_with_memory(self):
            return plain(self, *args, **kwargs)
        from landmark_cli.inference import calls

        return calls.generate(plain, self, *args, **kwargs)

    return generate


def _sampling(plain: Callable) -> Callable:
    def sample(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not reads_with_memory(self):
            return plain(self, *args, **kwargs)
        from landmark_cli.inference import calls

        return calls.sample(plain, self, *args, **kwargs)

    return sample


def _forwarding(plain: Callable) -> Callable:
    names = list(inspect.signature(plain).parameters)[1:]

    @functools.wraps(plain)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # A chunk of a text comes from the reader itself.
        if torch.compiler.is_compiling() or "landmark_chunk" in kwargs or not reads_with_memory(self):
            return plain(self, *args, **kwargs)
        from landmark_cli.inference import calls

        return calls.forward(plain, self, dict(zip(names, args, strict=False)) | kwargs)

    forward.reads_with_memory = True
    return forward


def _refusing(plain: Callable) -> Callable:
    def init_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if reads_with_memory(self):
            raise LandmarkError(
                "continuous batching keeps keys and values in pages that know no landmarks: give all prompts to "
                "generate as one batch instead"
            )
        return plain(self, *args, **kwargs)

    return init_continuous_batching


def _made(plain: Callable) -> Callable:
    def post_init(self: PreTrainedModel) -> None:
        plain(self)
        if getattr(self.config, "landmark_freq", None):
            settle_layers(self)
        if reads_with_memory(self):
            lead_forward(self)

    return post_init


def _saving(plain: Callable) -> Callable:
    def save_pretrained(self: PreTrainedModel, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> Any:
        if not is_main_process or not reads_with_memory(self):
            return plain(self, save_directory, is_main_process=is_main_process, **kwargs)
        write_card(self, save_directory)
        if kwargs.get("push_to_hub"):
            self.card_to_push = (Path(save_directory) / CARD).read_text(encoding="utf-8")
        try:
            return plain(self, save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            vars(self).pop("card_to_push", None)

    return save_pretrained


def _uploading(plain: Callable) -> Callable:
    def upload(self: PreTrainedModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if reads_with_memory(self):
            keep_card(self, working_dir, vars(self).get("card_to_push"))
        return plain(self, working_dir, *args, **kwargs)

    return upload
