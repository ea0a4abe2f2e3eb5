"""The last write of a run: the finished model, in the form that `from_pretrained` opens.

The write is rehearsed before the first step, so the user hears of what cannot be saved before anything is trained. And
what was trained is not lost where the write fails in the end: the last checkpoint stays, and --resume writes the model
again from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reason, writing
from landmark_cli.interrupts import interrupts
from landmark_cli.models.directory import PARTIAL, put_in_place, save_model
from landmark_cli.training.checkpoints import own_name, step_of
from landmark_cli.training.finite import not_finite, stored_tensors
from landmark_cli.training.loop import Loop
from landmark_cli.training.setup import by_main_process, quiet_transformers

SaveModel = Callable[[nn.Module, Path, dict[str, Tensor]], None]


class Publication:
    """How a run's model is written into its directory, which is tried at once. Every process makes one.

    model: the model before anything is wrapped around it. output: the run's directory. save_rest(directory) adds what
    belongs beside the model (tokenizer, recipe). save(model, directory, weights) writes a model that has another form
    than transformers' own; with no weights at all, everything but the weights. rehearse: False where the model is
    trained already.

    Raises LandmarkError, in every process, where the model could not be saved in the end.
    """

    def __init__(
        self,
        model: nn.Module,
        output: Path,
        save_rest: Callable[[Path], None],
        save: SaveModel = save_model,
        *,
        rehearse: bool = True,
    ) -> None:
        self._model, self._output, self._save_rest, self._save = model, output, save_rest, save
        if rehearse:
            by_main_process(self._rehearse)

    def publish(self, loop: Loop) -> None:
        """Write the model as the loop has trained it. Every process calls it.

        config.json comes last, so a directory that has one is finished.

        Raises LandmarkError, in every process, where a weight is not finite, or where the model cannot be written; a
        checkpoint of the last step is there then. Raises Stopped, once the model is written, where a signal has asked
        for an end meanwhile.
        """
        with interrupts("writing the trained model") as asked:
            self._publish(loop)
        if asked:
            raise asked.stopped(f"trained model: {self._output}; nothing is left to do")

    def write(self, state: dict[str, Tensor]) -> None:
        """Write the model with these tensors, by the names that it has for them or the loop's wrappers, in this
        process. Raises LandmarkError where a weight is not finite as it is saved, or the model cannot be written."""
        weights = self._own(state)
        try:
            self._write_beside(weights)
            # Weights that are finite in float32 may not be in the dtype that they are saved in.
            bad = not_finite(stored_tensors(self._output / PARTIAL))
            if bad is not None:
                raise ValueError(f"{bad} would not be finite as it is saved; take another --save-dtype")
            put_in_place(self._output / PARTIAL, self._output)
        except Exception as error:
            # After whatever error: what was trained must not be lost, and what has been written may be what fills the
            # disk.
            shutil.rmtree(self._output / PARTIAL, ignore_errors=True)
            raise LandmarkError(f"the model could not be written to {self._output}: {reason(error)}") from error

    def copy(self, loop: Loop, directory: Path) -> None:
        """Write the model as it is now into a directory that is made anew, for the run's own use. Every process calls
        it. Raises LandmarkError, in every process, where it cannot be written."""
        state = loop.accelerator.get_state_dict(loop.module)

        def write() -> None:
            shutil.rmtree(directory, ignore_errors=True)
            with writing(directory):
                self._write_files(directory, self._own(state))

        by_main_process(write)

    def _publish(self, loop: Loop) -> None:
        loop.checkpoints.refuse_not_finite(f"no model is written to {self._output}")
        state = loop.accelerator.get_state_dict(loop.module)
        try:
            by_main_process(lambda: self.write(state))
        except LandmarkError as error:
            raise LandmarkError(
                f"{error}. {_kept(loop)} holds all that was trained: put that right, and --resume writes the model"
            ) from error
        loop.accelerator.wait_for_everyone()

    def _rehearse(self) -> None:
        """Write all but the weights, read it back and throw it away."""
        try:
            self._write_beside({})
            _check_settings(self._model, self._output / PARTIAL)
        except Exception as error:
            raise LandmarkError(
                f"nothing was trained, for the model could not be saved in {self._output} afterwards: {reason(error)}"
            ) from error
        finally:
            shutil.rmtree(self._output / PARTIAL, ignore_errors=True)

    def _own(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a wrapped model's tensors, the model's, by the names that it has for them."""
        weights = {own_name(name): tensor for name, tensor in state.items()}
        for name in second_names(self._model):
            weights.pop(name, None)
        return weights

    def _write_beside(self, weights: dict[str, Tensor]) -> None:
        partial = self._output / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        self._write_files(partial, weights)

    def _write_files(self, directory: Path, weights: dict[str, Tensor]) -> None:
        with quiet_transformers():
            self._save(self._model, directory, weights)
        self._save_rest(directory)


def _kept(loop: Loop) -> Path:
    """The checkpoint of the step that the loop has reached, saved now where there is none yet."""
    path = by_main_process(loop.checkpoints.newest)
    return path if path is not None and step_of(path) == loop.step else loop.save()


def second_names(model: nn.Module) -> set[str]:
    """The names but the first of a model's tied weights, which are tensors of their own once they are gathered or
    converted. Adapters keep both names: which of the two is trained differs between adapters."""
    if not isinstance(model, PreTrainedModel):
        return set()
    first = {name for name, _ in model.named_parameters()}
    return {own_name(name) for name, _ in model.named_parameters(remove_duplicate=False) if name not in first}


def _check_settings(model: nn.Module, directory: Path) -> None:
    """ValueError where a saved config does not come back with the landmark settings that it was saved with."""
    found = type(model.config).from_pretrained(directory)
    for name in ("landmark_freq", "landmark_token_id", "trained_length", "top_k_blocks", "landmark_softmax"):
        expected = getattr(model.config, name, None)
        if getattr(found, name, None) != expected:
            raise ValueError(f"its config.json comes back with {name} {getattr(found, name, None)}, not {expected}")
