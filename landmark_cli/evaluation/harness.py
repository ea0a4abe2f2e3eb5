"""Models for EleutherAI's evaluation harness, contexts of any length read in chunks through the block cache.

    python -m landmark_cli.evaluation.harness --model landmark --model_args pretrained=runs/mine --tasks lambada

is the harness's own command with the model class "landmark"; from Python, import this module and call
`lm_eval.simple_evaluate(model="landmark", ...)`. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from landmark_cli.commands.models import MachineOptions, open_model
from landmark_cli.console import error, info
from landmark_cli.data.pretrained_tokenizers import begin_ids, prompt_ids, text_ids
from landmark_cli.errors import LandmarkError, UsageError, import_extra
from landmark_cli.evaluation.score import score
from landmark_cli.inference.chat import ChatTemplate
from landmark_cli.inference.generation import check_ids, encode_prompt, generate
from landmark_cli.inference.readers import open_reader, reader_class, trained_text_length
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.options import build, nearest

import_extra("lm_eval", "lm-eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from tqdm import tqdm  # noqa: E402

Scored = tuple[float, bool]


@register_model("landmark")
class LandmarkLM(TemplateLM):
    """Any model that `landmark` opens. A model with landmarks, or a Transformer-XL, reads whole contexts; any other
    sees the last tokens of a context that its trained length holds.

    pretrained: model directory, hub id or the authors' checkpoint. Further arguments (top_k_blocks, chunk,
    cache_blocks, selection, ...) are those of ReadingSettings. max_gen_toks: most tokens to generate where a
    task does not say. trust_remote_code: run Python code that comes with the model. quantization: of its weights,
    none, int8 or int4.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_gen_toks: int = 256,
        trust_remote_code: bool = False,
        quantization: str = "none",
        **reading: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UsageError(f"batch_size is {batch_size!r}: the landmark model takes a number of 1 or more")
        self.pretrained, self.batch_size, self.max_gen_toks = pretrained, int(batch_size), max_gen_toks
        known = {field.name for field in fields(ReadingSettings)}
        unknown = reading.keys() - known
        if unknown:
            name = min(unknown)
            meant = nearest(name, (one.replace("_", "-") for one in known)).replace("-", "_")
            raise UsageError(f"the landmark model has no argument {name}{meant}")
        self.reading = build(ReadingSettings, reading)
        if device in ("cuda", "cuda:0") and not torch.cuda.is_available():
            # The harness's command asks for a GPU where nobody has named a device.
            info(f"there is no GPU: {pretrained} runs on the CPU")
            device = None
        opened_as = MachineOptions(
            dtype=dtype,
            device=device or "auto",
            trust_remote_code=trust_remote_code is True,
            quantization=quantization,
        )
        self.model, self.tokenizer = open_model(pretrained, opened_as)
        self._device = self.model.device
        self._chat = ChatTemplate(self.tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self.pretrained).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = prompt_ids(self.tokenizer, string)
        return ids[len(begin_ids(self.tokenizer)) :] if add_special_tokens is False else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        encoded, continuation = super()._encode_pair(context, continuation)
        # A context of nothing but spaces, which go with what follows, has no tokens of its own.
        return encoded or [self.prefix_token_id], continuation

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._chat.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """A model with a memory reads each text in one go; any other window by window, as the harness does."""
        whole = reader_class(self.model).remembers
        length = trained_text_length(self.model)
        pieces: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for owner, request in enumerate(requests):
            ids = text_ids(self.tokenizer, request.args[0])
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, length, 1))
            for context, continuation in [([self.prefix_token_id], ids)] if whole else windows:
                pieces.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (loss, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            totals[owner] += loss
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [(request.args, encode_prompt(self.tokenizer, request.args[0])) for request in requests]

        def answer(batch: list[tuple[tuple[str, dict], list[int]]]) -> list[str]:
            sampling = self._sampling(batch[0][0][1])
            rows = [row for _, row in batch]
            texts = [one.text for one in generate(self.model, self.tokenizer, rows, sampling, reading=self.reading)]
            for (request, _), text in zip(batch, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request, text)
            return texts

        return self._in_batches(
            prompts,
            answer,
            group=lambda prompt: (repr(sorted(prompt[0][1].items())), self._kept_apart(len(prompt[1]))),
            size=lambda prompt: len(prompt[1]),
            what="generating",
            quiet=disable_tqdm,
        )

    def _sampling(self, wanted: dict[str, Any]) -> SamplingSettings:
        """A task's generation arguments as our settings; greedy where they do not say do_sample."""
        limits = [wanted[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in wanted]
        until = wanted.get("until") or []
        return SamplingSettings(
            max_new_tokens=limits[0] if limits else self.max_gen_toks,
            temperature=wanted.get("temperature", 1.0) if wanted.get("do_sample") else 0.0,
            top_p=wanted.get("top_p", 1.0),
            top_k=wanted.get("top_k", 0),
            repetition_penalty=wanted.get("repetition_penalty", 1.0),
            stop=[until] if isinstance(until, str) else until,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        """requests: (the harness's key, context ids, continuation ids) -> the continuation's log-likelihood in nats,
        and whether each of its tokens was the likeliest."""

        def work(batch: list[tuple[Any, list[int], list[int]]]) -> list[Scored]:
            found = self._score([(context, continuation) for _, context, continuation in batch])
            for (key, _, _), result in zip(batch, found, strict=True):
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, result)
            return found

        return self._in_batches(
            requests,
            work,
            group=lambda request: self._kept_apart(len(request[1]) + len(request[2])),
            size=lambda request: len(request[1]) + len(request[2]),
            what="reading",
            quiet=disable_tqdm,
        )

    def _kept_apart(self, length: int) -> int:
        """The length of a request where the reader takes rows of one length only, else 0: one batch has one such
        number."""
        return length if reader_class(self.model).equal_lengths else 0

    def _in_batches(
        self,
        requests: Sequence[Any],
        work: Callable[[list[Any]], list[Any]],
        *,
        group: Callable[[Any], Any],
        size: Callable[[Any], int],
        what: str,
        quiet: bool,
    ) -> list[Any]:
        """work(batch) over requests of one group each, longest first; results in the order of the requests."""
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(group(request), []).append(index)
        results: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), disable=quiet, desc=what) as shown:
            for members in groups.values():
                members.sort(key=lambda index: -size(requests[index]))
                for first in range(0, len(members), self.batch_size):
                    batch = members[first : first + self.batch_size]
                    for index, result in zip(batch, work([requests[index] for index in batch]), strict=True):
                        results[index] = result
                    shown.update(len(batch))
        return results

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Scored]:
        """For each context and continuation what `_loglikelihood_tokens` returns; tokens that the model does not see do
        not count."""
        rows = [torch.tensor(context + continuation) for context, continuation in pairs]
        check_ids(self.model, rows)
        reader = open_reader(self.model, self.reading, batch=len(rows))
        reader.expect(max(len(row) - 1 for row in rows))
        sums = torch.zeros(len(rows), 3, dtype=torch.float64, device=self.model.device)
        for part in reader.read([row[:-1] for row in rows], transient=True):
            for index, (begin, length) in enumerate(zip(part.begins, part.lengths, strict=True)):
                # Position p predicts token p + 1; the first that counts is the one that predicts the continuation's
                # first token.
                skipped = max(0, len(pairs[index][0]) - 1 - begin)
                if skipped < length:
                    targets = rows[index][begin + skipped + 1 : begin + length + 1]
                    sums[index] += score(part.row(index)[skipped:], targets)
        reader.require_finite(bool(sums.isfinite().all()))
        return [(0.0 - negative, correct == tokens) for tokens, negative, correct in sums.tolist()]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LandmarkError as found:
        error(str(found))
        sys.exit(found.exit_code)
