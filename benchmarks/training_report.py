"""The tables of training.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training import Case, Result


def report(
    about: str, method: str, results: list[Result], parts: dict[Case, dict[str, float]], compared: dict[str, Result]
) -> str:
    """Everything as Markdown. about: the command, machine and versions. method: what the columns say."""
    lines = [
        "# The training step",
        "",
        about,
        "",
        method,
        "",
        "| case | model | mode | window | batch | stream tokens/s | text tokens/s | of the baseline | MFU | memory GiB "
        "| ms a step | with loader | waits |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    speeds = {(r.case.name, r.case.kind, r.case.mode): r.stream_tokens for r in results}
    for r in results:
        case = r.case
        baseline = speeds.get((case.name, "baseline", case.mode))
        share = f"{r.stream_tokens / baseline:.3f}" if baseline else "-"
        mfu = "-" if r.mfu is None else f"{r.mfu:.1%}"
        lines.append(
            f"| {case.name} | {case.kind} | {case.mode} | {case.length} | {case.batch} x {case.accumulation} | "
            f"{r.stream_tokens:,.0f} | {r.text_tokens:,.0f} | {share} | {mfu} | {r.memory / 2**30:.1f} | "
            f"{1e3 * r.seconds:.1f} | {1e3 * r.loading:.1f} | {r.waits} |"
        )
    if parts:
        lines += [
            "",
            "Milliseconds of a compiled step by part. Each was timed by itself, forward and backward, in a CUDA "
            "graph with a cold L2 cache, and counted for all layers and micro-batches; the attention layer includes "
            "the attention itself and, like the MLP, its norm. The rest is what the whole step takes beside them: "
            "embedding, residual sums, gaps between kernels.",
            "",
            "| case | model | attention itself | attention layer | MLP | head and loss | clipping and AdamW | rest |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        whole = {r.case: 1e3 * r.seconds for r in results}
        for case, taken in parts.items():
            rest = whole[case] - sum(taken.values()) + taken["attention itself"]
            cells = " | ".join(f"{value:.1f}" for value in [*taken.values(), rest])
            lines.append(f"| {case.name} | {case.kind} | {cells} |")
    if compared:
        lines += ["", "| landmark, seed, compiled | stream tokens/s | memory GiB |", "|---|---:|---:|"]
        lines += [f"| {name} | {r.stream_tokens:,.0f} | {r.memory / 2**30:.1f} |" for name, r in compared.items()]
    return "\n".join(lines) + "\n"
