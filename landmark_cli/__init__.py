"""Landmark attention: train on short windows, read inputs of any length through retrieved blocks.

Importing this package makes the transformers library know the landmark models (`AutoModelForCausalLM.from_pretrained`
opens their directories) and the attention implementation "landmark".
"""

from landmark_cli.registration import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
