"""Models whose attention is landmark attention, each a model of the transformers library.

Importing this package registers the models with transformers, before any of its modules can be asked for.
"""

import sys


def register() -> None:
    """Make our model types and the attention "landmark" known to transformers' Auto classes. May be called again."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from landmark_cli.attention import dispatch

    from . import calls, decoders
    from .gpt import GPTConfig, GPTForCausalLM, GPTModel
    from .llama_with_landmark import LlamaWithLandmarkConfig

    dispatch.register()
    calls.register()
    decoders.register()
    AutoConfig.register(GPTConfig.model_type, GPTConfig, exist_ok=True)
    AutoConfig.register(LlamaWithLandmarkConfig.model_type, LlamaWithLandmarkConfig, exist_ok=True)
    AutoModel.register(GPTConfig, GPTModel, exist_ok=True)
    AutoModelForCausalLM.register(GPTConfig, GPTForCausalLM, exist_ok=True)
    # By this table pipelines know which models generate text.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(GPTConfig.model_type, GPTForCausalLM.__name__)
    # And among its own names `transformers serve` looks for the class that a config.json names. Loading transformers'
    # models may put another module object in the place of the library's first.
    setattr(sys.modules["transformers"], GPTForCausalLM.__name__, GPTForCausalLM)


register()
