"""Chats: what the template writes, with special tokens, and the assistant's turns as answers."""

from pathlib import Path

import pytest

from landmark_cli.commands.prepare import PrepareOptions, find_corpus, run
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, UsageError
from tests.awkward_tokenizers import byte_tokenizer
from tests.data.test_answers import answers_of
from tests.data.texts import documents_in, json_lines, packed, write

TURN = "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
CHATML = (
    f"{{{{ bos_token }}}}{{% for m in messages %}}{TURN}{{% endfor %}}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
FORGETFUL = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'][:1] }}")
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def chat(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


ONE = chat("Who is it?", "Me, naïve as ever.\n\nTruly.", "Who?", " I ")
OTHER = [{"role": "system", "content": "Be short."}, *chat("<|end|> and <s>?", "No.")]


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path):
    """Makes a tokenizer directory with a chat template."""

    def make(template):
        tokenizer = byte_tokenizer(ids={"<|start|>": 258, "<|end|>": 259}, eos_token="<|end|>")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return make


def prepared(model, rows, name="chats.jsonl", **options):
    source, data = Path(name).absolute(), packed(name, json_lines(rows))
    if not source.exists() or source.read_bytes() != data:
        write(source, data)
    settings = {"validation_share": 0.0, "output": source.parent / "out"} | options
    run(PrepareOptions("text", source=[str(source)], tokenizer=model, chat=True, **settings))
    return TokenFile.open(source.parent / "out/train.bin"), load_tokenizer(model)


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.gz"])
def test_ids_are_the_templates_and_answers_the_assistants(model, name):
    folder = model(CHATML)
    file, tokenizer = prepared(folder, [{"messages": ONE, "id": 1}, {"messages": OTHER}], name)
    transformers = tokenizer.as_transformers(landmark=False)
    expected = []
    for messages in (ONE, OTHER):
        ids = transformers.apply_chat_template(messages, tokenize=True, return_dict=False)
        expected += [*ids, tokenizer.eot_id]
    assert file.tokens.tolist() == expected
    assert file.tokens[0] == transformers.bos_token_id and (file.tokens == 258).sum() == 7
    wanted = [f"{text}<|end|>" for text in ("Me, naïve as ever.\n\nTruly.", " I ", "No.")]
    assert answers_of(file, tokenizer) == wanted
    assert file.metadata.answers.tokens == sum(len(tokenizer.encode(text[:-7])) + 1 for text in wanted)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (THINKING, ["<think>\nYes: ", "Yes."]),
        (PLAIN, ["assistant: Me, naïve as ever.\n\nTruly.", "assistant:  I"]),
    ],
    ids=["a prompt that ends with more", "no prompt of its own"],
)
def test_other_templates(model, template, answers):
    folder = model(template)
    messages = chat("Is it?", "<think>\nYes: it is", "Is it?", "Yes.") if template == THINKING else ONE
    file, tokenizer = prepared(folder, [{"messages": messages}])
    found = answers_of(file, tokenizer)
    if template == THINKING:
        assert found == ["Yes: it is<|end|>", "Yes.<|end|>"]
    else:
        assert found == answers


def test_other_fields_and_chats_without_answers(model):
    rows = [{"conversation": ONE}, {"conversation": chat("Only this.")}, {"conversation": chat("I begin.", first="a")}]
    file, tokenizer = prepared(model(CHATML), rows, text_field="conversation")
    assert len(file.tokens[file.tokens == 258]) == 6 and file.metadata.documents == 3
    found = answers_of(file, tokenizer)
    assert len(found) == 3 and found[2].endswith("I begin.<|end|>")


BAD = [
    ({"text": "no chat"}, CHATML, "chats.jsonl:2 has no text field 'messages'"),
    ({"messages": "no chat"}, CHATML, "chats.jsonl:2: the field 'messages' holds no messages"),
    ({"messages": []}, CHATML, "chats.jsonl:2: the field 'messages' holds no messages"),
    ({"messages": [{"from": "human", "value": "x"}]}, CHATML, "each with a role and a content that is text"),
    ({"messages": OTHER}, STRICT, "chats.jsonl:2: the chat template of .* cannot be used: no system role"),
    ({"messages": chat("a", "long", "b", "c")}, FORGETFUL, "writes .* otherwise when"),
]


@pytest.mark.parametrize(("row", "template", "message"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_rows_stop_or_are_skipped(model, row, template, message):
    rows = [{"messages": chat("?", "Yes.")}, row]
    with pytest.raises(LandmarkError, match=f"{message}.*--on-bad-text skip"):
        prepared(model(template), rows)
    file, tokenizer = prepared(model(template), rows, on_bad_text="skip")
    assert answers_of(file, tokenizer) == ["Yes.<|end|>"] and file.metadata.documents == 1
    assert len(documents_in(file)) >= 1


def test_another_template_makes_another_corpus(model, capsys):
    prepared(model(CHATML), [{"messages": ONE}])
    prepared(model(CHATML), [{"messages": ONE}])
    assert "made from this very source already" in capsys.readouterr().err
    file, tokenizer = prepared(model(PLAIN), [{"messages": ONE}])
    assert "<|start|>" not in tokenizer.decode(file.tokens)


def test_what_has_no_chats(model, tmp_path):
    with pytest.raises(UsageError, match="the tokenizer gpt2 has no chat template: --chat takes the --tokenizer"):
        run(PrepareOptions("text", source=["x.jsonl"], chat=True, output=tmp_path / "out"))
    with pytest.raises(UsageError, match="--chat means nothing for sample: it is for text"):
        run(PrepareOptions("sample", chat=True, output=tmp_path / "out"))
    write(tmp_path / "notes/a.txt", "No chat.")
    options = PrepareOptions("text", source=["notes"], chat=True, tokenizer=model(CHATML))
    with pytest.raises(LandmarkError, match="notes"):
        find_corpus(options, load_tokenizer(options.tokenizer))
