"""`landmark eval ruler` as a user runs it."""

import json

import pytest

from landmark_cli.evaluation.ruler import lists, needles, run

FWE = ["eval", "ruler", "--tasks", "fwe", "--lengths", "260,300", "--samples", "2", "--chunk", "100"]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Answers of a few tokens: how many there are is no matter of the command's."""
    monkeypatch.setattr(needles, "NEEDLE_TOKENS", 12)
    monkeypatch.setattr(lists, "FREQUENT_TOKENS", 8)


def test_tasks_lengths_and_numbers_of_blocks(landmark, workplace, tmp_path):
    arguments = ["eval", "ruler", "--tasks", "niah_single_2,fwe", "--lengths", "300", "--samples", "2"]
    arguments += ["--chunk", "100", "--top-k-blocks", "1,2", "--output", tmp_path]
    result = landmark(*arguments, "--json", "ruler.json", "--plot", "ruler.png", "--show", "1")
    assert result.code == 0, result.err
    data = json.loads((workplace / "ruler.json").read_text())
    assert (data["model"], data["samples"], data["haystack"]) == ("runs/landmark", 2, "the shipped novels")
    assert [(cell["task"], cell["tokens"], cell["top_k_blocks"]) for cell in data["cells"]] == [
        ("niah_single_2", 300, 1),
        ("fwe", 300, 1),
        ("niah_single_2", 300, 2),
        ("fwe", 300, 2),
    ]
    assert [(mean["reading"], mean["tasks"], mean["score"]) for mean in data["means"]] == [
        ("top-k 1", 2, 0.0),
        ("top-k 2", 2, 0.0),
    ]
    assert all(len(cell["answers"]) == 2 and cell["score"] == 0.0 for cell in data["cells"])
    assert data["cells"][0]["answers"][0]["depths"] and data["cells"][1]["answers"][0]["depths"] is None
    assert (workplace / "ruler.png").stat().st_size > 1000
    out, err = " ".join(result.out.split()), " ".join(result.err.split())
    assert "top-k 1 niah_single_2 0.000 (0.00-0.00)" in out and "top-k 2 mean 0.000 (0.00-0.00)" in out
    assert "top-k 2: found, by depth and length" in out
    assert "prose: the shipped novels, not RULER's essays" in err
    assert err.count("sample 0: a prompt of 288, 12 for the answer; nothing begins it") == 2
    assert "mentioned in the provided text is' expected " in err and "answered '" in err
    again = landmark(*arguments, "--json", "-")
    assert again.err.count("4 of 4 answers are kept from an earlier run") == 2
    assert again.out == (workplace / "ruler.json").read_text()
    assert "found, by depth" in again.err


def test_full_attention_beside_the_blocks(landmark, tmp_path):
    result = landmark(*FWE, "--model", "runs/landmark", "--full-attention", "--output", tmp_path, "--json", "-")
    assert result.code == 0, result.err
    assert "full attention is not asked at 260, 300: the model knows 40 positions" in result.err
    assert {cell["reading"] for cell in json.loads(result.out)["cells"]} == {"top-k 2"}


def test_a_model_without_landmarks_in_its_own_window(landmark, tmp_path):
    result = landmark(*FWE, "--model", "runs/baseline", "--output", tmp_path, "--json", "-")
    assert {cell["reading"] for cell in json.loads(result.out)["cells"]} == {"own window"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "niah_singel_1"], 2, "did you mean niah_single_1?"),
        (
            ["--tasks", "vt", "--lengths", "400"],
            2,
            "--lengths 400: too short for vt, whose prompts and answers take at",
        ),
        (["--chat"], 2, "--chat: this model's tokenizer has no chat template"),
        (["--tasks", "qa"], 2, "with --qa FILE"),
        (["--tasks", "qa", "--qa", "none.json"], 1, "--qa none.json cannot be read"),
        (["--haystack", "none.txt", "--tasks", "niah_single_2"], 1, "none.txt"),
        (["--model", "runs/baseline", "--top-k-blocks", "4"], 2, "has no landmarks, so it retrieves no blocks"),
        (["--samples", "0"], 2, "must be at least 1"),
        (["--top-k-blocks", "50"], 1, "leaves no room for a chunk"),
    ],
)
def test_mistakes(landmark, tmp_path, arguments, code, message):
    rest = ["--tasks", "fwe"] if "--tasks" not in arguments else []
    rest += ["--lengths", "300"] if "--lengths" not in arguments else []
    result = landmark("eval", "ruler", *arguments, *rest, "--output", tmp_path)
    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err and not result.out


def test_the_last_number_of_blocks_is_refused_before_the_first_is_measured(landmark, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *_, **__: pytest.fail("a way was measured"))
    several = ["--top-k-blocks", "1", "--top-k-blocks", "50"]
    result = landmark("eval", "ruler", "--tasks", "fwe", "--lengths", "300", *several, "--output", tmp_path)
    assert result.code == 1 and "retrieving 50 blocks leaves no room" in result.err, result.err


def test_a_short_haystack_is_repeated_and_said(landmark, workplace, tmp_path):
    (workplace / "hay.txt").write_text("It was a fine day. Nobody came.\n" * 4)
    arguments = ["eval", "ruler", "--tasks", "niah_single_2", "--lengths", "300", "--samples", "1", "--chunk", "100"]
    result = landmark(*arguments, "--haystack", "hay.txt", "--output", tmp_path)
    assert result.code == 0 and "hay.txt has 40 tokens, fewer than the longest prompt: it is repeated" in result.err


def test_the_shipped_novels_have_a_name(landmark, tmp_path):
    arguments = ["eval", "ruler", "--tasks", "niah_single_2", "--lengths", "300", "--samples", "2", "--chunk", "100"]
    assert landmark(*arguments, "--output", tmp_path).code == 0
    named = landmark(*arguments, "--output", tmp_path, "--haystack", "sample")
    assert named.code == 0 and "2 of 2 answers are kept from an earlier run" in named.err, named.err


def test_questions_of_a_file(landmark, workplace, tmp_path):
    paragraphs = [
        {"context": f"River {n} is long.", "qas": [{"question": f"Which is {n}?", "answers": [{"text": f"River {n}"}]}]}
        for n in range(4)
    ]
    (workplace / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    arguments = ["eval", "ruler", "--tasks", "qa", "--qa", "squad.json", "--lengths", "300", "--chunk", "100"]
    result = landmark(*arguments, "--samples", "4", "--output", tmp_path, "--json", "-")
    assert result.code == 0, result.err
    (cell,) = json.loads(result.out)["cells"]
    assert sorted(answer["references"] for answer in cell["answers"]) == [[f"River {n}"] for n in range(4)]
    assert "squad.json has too few documents for the longest prompts: some stand there several times" in result.err
    more = landmark(*arguments, "--samples", "5", "--output", tmp_path)
    assert more.code == 2 and "has 4 questions; ask for no more samples" in more.err


def test_without_the_package_of_words(landmark, tmp_path, monkeypatch):
    from landmark_cli.evaluation.ruler import words

    words._words.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "wonderwords", None)
    result = landmark("eval", "ruler", "--tasks", "niah_single_1", "--lengths", "300", "--output", tmp_path)
    assert result.code == 1 and "pip install 'landmark-cli[ruler]'" in result.err
    # Tasks without its words need no package.
    assert landmark(*FWE[:4], "--lengths", "260", "--samples", "1", "--chunk", "100", "--output", tmp_path).code == 0
    words._words.cache_clear()
