"""First check of the Hopper kernels on a GPU: agreement with the definition, then times beside the other kernels.

python benchmarks/hopper_check.py            # everything; each group in a process of its own, with a time limit
python benchmarks/hopper_check.py GROUP      # one group here
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LIMIT = 60
CHECKS = {
    # name: (dtype, head dim, block, [(B, H, G, Tq, Tk)])
    "d128": ("bfloat16", 128, 64, [(1, 1, 1, 256, 256), (2, 4, 4, 512, 512), (1, 3, 3, 700, 700), (1, 2, 2, 300, 1003),
                                   (3, 100, 100, 257, 257), (1, 1, 1, 4500, 4500), (1, 2, 2, 1100, 5001)]),
    "gqa": ("bfloat16", 128, 64, [(2, 8, 2, 512, 512), (1, 6, 2, 333, 1111), (1, 4, 1, 2048, 2048)]),
    "d64": ("bfloat16", 64, 64, [(1, 1, 1, 256, 256), (2, 4, 2, 777, 777), (1, 2, 2, 300, 999), (1, 1, 1, 4500, 4500)]),
    "b51": ("bfloat16", 128, 51, [(1, 1, 1, 256, 256), (2, 4, 2, 512, 512), (1, 2, 2, 300, 999),
                                  (1, 1, 1, 4096, 4096)]),
    "b51d64half": ("float16", 64, 51, [(2, 4, 2, 512, 512), (1, 2, 2, 300, 1003)]),
    "half": ("float16", 128, 64, [(2, 4, 2, 512, 512), (1, 2, 2, 300, 1003)]),
    "b16": ("bfloat16", 128, 16, [(1, 2, 1, 512, 512), (1, 2, 2, 300, 1003)]),
    "b33": ("bfloat16", 128, 33, [(1, 2, 1, 512, 512), (1, 2, 2, 300, 1003)]),
    "b24d64": ("bfloat16", 64, 24, [(1, 2, 1, 512, 512), (1, 2, 2, 300, 1003)]),
    "parts": ("bfloat16", 128, 64, [(1, 1, 1, 8192, 8192), (1, 2, 1, 6000, 8192)]),
}  # fmt: skip
TIMED = [(16, 8, 512, 128, 64), (4, 32, 2048, 128, 64), (2, 32, 4096, 128, 64), (1, 32, 8192, 128, 64),
         (1, 32, 16384, 128, 64), (4, 16, 4096, 64, 64), (2, 32, 4080, 128, 51)]  # fmt: skip


def check(name: str) -> None:
    import torch

    from landmark_cli.attention.hopper import launch
    from landmark_cli.attention.reference import landmark_attention as eager

    dtype, dim, block, shapes = CHECKS[name]
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    for batch, heads, key_heads, queries, keys in shapes:
        sizes = (queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads)
        q, k, v, dout = (
            torch.randn(batch, tokens, h, dim, dtype=dtype, device="cuda").transpose(1, 2) for tokens, h in sizes
        )
        # Those that are timed later without a gradient of lse are checked, and so compiled, without.
        dlse = None if name in ("d128", "d64", "b51") else torch.randn(batch, heads, queries, device="cuda")
        scale = dim**-0.5
        label = f"{name:11} B{batch} H{heads}on{key_heads} T{queries}of{keys}"
        begin = time.time()
        out, lse = launch.forward(q, k, v, block, scale)
        torch.cuda.synchronize()
        print(f"{label}: forward ran ({time.time() - begin:.1f} s)", flush=True)
        exact = [x.float().requires_grad_() for x in (q, k, v)]
        want, want_lse = eager(*exact, block_size=block, return_lse=True)
        report(label, {"out": (out, want), "lse": (lse, want_lse)})
        grads = launch.backward(dout, dlse, q, k, v, out, lse, block, scale)
        torch.cuda.synchronize()
        outputs = [want] if dlse is None else [want, want_lse]
        wanted = torch.autograd.grad(outputs, exact, [dout.float(), dlse][: len(outputs)])
        report(label, dict(zip(("dq", "dk", "dv"), zip(grads, wanted, strict=True), strict=True)))
        again = (*launch.forward(q, k, v, block, scale), *launch.backward(dout, dlse, q, k, v, out, lse, block, scale))
        same = all(torch.equal(a, b) for a, b in zip(again, (out, lse, *grads), strict=True))
        print(f"RESULT {label}: repeats {'the same' if same else 'DIFFER'}", flush=True)


def report(label, pairs) -> None:
    import torch

    words = []
    for name, (found, wanted) in pairs.items():
        difference = found.float() - wanted
        error = (difference.norm() / wanted.norm()).item()
        words.append(f"{name} {error:.1e}{'' if error < 5e-3 else ' BAD'}")
        if not error < 5e-3:
            rows = difference.float().flatten(3).norm(dim=-1) if difference.dim() == 4 else difference.abs()
            bad = torch.nonzero(
                ~(rows < 0.05 * wanted.float().abs().mean() * (128 if difference.dim() == 4 else 1) ** 0.5)
            )
            words.append(f"({len(bad)} bad rows of {rows.numel()}: {bad[:4].tolist()} .. {bad[-2:].tolist()})")
    print(f"RESULT {label}: {' '.join(words)}", flush=True)


def graph_time(function) -> float:
    """Microseconds of one call under a CUDA graph."""
    import torch

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    count = max(1, min(50, int(10 / max(start.elapsed_time(end), 0.01))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            function()
    times = []
    for _ in range(6):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / count)
    return sorted(times[1:])[2]


def warm() -> None:
    """Compile what `timing` will run."""
    import torch

    from landmark_cli.attention.fused import launch as portable
    from landmark_cli.attention.hopper import launch

    for tokens, dim, block in ((512, 128, 64), (4096, 128, 64), (4096, 64, 64), (4080, 128, 51)):
        q = torch.randn(1, tokens, 2, dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        for choice in tried(launch, dim):
            launch.forward(q, q, q, block, 0.1, choice=choice)
        layout = portable.Layout(block, 0.1)
        portable.backward(q, None, q, q, q, *portable.forward(q, q, q, layout), layout)
        torch.cuda.synchronize()
    print("RESULT all ran", flush=True)


def tried(launch, dim: int) -> list:
    choice = launch.ForwardConfiguration
    if dim == 128:
        return [choice(2, 3, 4, 2), choice(2, 4, 4, 2), choice(2, 3, 4, 1)]
    return [choice(3, 4, 4, 1), choice(2, 4, 4, 2), choice(2, 4, 4, 1)]


def timing() -> None:
    import torch

    print("RESULT", torch.cuda.get_device_name(), torch.__version__, flush=True)
    for shape in TIMED:
        time_shape(*shape)


def time_shape(batch: int, heads: int, tokens: int, dim: int, block: int) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from landmark_cli.attention.fused import launch as portable
    from landmark_cli.attention.hopper import launch

    q, k, v, dout = (
        torch.randn(batch, tokens, heads, dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(4)
    )
    flops = 4 * batch * heads * tokens * tokens * dim / 2 / 1e6
    scale = dim**-0.5
    words, backward = [], []

    def measure(name, function, work, found):
        try:
            found.append(f"{name} {work / function():.0f}")
        except Exception as error:
            found.append(f"{name} {type(error).__name__}: {str(error)[:200]}")

    for c in tried(launch, dim):
        name = f"h{c.consumers}{c.key_slots}{c.value_slots}{c.step}"
        measure(name, lambda c=c: graph_time(lambda: launch.forward(q, k, v, block, scale, choice=c)), flops, words)
    out, lse = launch.forward(q, k, v, block, scale)
    layout = portable.Layout(block, scale)
    measure("portable", lambda: graph_time(lambda: portable.forward(q, k, v, layout)), flops, words)
    work = 2.5 * flops
    whole = functools.partial(launch.backward, dout, None, q, k, v, out, lse, block, scale)
    measure("hopper", lambda: graph_time(whole), work, backward)
    part = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": lse, "dlse": None}
    part |= {f"d{name}": torch.empty_like(part[name]) for name in "qkv"}
    some = 0, min(batch * heads, 8)
    share = some[1] / (batch * heads)
    first = functools.partial(launch.query_gradient, part, some, block, scale)
    second = functools.partial(launch.key_gradient, part, first(), some, block, scale, accumulate=False)
    measure("dq (3 products)", lambda: graph_time(first), work * share * 3 / 5, backward)
    measure("dkv (4)", lambda: graph_time(second), work * share * 4 / 5, backward)
    whole = functools.partial(portable.backward, dout, None, q, k, v, out, lse, layout)
    measure("portable", lambda: graph_time(whole), work, backward)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for name, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                ahead = graph_time(lambda: sdpa(q, k, v, is_causal=True))
                both = graph_time(lambda: torch.autograd.grad(sdpa(*leaves, is_causal=True), leaves, dout))
            words.append(f"{name} {flops / ahead:.0f}")
            backward.append(f"{name} {work / (both - ahead):.0f}")
        except Exception as error:
            words.append(f"{name} {type(error).__name__}: {str(error)[:100]}")
    print(f"RESULT B{batch} H{heads} T{tokens} D{dim} block {block} TF/s forward: {'  '.join(words)}", flush=True)
    print(f"RESULT    backward: {'  '.join(backward)}", flush=True)
    if tokens == 512:
        for name, call in (
            ("hopper", lambda: launch.forward(q, k, v, block, scale)),
            ("portable", lambda: portable.forward(q, k, v, layout)),
            ("hopper backward", lambda: launch.backward(dout, None, q, k, v, out, lse, block, scale)),
            ("portable backward", lambda: portable.backward(dout, None, q, k, v, out, lse, layout)),
        ):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(50):
                call()
            host = (time.perf_counter() - begin) / 50 * 1e6
            torch.cuda.synchronize()
            print(f"RESULT    host time of a launch, us: {name} {host:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", nargs="?", choices=[*CHECKS, "warm", "timing"])
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a group may take")
    arguments = parser.parse_args()
    if arguments.group:
        {"timing": timing, "warm": warm}.get(arguments.group, lambda: check(arguments.group))()
        return
    begin = time.time()
    waiting, results, running = ["warm", *CHECKS], {}, {}
    folder = Path(tempfile.mkdtemp())
    while waiting or running:
        while waiting and len(running) < 8:
            name = waiting.pop(0)
            log = open(folder / name, "w")
            command = [sys.executable, __file__, name]
            running[name] = (
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT),
                time.time(),
            )
        for name, (process, started) in list(running.items()):
            if process.poll() is None and time.time() - started > arguments.limit:
                process.kill()
                process.wait()
                results[name] = "TIMED OUT (a deadlock?)"
            elif process.poll() is not None:
                results[name] = f"exit {process.returncode} after {time.time() - started:.0f} s"
            else:
                continue
            del running[name]
        time.sleep(0.1)
    for name in results:
        text = (folder / name).read_text().splitlines()
        print(f"== {name}: {results[name]}")
        print("\n".join(line for line in text if line.startswith("RESULT")))
        if results[name][:6] != "exit 0":
            print("\n".join(line[:200] for line in text[-12:]))
    print(f"== checks took {time.time() - begin:.0f} s", flush=True)
    if not arguments.no_timing:
        try:
            process = subprocess.run([sys.executable, __file__, "timing"], capture_output=True, text=True, timeout=120)
            text = process.stdout.splitlines()
            print("\n".join(line for line in text if line.startswith("RESULT")))
            if process.returncode:
                print(process.stderr[-2500:])
        except subprocess.TimeoutExpired as error:
            print((error.stdout or b"").decode()[-4000:], "TIMED OUT")
    print(f"== all took {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
