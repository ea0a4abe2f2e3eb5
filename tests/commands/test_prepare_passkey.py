"""`landmark prepare passkey` as a user runs it."""

import json


def test_documents_to_mix_into_training(landmark, workplace):
    arguments = ["prepare", "passkey", "--longest", "400", "--max-documents", "30", "--validation-share", "0.1"]
    result = landmark(*arguments, "--output", "keys", "--json", "-")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert (data["train"]["documents"], data["validation"]["documents"]) == (27, 3)
    assert 27 * 250 < data["train"]["tokens"] < 27 * 410
    assert landmark(*arguments, "--output", "again", "--seed", "1").code == 0
    assert (workplace / "keys/train.bin").read_bytes() != (workplace / "again/train.bin").read_bytes()


def test_mistakes(landmark):
    assert "passkey makes its documents itself" in landmark("prepare", "passkey", "--source", "x").err
    result = landmark("prepare", "passkey", "--longest", "100")
    assert result.code == 2 and "of 256 to 100 tokens cannot be" in result.err
