"""`landmark plan`: a table of what reading takes, of models with landmarks and of those that are to get some."""

import json

import pytest

from landmark_cli import console
from tests.pages import ROOT, lines_of, text_of
from tests.tiny import tiny_llama


def test_a_row_for_every_setting_and_full_attention_beside(landmark):
    done = landmark("plan", "--model", "runs/landmark", "--lengths", "100,400", "--top-k-blocks", "2,3", "--json", "-")
    assert done.code == 0
    rows = json.loads(done.out)
    assert [(row["length"], row["top_k_blocks"]) for row in rows] == [
        (length, k) for length in (100, 400) for k in (2, 3, None)
    ]
    assert rows[0] == {
        "landmark_freq": 4,
        "length": 100,
        "top_k_blocks": 2,
        "chunk": 20,
        "positions": 40,
        "sees": 28,
        "compared": 20 + 8 + 24,
        # Room for 26 blocks of 5 tokens and for their landmarks' keys, in two layers; 16 floats of a key or a value.
        "cache": 2 * 26 * (2 * 5 + 1) * 16 * 4,
        "on_gpu": None,
    }
    assert rows[2]["cache"] == 2 * 100 * 2 * 16 * 4
    assert "compared" in done.err and " full " in done.err and "trained at 40 positions" in done.err


def test_the_newest_model_is_planned_for_and_blocks_may_be_offloaded(landmark):
    done = landmark("plan", "--offload", "cpu", "--lengths", 64)
    assert done.code == 0 and "using runs/landmark" in done.err
    assert "on GPU" in done.out


def test_chunks_beyond_the_positions_of_training_are_told(landmark):
    done = landmark("plan", "--model", "runs/landmark", "--lengths", 100, "--chunk", 60)
    assert done.code == 0 and "warning: these chunks stand at up to 90 positions" in done.err


def test_settings_that_leave_no_room_are_left_out(landmark):
    arguments = "plan", "--model", "runs/landmark", "--lengths", "100", "--json", "-", "--top-k-blocks"
    done = landmark(*arguments, "2,7,8")
    assert [row["top_k_blocks"] for row in json.loads(done.out)] == [2, None]
    assert done.err.count("warning: left out: retrieving") == 2 and "retrieve at most 6" in done.err
    done = landmark(*arguments, "7")
    assert done.code == 1 and "error: retrieving 7 blocks leaves no room for a chunk" in done.err


@pytest.mark.parametrize("option", ["--landmark-freq", "--sequence-length"])
def test_landmarks_that_a_model_has_stay(landmark, option):
    done = landmark("plan", "--model", "runs/landmark", option, 20)
    assert done.code == 2 and f"{option}: runs/landmark has landmarks already, after every 4 text tokens" in done.err


def test_a_decoder_without_landmarks(landmark, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    arguments = "plan", "--model", tmp_path, "--lengths", 50, "--json", "-", "--landmark-freq"
    rows = json.loads(landmark(*arguments, "3,7", "--dtype", "bfloat16").out)
    # A config of 32 positions: 8 blocks of 4, of which 4 are retrieved, or 4 of 8, of which two are.
    assert [(row["landmark_freq"], row["top_k_blocks"], row["chunk"]) for row in rows] == [
        (3, 4, 9),
        (7, 2, 7),
        (None, None, 50),
    ]
    assert rows[-1]["cache"] == 2 * 50 * 2 * 8 * 2
    done = landmark(*arguments, 20)
    assert done.code == 1 and "holds fewer than the two blocks" in done.err


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(landmark, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    console.console.cache_clear()
    done = landmark("plan", "--model", "runs/landmark", "--offload", "cpu", "--lengths", 1000000)
    assert max(map(len, done.out.splitlines())) <= width and "…" not in done.out


# What SmolLM2-135M's config says of its shape.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def test_the_page_shows_what_is_printed(landmark, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    lines = lines_of(text_of(ROOT / "docs" / "choosing.md"))
    call = next(index for index, line in enumerate(lines) if "$ landmark plan" in line)
    words = lines[call].split()[2:]
    words[words.index("--model") + 1] = str(tmp_path)
    printed = [line.split() for line in landmark(*words).out.splitlines() if line.strip()]
    assert len(printed) == 9
    assert [line.split() for line in lines[call + 1 : call + 1 + len(printed)]] == printed
