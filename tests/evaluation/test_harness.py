"""Our models in EleutherAI's harness: on tasks of local files, and every request as one forward pass has it."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from landmark_cli.attention.cache import BlockCache
from landmark_cli.console import console
from landmark_cli.data.landmarks import insert_landmarks, landmark_positions
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.evaluation.harness import LandmarkLM
from landmark_cli.models.generation_config import silence
from tests.gpt2 import small_gpt2
from tests.tiny import FREQ, tiny_baseline, tiny_model

QUESTIONS = [
    {"question": "The grass is green and the sky is", "choices": [" blue", " seven"], "answer": 0},
    {"question": "Here we go. There and back again. " * 4 + "Here we", "choices": [" go", " blue"], "answer": 0},
]
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    },
    "local_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    tokenizer = small_gpt2(root / "tokenizer")
    ids = {"vocab_size": tokenizer.landmark_id + 1, "eos_token_id": tokenizer.eot_id}
    models = {"landmark": tiny_model(landmark_token_id=tokenizer.landmark_id, **ids), "baseline": tiny_baseline(**ids)}
    models["xl"] = tiny_baseline(memory_length=12, segment_length=12, **ids)
    for name, model in models.items():
        silence(model, tokenizer.as_transformers(landmark=name == "landmark"))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(root / "questions.jsonl")}}}
    (root / "tasks").mkdir()
    for name, task in TASKS.items():
        content = {"task": name, "test_split": "test", **common, **task}
        (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return root


@pytest.fixture(scope="module")
def tokenizer(place):
    return load_tokenizer(str(place / "tokenizer"))


def log_likelihood(lm: LandmarkLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By one forward pass over the whole."""
    row = torch.tensor(context + continuation)
    stream, text = row[:-1], slice(None)
    if lm.model.config.landmark_freq:
        stream = insert_landmarks(stream, FREQ, lm.model.config.landmark_token_id)
        text = ~landmark_positions(len(stream), FREQ + 1)
    with torch.no_grad():
        logits = lm.model(stream[None].to(lm.device)).logits[0, text][len(context) - 1 :].cpu()
    targets = torch.tensor(continuation)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item(), (logits.argmax(-1) == targets).all().item()


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@pytest.mark.parametrize("kind", ["landmark", "baseline", "xl"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_requests_equal_one_forward_pass(place, tokenizer, kind, batch_size):
    lm = LandmarkLM(str(place / kind), batch_size=batch_size, top_k_blocks=64, chunk=7, device="cpu")
    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]] + [("", "The sky")]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (loss, likeliest) in zip(pairs, found, strict=True):
        context = tokenizer.encode(context) or [tokenizer.eot_id]
        expected, expected_likeliest = log_likelihood(lm, context, tokenizer.encode(continuation))
        assert math.isclose(loss, expected, rel_tol=1e-4) and likeliest == expected_likeliest


def test_the_harness_own_model_reads_with_memory(place):
    """`--model hf` knows nothing of us; what it scores and what it generates is what the model "landmark" does."""
    ours = LandmarkLM(str(place / "landmark"), device="cpu")
    theirs = HFLM(pretrained=str(place / "landmark"), device="cpu", batch_size=2, max_length=512)
    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    scored = [lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True) for lm in (ours, theirs)]
    for (loss, likeliest), (other, other_likeliest) in zip(*scored, strict=True):
        assert math.isclose(loss, other, rel_tol=1e-4) and likeliest == other_likeliest
    how = {"until": ["."], "max_gen_toks": 4, "do_sample": False}
    asked = instances("generate_until", *((q["question"], how) for q in QUESTIONS))
    assert theirs.generate_until(asked, disable_tqdm=True) == ours.generate_until(asked, disable_tqdm=True)


def test_whole_texts(place, tokenizer):
    texts = [QUESTIONS[1]["question"] * 2, "The sky"]
    lm = LandmarkLM(str(place / "landmark"), batch_size=2, top_k_blocks=64, chunk=9, device="cpu")
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((text,) for text in texts)), True)
    expected = [log_likelihood(lm, [tokenizer.eot_id], tokenizer.encode(text))[0] for text in texts]
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(found, expected, strict=True))
    # Without a memory, windows of the trained length.
    lm = LandmarkLM(str(place / "baseline"), batch_size=2, device="cpu")
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (texts[0],)), True)
    ids = [tokenizer.eot_id, *tokenizer.encode(texts[0])]
    assert 41 < len(ids) <= 81
    expected = log_likelihood(lm, ids[:1], ids[1:41])[0] + log_likelihood(lm, ids[len(ids) - 41 : 41], ids[41:])[0]
    assert math.isclose(found, expected, rel_tol=1e-4)


