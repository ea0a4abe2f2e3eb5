"""Puts a trained model into the package, in bfloat16, with its tokenizer and a card.

python recipes/demo/ship.py runs/demo-shipped-3 landmark_cli/assets/demo
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from landmark_cli.commands.models import MachineOptions, open_model
from landmark_cli.console import quantity
from landmark_cli.errors import LandmarkError
from landmark_cli.models.directory import put_in_place, save_model

LARGEST = 12_000_000
CARD = """# The model of `make demo`

{millions:.1f} million parameters, landmark attention in blocks of {freq} + 1 tokens, trained in windows of {length:,}
tokens by `recipes/demo/make.sh` from nothing but what the package holds: five novels of Jane Austen (Persuasion is
held out) and questions about facts that are hidden in them. It answers such questions and does little else.
`recipe.yaml` has the options of its training's last stage.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run that trained it")
    parser.add_argument("output", type=Path, help="where it is put, in place of what is there")
    options = parser.parse_args()
    size = ship(options.run, options.output)
    print(f"{options.output}: {quantity(size, 'B')}")


def ship(run: Path, output: Path) -> int:
    """Write the model of a run to `output`. Returns the bytes of all its files.

    Raises LandmarkError where they are more than LARGEST; nothing is written then.
    """
    model, tokenizer = open_model(str(run), MachineOptions(device="cpu", dtype="bfloat16"))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "demo"
        save_model(model, made, model.state_dict(), torch.bfloat16)
        tokenizer.save_pretrained(made)
        shutil.copy(run / "recipe.yaml", made)
        config = model.config
        millions = sum(weight.numel() for weight in model.parameters()) / 1e6
        card = CARD.format(millions=millions, freq=config.landmark_freq, length=config.trained_length)
        (made / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in made.iterdir())
        if size > LARGEST:
            raise LandmarkError(
                f"{run} takes {quantity(size, 'B')} in bfloat16, and what is shipped may take "
                f"{quantity(LARGEST, 'B')}: train a smaller one"
            )
        output.mkdir(parents=True, exist_ok=True)
        partial = output / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(made, partial)
        put_in_place(partial, output)
    return size


if __name__ == "__main__":
    try:
        main()
    except LandmarkError as error:
        raise SystemExit(f"error: {error}") from None
