"""Models whose logits are not finite: whatever reads them says so, and gives no text and no figure."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from landmark_cli.data.gpt2_tokenizer import GPT2_LANDMARK_ID
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError
from landmark_cli.evaluation.longppl import find_key_tokens, long_text, ways_of_long
from landmark_cli.evaluation.passkey import evaluate_passkey
from landmark_cli.evaluation.perplexity import evaluate_perplexity
from landmark_cli.evaluation.ruler.encoding import PromptEncoder
from landmark_cli.evaluation.ruler.lists import FrequentWords
from landmark_cli.evaluation.ruler.run import measure
from landmark_cli.evaluation.studies import FinishedRows
from landmark_cli.evaluation.ways import ways_of
from landmark_cli.inference.generation import generate
from landmark_cli.inference.readers import are_finite
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.interrupts import Interrupts
from tests.tiny import tiny_baseline, tiny_llama, tiny_model

GPT2 = load_tokenizer("gpt2")
IDS = {"vocab_size": 50304, "eos_token_id": GPT2.eot_id}
MODELS = {
    "landmark": lambda: tiny_model(landmark_token_id=GPT2_LANDMARK_ID, trained_length=80, **IDS),
    "baseline": lambda: tiny_baseline(**IDS),
    "llama": lambda: tiny_llama(**IDS),
    "xl": lambda: tiny_baseline(memory_length=12, segment_length=12, **IDS),
}
TEXT = "The grass is green and the sky is blue. Here we go, there and back again. " * 4


@pytest.fixture(scope="module")
def tokenizer():
    return GPT2.as_transformers()


def harness(model, tokenizer, kind, request):
    # Of an extra, without which all else here can be asked.
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from landmark_cli.evaluation.harness import LandmarkLM

    lm = LandmarkLM.__new__(LandmarkLM)
    super(LandmarkLM, lm).__init__()
    lm.model, lm.tokenizer, lm.batch_size, lm.max_gen_toks, lm.pretrained = model, tokenizer, 2, 2, "it"
    lm.reading = ReadingSettings()
    return getattr(lm, kind)([Instance(kind, {}, request, 0)], disable_tqdm=True)


def ruler(model, tokenizer):
    task = FrequentWords("fwe", PromptEncoder(tokenizer), 0)
    (way,) = ways_of(model, None, False)
    with TemporaryDirectory() as folder:
        finished = FinishedRows(Path(folder) / "answers.jsonl")
        return measure(model, tokenizer, [task], [260], way, finished, Interrupts(""), samples=1, depends_on={})


def long_perplexity(model, tokenizer):
    text = long_text(torch.tensor(tokenizer.encode(TEXT)), GPT2.eot_id, eval_length=20)
    (way,) = ways_of_long(model, None)
    with TemporaryDirectory() as folder:
        finished, asked = FinishedRows(Path(folder) / "windows.jsonl"), Interrupts("")
        return find_key_tokens(model, way, text, finished, asked, context=8, stride=4, depends_on={})


def sampled(temperature):
    return SamplingSettings(max_new_tokens=2, temperature=temperature)


WAYS = {
    "generate greedily": lambda model, tokenizer: generate(model, tokenizer, [TEXT], sampled(0.0)),
    "generate": lambda model, tokenizer: generate(model, tokenizer, [TEXT], sampled(1.0)),
    "perplexity": lambda model, tokenizer: evaluate_perplexity(
        model, torch.tensor(tokenizer.encode(TEXT)), eot_id=GPT2.eot_id, eval_length=40
    ),
    "perplexity without memory": lambda model, tokenizer: evaluate_perplexity(
        model, torch.tensor(tokenizer.encode(TEXT)), eot_id=GPT2.eot_id, eval_length=40, memory=False
    ),
    "pass keys": lambda model, tokenizer: evaluate_passkey(model, tokenizer, [150], prompts=2),
    "ruler": ruler,
    "longppl": long_perplexity,
    "loglikelihood": lambda model, tokenizer: harness(model, tokenizer, "loglikelihood", (TEXT, " blue")),
    "rolling": lambda model, tokenizer: harness(model, tokenizer, "loglikelihood_rolling", (TEXT,)),
    "generate_until": lambda model, tokenizer: harness(model, tokenizer, "generate_until", (TEXT, {"until": ["."]})),
}


def spoil(model, value):
    model.get_output_embeddings().weight.data[7, 3] = value
    return model


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_an_error_that_says_so(way, model, tokenizer):
    value = math.inf if way == "generate greedily" else math.nan
    with pytest.raises(LandmarkError, match="the model gives logits that are nan or infinite, .* its weights are not"):
        WAYS[way](spoil(MODELS[model](), value), tokenizer)


def test_a_narrow_dtype_is_pointed_out(tokenizer):
    model = spoil(MODELS["baseline"]().bfloat16(), math.nan)
    model.name_or_path = "runs/mine"
    with pytest.raises(LandmarkError, match=r"runs/mine gives .*, or bfloat16 is too narrow for it"):
        WAYS["generate"](model, tokenizer)


def test_one_logit_that_is_not_finite_is_enough():
    logits = torch.zeros(4, 3)
    logits[1, 0], logits[2, 1], logits[3, 2] = -math.inf, math.inf, math.nan
    assert are_finite(logits).tolist() == [True, False, False, False]