def test_tasks_of_local_files(place):
    lm = LandmarkLM(str(place / "landmark"), batch_size=2, top_k_blocks=2, device="cpu")
    tasks = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    results = [simple_evaluate(lm, tasks=[*TASKS], task_manager=tasks, bootstrap_iters=0) for _ in range(2)]
    assert results[0]["results"] == results[1]["results"]
    assert results[0]["results"]["local_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    assert results[0]["results"]["local_perplexity"]["bits_per_byte,none"] > 0
    lm = LandmarkLM(str(place / "xl"), batch_size=2, device="cpu")
    assert simple_evaluate(lm, tasks=["local_generate"], task_manager=tasks, bootstrap_iters=0)["results"]
    answers = [sample["resps"][0][0] for sample in results[0]["samples"]["local_generate"]]
    assert len(answers) == 2 and not any("." in answer or "<landmark>" in answer for answer in answers)


@pytest.mark.slow
def test_the_harness_s_own_command(place):
    command = [sys.executable, "-m", "landmark_cli.evaluation.harness", "run", "--model", "landmark"]
    command += ["--model_args", f"pretrained={place / 'landmark'},top_k_blocks=2", "--tasks", "local_choice"]
    command += ["--include_path", str(place / "tasks"), "--device", "cpu", "--batch_size", "2"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert "local_choice" in result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("path", "code"), [("landmark", 0), ("nowhere", 1)])
def test_the_harness_s_own_command_without_a_device(place, path, code):
    command = [sys.executable, "-m", "landmark_cli.evaluation.harness", "run", "--model", "landmark"]
    command += ["--model_args", f"pretrained={place / path},top_k_blocks=2", "--tasks", "local_choice"]
    command += ["--include_path", str(place / "tasks"), "--limit", "1"]
    changes = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **changes})
    assert result.returncode == code, result.stderr
    assert ("local_choice" in result.stdout) == (code == 0) and "Traceback" not in result.stderr


# Those of the harness's own tasks of RULER that load nothing; the others load essays or questions.
WITHOUT_DOWNLOADS = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]


@pytest.mark.slow
@pytest.mark.parametrize("task", WITHOUT_DOWNLOADS)
def test_the_harness_s_own_tasks_of_ruler(place, tokenizer, task, monkeypatch):
    """They find the tokenizer by our arguments, and a prompt goes whole through the block cache."""
    # The module of the needles asks for it when it is imported, whether sentences are to be told apart or not.
    monkeypatch.setattr("nltk.download", lambda *_, **__: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    read, begin_chunk = [], BlockCache.begin_chunk

    def note(cache, lengths, *more):
        read.append(sum(lengths))
        return begin_chunk(cache, lengths, *more)

    monkeypatch.setattr(BlockCache, "begin_chunk", note)
    arguments = f"pretrained={place / 'landmark'},top_k_blocks=2,chunk=1000"
    settings = {"limit": 1, "bootstrap_iters": 0, "metadata": {"max_seq_lengths": [4096]}, "device": "cpu"}
    found = simple_evaluate("landmark", model_args=arguments, tasks=[task], **settings)
    assert found["results"][task]["4096,none"] in [tenths / 10 for tenths in range(11)]
    (sample,) = found["samples"][task]
    (prompt, generation), answer = sample["arguments"][0], sample["resps"][0][0]
    tokens = len(tokenizer.encode(prompt))
    assert 2000 < tokens <= 4096 and generation["max_gen_toks"] in (30, 50, 120, 128) and answer
    # Landmarks come on top, and so do the tokens of the answer but the last.
    assert sum(read) >= tokens + tokens // FREQ and max(read) == 1000 + 1000 // FREQ


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0", "cpu"])
def test_without_a_gpu_the_harness_s_default_device_is_the_cpu(place, device, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    console.cache_clear()
    lm = LandmarkLM(str(place / "landmark"), device=device)
    assert lm.device.type == "cpu"
    assert ("there is no GPU" in capsys.readouterr().err) == (device in ("cuda", "cuda:0"))


@pytest.mark.parametrize("device", ["cuda:7", "nowhere"])
def test_a_device_that_is_not_there(place, device):
    with pytest.raises(LandmarkError, match=f"--device {device}: there is no such device here"):
        LandmarkLM(str(place / "landmark"), device=device)


def test_arguments_that_cannot_be(place):
    with pytest.raises(UsageError, match="batch_size is 'auto'"):
        LandmarkLM(str(place / "landmark"), batch_size="auto")
    for reading in (
        {"chunk": 0},
        {"chunk": "nan"},
        {"top_k_blocks": -1},
        {"context_miss_cutoff": 2},
        {"selection": "x"},
    ):
        with pytest.raises(UsageError, match=f"^--{next(iter(reading)).replace('_', '-')}: (must be|expected)"):
            LandmarkLM(str(place / "landmark"), **reading)
    with pytest.raises(UsageError, match="no argument chunks"):
        LandmarkLM(str(place / "landmark"), chunks=3)
