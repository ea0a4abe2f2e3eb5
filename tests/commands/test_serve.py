"""`landmark serve` as its clients see it: the real openai client, curl, and connections that break off."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest

import landmark_cli
from tests.forked import LANDMARK, Forked

KEY = "a secret of the test's"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
LONG = "It was the best of times, it was the worst of times. " * 12


@contextlib.contextmanager
def starting(folder, said, *arguments, program=LANDMARK, up=r"at (http://\S+)/v1"):
    """A server in the folder, stopped in the end: its process, address, and the file of what it says."""
    environment = os.environ | {"LANDMARK_API_KEY": KEY, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = Forked(arguments, said, environment, folder, program)
    try:
        until(lambda: re.search(up, said.read_text()) or not process.running(), seconds=120)
        if not (found := re.search(up, said.read_text())):
            pytest.fail(said.read_text())
        yield SimpleNamespace(process=process, url=found[1], said=said)
    finally:
        process.process.kill()
        process.wait()


def serving(folder, said, *arguments):
    """`landmark serve` with the folder's model."""
    return starting(folder, said, "serve", "--model", "runs/served", "--device", "cpu", "--port", "0", *arguments)


@pytest.fixture(scope="module")
def folder(workplace):
    shutil.copytree(workplace / "runs" / "landmark", workplace / "runs" / "served", dirs_exist_ok=True)
    (workplace / "runs" / "served" / "chat_template.jinja").write_text(TEMPLATE)
    yield workplace
    shutil.rmtree(workplace / "runs" / "served")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    said = tmp_path_factory.mktemp("server") / "said.txt"
    limits = "--rows", 4, "--queue", 32, "--max-prompt-tokens", 2000, "--max-new-tokens", 3000
    with serving(folder, said, *limits) as started:
        yield started


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(folder):
    """What a prompt gives by itself at temperature 0."""
    model, tokenizer = landmark_cli.load(folder / "runs" / "served", device="cpu")

    def generate(prompt, tokens=8):
        sampling = landmark_cli.SamplingSettings(max_new_tokens=tokens, temperature=0)
        (found,) = landmark_cli.generate(model, tokenizer, [prompt], sampling)
        return found

    return generate


def figures(server) -> dict[str, float]:
    asked = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["served"]
    assert client.models.retrieve("served").object == "model"


def test_a_completion_is_what_generate_gives(client, alone):
    for prompt in ("Call me", LONG):
        expected = alone(prompt)
        found = client.completions.create(model="served", prompt=prompt, max_tokens=8, temperature=0)
        (choice,) = found.choices
        assert (choice.text, choice.finish_reason) == (expected.text, "length")
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (expected.prompt_tokens, 8)


def test_several_prompts_answers_and_seeds(client, alone):
    found = client.completions.create(model="served", prompt=["Call me", "9"], max_tokens=5, temperature=0, n=2)
    assert [choice.text for choice in found.choices] == [alone(p, 5).text for p in ("Call me", "Call me", "9", "9")]
    prompts = sum(alone(prompt, 5).prompt_tokens for prompt in ("Call me", "9"))
    assert (found.usage.completion_tokens, found.usage.prompt_tokens) == (20, prompts)
    ask = {"model": "served", "prompt": [7, 8, 9], "max_tokens": 6, "n": 2}
    first, again, other = (client.completions.create(**ask, seed=seed).choices for seed in (3, 3, 4))
    assert [c.text for c in first] == [c.text for c in again] and first[1].text == other[0].text != first[0].text


def test_a_stop_string_and_streaming(client, alone):
    whole = alone("Call me", 12).text
    ask = {"model": "served", "prompt": "Call me", "max_tokens": 12, "temperature": 0}
    stopped = client.completions.create(**ask, stop=[whole[10:14]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(whole[10:14])], "stop")
    *pieces, last, usage = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].text for piece in pieces) == whole and len(pieces) > 3
    assert last.choices[0].finish_reason == "length" and usage.usage.completion_tokens == 12 and not usage.choices


def test_chats(client, alone):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Call me"}]
    expected = alone("system: Be brief.\nuser: Call me\nassistant:").text
    ask = {"model": "served", "messages": messages, "temperature": 0}
    found = client.chat.completions.create(**ask, max_completion_tokens=8)
    assert (found.choices[0].message.role, found.choices[0].message.content) == ("assistant", expected)
    stream = list(client.chat.completions.create(**ask, max_tokens=8, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == expected


def test_many_at_once_get_what_each_gets_alone(client, alone):
    prompts = [LONG[: 7 * length] + str(length) for length in range(16)]

    def ask(prompt):
        return client.completions.create(model="served", prompt=prompt, max_tokens=8, temperature=0).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, prompts)) == [alone(prompt).text for prompt in prompts]


