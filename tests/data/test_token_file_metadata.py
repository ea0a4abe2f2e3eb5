"""What a token file says of itself is what was written, or it is not taken."""

import json

import pytest

from landmark_cli.data.token_file import TokenFile
from landmark_cli.errors import LandmarkError
from landmark_cli.file_writing import write_sealed
from tests.data.letters import write


def test_a_format_of_the_future_is_refused(tmp_path):
    write(tmp_path / "train.bin", [[1]])
    described = tmp_path / "train.json"
    content = json.loads(described.read_text()) | {"format": 99}
    del content["checksum"]
    write_sealed(described, content)
    with pytest.raises(LandmarkError, match="not of a kind that this version reads"):
        TokenFile.open(tmp_path / "train.bin")


def test_metadata_without_a_checksum_is_of_an_earlier_version(tmp_path):
    write(tmp_path / "train.bin", [[1, 2]])
    content = json.loads((tmp_path / "train.json").read_text())
    del content["checksum"], content["left_out"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(LandmarkError, match="lacks 'checksum'"):
        TokenFile.open(tmp_path / "train.bin")
    (tmp_path / "train.json").write_text(json.dumps(content | {"format": 1, "modified_ns": [0, 0]}))
    assert TokenFile.open(tmp_path / "train.bin").metadata.left_out is None
    # Its contents were looked at, and it has a checksum from now on.
    assert json.loads((tmp_path / "train.json").read_text()).keys() > {"checksum"}


def test_every_bit_of_the_metadata_counts(tmp_path):
    write(tmp_path / "train.bin", [[1, 2]])
    content = (tmp_path / "train.json").read_bytes()
    for bit in range(0, 8 * len(content), 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "train.json").write_bytes(damaged)
        try:
            assert TokenFile.open(tmp_path / "train.bin")
        except LandmarkError:
            continue
        assert json.loads(damaged) == json.loads(content)
