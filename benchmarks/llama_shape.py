"""Fine-tune the shape of Llama 3 8B with random weights: the training of `landmark finetune` without a model to open.

    accelerate launch --config_file recipes/llama/fsdp_8gpu.yaml --num_processes 1 \\
        benchmarks/llama_shape.py --layers 12 data=TOKEN_FILES output=runs/shape steps=12 save_every=0

NAME=VALUE are options of `landmark finetune` on top of the recipe llama/finetune_7b; gradient checkpointing is on.
Model, batches, accelerate object and loop are made as the command makes them. Only the weights are not read: they are
drawn after the model has been sharded, each process its own shards, the same whole weights for any number of processes.
On the CPU (device=cpu) accelerate is told that its processes are accelerators, so FSDP shards there too.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY = 128_256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
}
TINY = SHAPE | {"vocab_size": 51_200, "hidden_size": 64, "intermediate_size": 128}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def parameter_count(layers: int) -> int:
    """Weights of the shape with so many layers."""
    width, hidden, heads = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_attention_heads"]
    keys = width * SHAPE["num_key_value_heads"] // heads
    return 2 * VOCABULARY * width + width + layers * (2 * width * (width + keys) + 3 * width * hidden + 2 * width)


def empty_model(layers: int, tiny: bool, landmark_freq: int, trained_length: int) -> nn.Module:
    """The model in memory that nothing has touched, so that it takes none yet."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = TINY if tiny else SHAPE
    config = LlamaConfig(**shape, num_hidden_layers=layers)
    config.landmark_freq, config.landmark_token_id = landmark_freq, shape["vocab_size"] - 1
    config.trained_length, config.top_k_blocks = trained_length, 4
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    # Its angles are no weights, and are needed.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.set_attn_implementation("landmark")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model.train()


@torch.no_grad()
def fill(module: nn.Module, rank: int, processes: int) -> None:
    """Draw the weights where they lie: one tensor at a time, of which each process keeps its shard."""
    for number, parameter in enumerate(module.parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.dim() == 1:
            local.fill_(1.0)
            continue
        generator = torch.Generator(device=local.device).manual_seed(number)
        whole = torch.randn(parameter.shape, generator=generator, device=local.device).mul_(0.02)
        pieces = whole.chunk(processes) if isinstance(parameter, DTensor) else [whole]
        if local.numel():
            local.copy_(pieces[rank if len(pieces) > 1 else 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a small width instead")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE")
    given = parser.parse_args()
    pairs = (option.split("=", 1) for option in given.options)
    values = {name: yaml.safe_load(value) for name, value in pairs}
    if values.get("device") == "cpu":
        from accelerate.state import PartialState

        from tests.training.fsdp_on_cpu import begin_as_on_gpus

        PartialState.__init__ = begin_as_on_gpus

    import landmark_cli.models  # noqa: F401  registers the attention
    from landmark_cli.commands.finetune import FinetuneOptions
    from landmark_cli.commands.run_loop import begin, carry_out, make_loop
    from landmark_cli.data.training_data import TrainingData
    from landmark_cli.options import build, load_recipe

    recipe = load_recipe("llama/finetune_7b", FinetuneOptions, "finetune")
    lists = {name: [value] for name, value in values.items() if name == "data"}
    options = build(FinetuneOptions, recipe | {"model": "the shape of Llama 3 8B", "eval_every": 0} | values | lists)
    data = TrainingData.open([Path(name) for name in options.data], validation=False)
    with begin(options, "llama-shape") as begun:
        accelerator = begun[0]
        model = empty_model(given.layers, given.tiny, options.landmark_freq, options.sequence_length)
        more = {"landmarks_in_loss": options.landmarks_in_loss, "identity": {}}
        loop = make_loop(options, begun, model, model.config, data, **more)
        fill(loop.module, accelerator.process_index, accelerator.num_processes)
        carry_out(options, "finetune", model.config, loop)
        accelerator.end_training()


if __name__ == "__main__":
    main()
