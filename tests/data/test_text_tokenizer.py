"""What all tokenizers have in common."""

from landmark_cli.data.text_tokenizer import tokenizer_fingerprint


def test_fingerprints_tell_tokenizers_apart(gpt2):
    assert tokenizer_fingerprint(gpt2.encode) == gpt2.fingerprint
    assert tokenizer_fingerprint(lambda text: list(text.encode())) != gpt2.fingerprint
