"""Documents in which something must be found: facts hidden in prose, and questions about them at the end.

    vocabulary.py   names and values, made of parts
    facts.py        what is said of them, and how it is asked
    formats.py      how facts stand in a text: prose, dialogue, lists, JSON, tables, code
    questions.py    how questions and answers stand at the end
    kinds.py        what is hidden and asked: one fact, several, chains, counts, order, quotations, what is not there
    corpus.py       one document of a kind at a length, and the corpus of them

Nothing here is worded as the pass key of arXiv 2305.16300 or as a task of RULER (arXiv 2404.06654) is, so that these
stay tests.
"""
