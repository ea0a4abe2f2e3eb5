"""Token files -> the batches and validation windows of a run.

`landmark train` opens directories that `landmark prepare` made. `landmark finetune` opens them too, and prepares text
that it is given into the run's own directory first (`token_files`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmark_cli.console import info, warn
from landmark_cli.data.assets import SAMPLE
from landmark_cli.data.batches import Batches, SequentialWindows
from landmark_cli.data.checks import check_documents, check_one_tokenizer
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.variants import VariantBatches
from landmark_cli.data.windows import AnswerWeights, Pack, Windows
from landmark_cli.errors import LandmarkError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class TrainingData:
    """The token files of a run, opened, and all made with one tokenizer.

    Attributes:
        train: one for each corpus.
        validation: those of the corpora that have one, where evaluations are wanted.
        weights: how often each corpus is drawn from, relative to the others; None takes them by their size.
        uncut: those of the files of which windows hold whole documents, whatever they hold of others.
        begin: what windows begin with, see `Windows`.
    """

    train: list[TokenFile]
    validation: list[TokenFile]
    weights: list[float] | None = None
    uncut: frozenset[Path] = frozenset()
    begin: tuple[int, ...] = ()

    @property
    def files(self) -> list[TokenFile]:
        """All of them."""
        return [*self.train, *self.validation]

    @classmethod
    def open(
        cls, directories: Sequence[Path], weights: list[float] | None = None, *, validation: bool = True
    ) -> TrainingData:
        """Open the token files of prepared corpora. validation: whether the run is evaluated on the way.

        Raises LandmarkError where a corpus has no train.bin, a file is damaged, or they are not of one tokenizer.
        """
        held_out = [directory / "validation.bin" for directory in directories] if validation else []
        data = cls(
            [TokenFile.open(directory / "train.bin") for directory in directories],
            [TokenFile.open(path) for path in held_out if path.exists()],
            weights,
        )
        check_one_tokenizer(data.files)
        if validation and not data.validation:
            warn(f"{directories[0]} has no validation.bin: training without evaluation")
        return data

    def without_answers(self) -> dict[str, list[TokenFile]]:
        """The token files of corpora that mark no answers, by split; those for validation too where the run is not
        evaluated. Empty where all mark some."""
        train = [file for file in self.train if file.metadata.answers is None]
        held_out = [file.path.with_name("validation.bin") for file in train]
        validation = [TokenFile.open(path) for path in held_out if path.exists()]
        return {"train": train, "validation": validation} if train else {}

    def with_tasks(self, directory: Path, share: float) -> TrainingData:
        """This data, and the tasks whose token files a directory holds: of every 1 / share windows one is of tasks. The
        other corpora keep their proportions. share: above 0, up to 1, which leaves nothing else to train on."""
        files = [directory / f"{split}.bin" for split in ("train", "validation")]
        tasks = TrainingData.open([directory], validation=bool(self.validation) and files[1].exists())
        if share == 1:
            validation = [*tasks.validation, *self.validation]
            return dataclasses.replace(
                self, train=tasks.train, validation=validation, weights=None, uncut=frozenset(files)
            )
        weights = self.weights or [len(file.tokens) for file in self.train]
        others = [(1 - share) * weight / sum(weights) for weight in weights]
        # First, so that their share is not what rounding leaves.
        return dataclasses.replace(
            self,
            train=[*tasks.train, *self.train],
            validation=[*tasks.validation, *self.validation],
            weights=[share, *others],
            uncut=self.uncut | frozenset(files),
        )

    def windows(
        self,
        config: PreTrainedConfig,
        include_landmarks: bool = False,
        *,
        sequence_length: int | None = None,
        mask_documents: bool = False,
        pack: Pack = "cut",
    ) -> Windows:
        """What cuts windows out of these files, for training and evaluation alike.

        config: the model's. sequence_length: positions of a window; the model's trained length by default. The rest:
        see `Windows`. Raises LandmarkError where documents are to be masked and a file has one alone.
        """
        if mask_documents:
            check_documents(self.train)
        return Windows(
            sequence_length or config.trained_length,
            config.landmark_freq,
            config.landmark_token_id,
            self.train[0].metadata.eot_id,
            include_landmarks,
            mask_documents,
            pack,
            self.begin,
        )

    def batches(
        self,
        windows: Windows,
        global_batch: int,
        seed: int,
        answer_weights: AnswerWeights | None = None,
        mark_answers: bool = False,
        **variants: Any,
    ) -> Batches | VariantBatches:
        """The batches that the run trains on: see `Batches`, and `VariantBatches` for its settings, the variants.

        Raises LandmarkError where answers are to have weights and no corpus marks any.
        """
        if answer_weights is not None:
            self.check_answers()
        packs = [self._pack(file, windows) for file in self.train]
        batches = Batches(self.train, self.weights, windows, global_batch, seed, answer_weights, mark_answers, packs)
        if windows.pack == "whole":
            info(f"windows of whole documents: {batches.filled:.0%} of them is text, the rest is filled up")
        return VariantBatches(batches, seed, **variants) if any(variants.values()) else batches

    @property
    def answers(self) -> list[str | None]:
        """For each corpus that is trained on, the checksum of its marks of answers, None where it has none."""
        return [file.metadata.answers and file.metadata.answers.sha256 for file in self.train]

    def check_answers(self) -> None:
        """Raise LandmarkError where no corpus marks answers."""
        if not any(self.answers):
            files = ", ".join(str(file.path) for file in self.train)
            raise LandmarkError(
                f"no corpus says which of its text is answers ({files}): `landmark prepare tasks` and `landmark "
                "prepare text --chat` make such; or leave --answer-weight, --answer-divergence-weight and "
                "--answers-only out"
            )

    def validation_windows(self, windows: Windows, count: int) -> list[SequentialWindows]:
        """About `count` windows for an evaluation to read, spread over all validation files."""
        limit = max(count // max(len(self.validation), 1), 1)
        return [SequentialWindows(file, windows, limit, self._pack(file, windows)) for file in self.validation]

    def _pack(self, file: TokenFile, windows: Windows) -> Pack:
        return "whole" if file.path in self.uncut else windows.pack


def is_prepared(name: str) -> bool:
    """Whether what --data names is a directory of token files, and no text that these are still to be made of."""
    return (Path(name) / "train.json").is_file()


def token_files(
    names: Sequence[str],
    directory: Path,
    tokenizer: str,
    *,
    text_field: str = "text",
    validation_share: float = 0.01,
    trust_remote_code: bool = False,
    trained: bool = False,
) -> list[Path]:
    """Directories of token files, one for each name: the named one itself where it is such a directory already, or else
    a new one in `directory`, into which all processes of a launch prepare what the name stands for together.

    names: prepared corpora, corpora that `open_corpus` knows, or sources of text. tokenizer: a directory or hub id, of
    the tokenizer that text is prepared with. text_field, validation_share: see `open_corpus`. trust_remote_code:
    whether Python code that comes with the tokenizer may run. trained: a run has been trained on what `directory` has,
    which stays as it is where it is whole, though what it was made from may have changed. Processes other than the
    first may return before the token files are there.

    Raises LandmarkError as `prepare` does.
    """
    from landmark_cli.data.corpora import KINDS, open_corpus
    from landmark_cli.data.merge import Process
    from landmark_cli.data.prepare import are_whole, prepare
    from landmark_cli.data.tokenizers import load_tokenizer

    directories, opened = [], None
    for number, name in enumerate(names):
        if is_prepared(name):
            directories.append(Path(name))
            continue
        prepared = directory / f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}"
        directories.append(prepared)
        if trained and are_whole(prepared):
            info(f"{name}: {prepared} holds what the run has been trained on")
            continue
        known = name == SAMPLE or name in KINDS
        corpus = open_corpus(
            name if known else "text",
            None if known else [name],
            text_field=text_field,
            validation_share=validation_share,
        )
        opened = opened or load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        info(f"{name}: {corpus.source} -> {prepared} (tokenizer {opened.name})")
        prepare(corpus, opened, prepared, process=Process.from_environment())
    return directories
