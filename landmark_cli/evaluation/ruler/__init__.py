"""RULER's synthetic tasks (Hsieh et al., arXiv 2404.06654; github.com/NVIDIA/RULER): offline, exact in tokens.

wording.py has the benchmark's texts, encoding.py and haystacks.py put prompts of an exact length together, needles.py,
lists.py and documents.py have the tasks, tasks.py the table of them; score.py judges, run.py asks, report.py shows.
"""
