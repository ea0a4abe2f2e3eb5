"""Documents that workers make, which import this module and, so that they begin at once, nothing heavy by it."""

from landmark_cli.data.documents import BadText, bad_document, text_document


def with_a_fault():
    yield "train", text_document("first", "text")
    raise ZeroDivisionError


def with_bad_text():
    for number in range(40):
        bad = BadText(f"{number}: no text", "file", 2)
        yield "train", bad_document(bad) if number % 20 == 5 else text_document(f"{number}", f"text {number}")
