"""What `landmark finetune` warns of before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from landmark_cli.commands.run_options import RECIPE
from landmark_cli.console import counted, warn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from landmark_cli.commands.finetune import FinetuneOptions


def warn_of_course(given: FinetuneOptions, options: FinetuneOptions) -> None:
    """Warn where a run goes on that does not say with which options it was begun, and takes today's defaults for what
    its checkpoints do not tell. given: the options before they were filled up."""
    from landmark_cli.training.runs import newest_checkpoint

    output = options.output
    if not options.resume or output is None or (output / RECIPE).exists() or newest_checkpoint(output) is None:
        return
    taken = [f"--{name} {getattr(options, name):g}" for name in ("steps", "lr") if getattr(given, name) is None]
    if taken:
        warn(
            f"{output} has no {RECIPE}, in which a run says with which options it was begun: it goes on with "
            f"{' and '.join(taken)}, today's defaults; give them if they were others"
        )


def warn_of_blocks(options: FinetuneOptions, config: PreTrainedConfig) -> None:
    """Warn where a model that has landmarks already is to get blocks of another size, or landmarks that do something
    else. config: the model's."""
    from landmark_cli.softmax import softmax_of

    found = getattr(config, "landmark_freq", None)
    if found is not None and softmax_of(config) != options.softmax:
        warn(
            f"{options.model} was trained with --softmax {softmax_of(config)}, and this run has {options.softmax}, in "
            f"which landmarks do something else: without --softmax it goes on with what it has learned"
        )
    if found not in (None, options.landmark_freq):
        warn(
            f"{options.model} was trained with a landmark after every {counted(found, 'text token')}, and this run has "
            f"one after every {options.landmark_freq}: --landmark-freq {found} goes on with what it has learned"
        )