def test_a_text_that_begins_like_an_earlier_one_is_not_read_again(client, alone, server):
    novel = "A novel that nobody has read so far, " * 20
    ask = {"model": "served", "max_tokens": 8, "temperature": 0}
    questions = " What was it?", " Who was there?", " What was it? And why?"
    first, second, other = (client.completions.create(prompt=novel + question, **ask) for question in questions)
    reused = [found.usage.prompt_tokens_details.cached_tokens for found in (first, second, other)]
    # Whole chunks of 20 tokens, so that what is read after them is cut as it would be without.
    assert reused[0] == 0 and all(first.usage.prompt_tokens - 30 < n and n % 20 == 0 for n in reused[1:])
    assert [found.choices[0].text for found in (first, second, other)] == [
        alone(novel + question).text for question in questions
    ]
    assert figures(server)["landmark_reused_tokens_total"] >= sum(reused)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "there is no model 'gpt' here, only 'served'"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: Input should be greater than or equal to 0"),
        ({"max_tokens": 5000}, openai.BadRequestError, "at most 3000 are served"),
        ({"prompt": "word " * 2500}, openai.BadRequestError, "at most 2000 are served"),
        ({"prompt": [1, 10**6]}, openai.BadRequestError, "none of the model's text"),
        ({"prompt": []}, openai.BadRequestError, "prompt: there is none"),
        ({"prompt": "a <landmark> b"}, openai.BadRequestError, "none of the model's text"),
        ({"logprobs": 3}, openai.BadRequestError, "logprobs is not served"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty is not served"),
        ({"extra_body": {"max_token": 2}}, openai.BadRequestError, "Unknown parameter: 'max_token'"),
        ({"n": 40}, openai.RateLimitError, "too many requests wait"),
    ],
)
def test_errors_in_openais_form(client, change, kind, message):
    with pytest.raises(kind, match=message) as error:
        client.completions.create(**{"model": "served", "prompt": "a", "max_tokens": 2, **change})
    assert set(error.value.body) == {"message", "type", "param", "code"}


def test_what_is_no_request(server, client):
    with pytest.raises(openai.AuthenticationError, match="needs its key"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: Not Found"):
        client.embeddings.create(model="served", input="a")
    host, port = server.url.removeprefix("http://").split(":")
    for body, length, status, message in (
        (b"{", 1, b"400", "the body is no JSON, from character 1 on: "),
        (b"", 10**9, b"413", ""),
    ):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + body)
            answer = connection.makefile("rb").read()
        assert answer.split()[1] == status
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"].startswith(message)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server, alone):
    ask = json.dumps({"model": "served", "prompt": "Call me", "max_tokens": 8, "temperature": 0, "stream": True})
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-d", ask, "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-H", f"Authorization: Bearer {KEY}"], capture_output=True, text=True, timeout=120)
    *events, end = re.findall(r"^data: (.*)$", done.stdout, re.MULTILINE)
    assert end == "[DONE]" and "".join(json.loads(e)["choices"][0]["text"] for e in events) == alone("Call me").text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(server, stream):
    host, port = server.url.removeprefix("http://").split(":")
    ask = json.dumps({"model": "served", "prompt": "Call me", "max_tokens": 3000, "temperature": 0, "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(ask)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall((head + ask).encode())
        until(lambda: figures(server)["landmark_running"] == 1)
    given = figures(server)['landmark_answers_total{finish="length"}']
    until(lambda: figures(server)["landmark_running"] == 0)
    assert figures(server)['landmark_answers_total{finish="length"}'] == given


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_sigterm_finishes_what_was_asked_and_keeps_what_was_read(folder, alone, tmp_path):
    with serving(folder, tmp_path / "said.txt", "--memory-dir", tmp_path / "kept") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)
        ask = {"model": "served", "prompt": LONG, "max_tokens": 60, "temperature": 0}
        stream = iter(client.completions.create(**ask, stream=True))
        pieces = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        pieces += stream
        assert "".join(piece.choices[0].text for piece in pieces) == alone(LONG, 60).text
        assert server.process.wait(60) == 0
    said = server.said.read_text()
    assert "finishing what was asked" in said and "stopped; 1 answer given" in said
    (kept,) = (tmp_path / "kept").iterdir()
    model, tokenizer = landmark_cli.load(folder / "runs" / "served", device="cpu")
    reader = landmark_cli.Reader(model)
    reader.recall(kept)
    # Up to the end of its last whole chunk.
    kept_ids, ids = list(reader.texts[0]), tokenizer(LONG).input_ids
    assert kept_ids == ids[: len(kept_ids)] and len(kept_ids) // reader.chunk == len(ids) // reader.chunk
    assert len(kept_ids) % reader.chunk == 0


@pytest.mark.slow
def test_transformers_own_server_reads_with_memory(folder, alone, tmp_path):
    """As docs/transformers.md says: prompts longer than the trained length get what `landmark generate` gives them."""
    pytest.importorskip("transformers.cli.serving.completion", reason="this transformers serves no /v1/completions")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "transformers", "serve", "runs/served", "--device", "cpu", "--port", port, "--host", "127.0.0.1"
    up = {"program": "landmark_cli.beside", "up": r"running on (http://\S+)"}
    with starting(folder, tmp_path / "said.txt", *command, **up) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)
        ask = {"model": "runs/served", "max_tokens": 8, "temperature": 0}
        found = client.completions.create(**ask, prompt=LONG).choices[0]
        assert (found.text, found.finish_reason) == (alone(LONG).text, "length")
        messages = [{"role": "user", "content": LONG}]
        pieces = client.chat.completions.create(**ask, messages=messages, stream=True)
        said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert said == alone(f"user: {LONG}\nassistant:").text
        client.close()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "runs/baseline"], 1, "runs/baseline has no landmarks"),
        (["--host", "no.such.host.anywhere"], 1, "--host no.such.host.anywhere --port 0 cannot be listened on"),
        (["--memory-dir", "runs/landmark/config.json"], 1, "--memory-dir runs/landmark/config.json cannot be written"),
        (["--rows", "0"], 2, "must be at least 1"),
    ],
)
def test_mistakes(landmark, arguments, code, message):
    result = landmark("serve", "--port", "0", *arguments)
    assert (result.code, message in result.err, result.out) == (code, True, ""), result.err


def test_a_missing_package_is_named(landmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = landmark("serve", "--port", "0")
    assert result.code == 1 and "pip install 'landmark-cli[serve]'" in result.err
