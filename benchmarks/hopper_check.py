"""The Hopper kernels on a GPU, in three minutes: agreement with the definition, then times beside the other kernels.

    python benchmarks/hopper_check.py                     # everything
    python benchmarks/hopper_check.py --no-timing
    python benchmarks/hopper_check.py --run d128          # one group in this process
    python benchmarks/hopper_check.py --run tiny          # a few small shapes, for compute-sanitizer

Groups of shapes run in processes of their own, all at a time. One that says nothing for SILENCE seconds is ended: the
kernel that it named last hangs. Meanwhile two further processes compile what is to be timed; they begin when all groups
are done, one after the other, so that backward cannot spoil forward.
"""

import argparse
import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Compiling a kernel takes some five seconds, more when all processors are busy; nothing else takes long.
SILENCE = 20.0
# Until the first word, and while all is compiled that is to be timed.
START = 60.0
CHECKS = {
    # name: (dtype, head dim, block, [(B, H, G, Tq, Tk)])
    "d128": ("bfloat16", 128, 64, [(1, 1, 1, 256, 256), (1, 1, 1, 512, 512), (2, 4, 4, 512, 512), (1, 3, 3, 700, 700),
                                   (1, 2, 2, 300, 1003), (3, 100, 100, 257, 257), (1, 1, 1, 4500, 4500),
                                   (1, 2, 2, 1100, 5001)]),
    "gqa": ("bfloat16", 128, 64, [(2, 8, 2, 512, 512), (1, 4, 1, 333, 1111), (1, 4, 1, 2048, 2048)]),
    "d64": ("bfloat16", 64, 64, [(1, 1, 1, 256, 256), (2, 4, 4, 777, 777), (1, 2, 2, 300, 999), (1, 1, 1, 4500, 4500)]),
    "b51": ("bfloat16", 128, 51, [(1, 1, 1, 256, 256), (2, 4, 4, 512, 512), (1, 2, 2, 300, 999),
                                  (1, 1, 1, 4096, 4096)]),
    "half": ("float16", 64, 51, [(2, 4, 2, 512, 512), (1, 2, 1, 300, 1003)]),
    "b16": ("bfloat16", 128, 16, [(1, 2, 1, 512, 512), (1, 2, 1, 300, 1003)]),
    "b33": ("float16", 128, 33, [(1, 2, 1, 512, 512), (1, 2, 1, 300, 1003)]),
    "parts": ("bfloat16", 128, 64, [(1, 1, 1, 8192, 8192), (1, 2, 2, 6000, 8192)]),
    "tiny": ("bfloat16", 64, 64, [(1, 2, 2, 256, 256), (1, 1, 1, 300, 420)]),
}  # fmt: skip
PLAIN = "d128", "d64", "b51", "tiny"
TIMED = [(16, 8, 512, 128, 64), (8, 16, 1024, 128, 64), (4, 32, 2048, 128, 64), (2, 32, 4096, 128, 64),
         (1, 32, 8192, 128, 64), (1, 32, 16384, 128, 64), (16, 16, 512, 64, 64), (16, 9, 1024, 64, 64),
         (4, 16, 4096, 64, 64), (16, 8, 512, 128, 51), (8, 16, 1020, 128, 51), (4, 32, 2040, 128, 51),
         (2, 32, 4080, 128, 51), (1, 32, 8160, 128, 51), (16, 9, 1020, 64, 51)]  # fmt: skip


def say(*words) -> None:
    print(*words, flush=True)


def watched(module, name: str) -> None:
    """Have a launching function say when it begins and wait until it has ended."""
    import torch

    function = getattr(module, name)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        say(f"... {name}")
        result = function(*args, **kwargs)
        say(f"... {name} launched")
        torch.cuda.synchronize()
        return result

    setattr(module, name, wrapper)


def check(name: str) -> None:
    import torch

    from landmark_cli.attention.kernels.hopper import launch
    from landmark_cli.attention.reference import landmark_attention as eager

    for function in ("launch_forward", "launch_query_gradient", "launch_key_gradient"):
        watched(launch, function)
    dtype, dim, block, shapes = CHECKS[name]
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    worst = {}
    for batch, heads, key_heads, queries, keys in shapes:
        sizes = (queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads)
        q, k, v, dout = (
            torch.randn(batch, tokens, h, dim, dtype=dtype, device="cuda").transpose(1, 2) for tokens, h in sizes
        )
        # Those that are timed later without a gradient of lse are checked, and so compiled, without.
        dlse = None if name in PLAIN else torch.randn(batch, heads, queries, device="cuda")
        scale = dim**-0.5
        label = f"B{batch} H{heads}on{key_heads} T{queries}of{keys}"
        say(f"... {label}")
        exact = [x.float().requires_grad_() for x in (q, k, v)]
        want, want_lse = eager(*exact, block_size=block, return_lse=True)
        outputs = [want] if dlse is None else [want, want_lse]
        wanted = torch.autograd.grad(outputs, exact, [dout.float(), dlse][: len(outputs)])
        out, lse = launch.forward(q, k, v, block, scale)
        compare(label, worst, {"out": (out, want), "lse": (lse, want_lse)})
        grads = launch.backward(dout, dlse, q, k, v, out, lse, block, scale)
        compare(label, worst, dict(zip(("dq", "dk", "dv"), zip(grads, wanted, strict=True), strict=True)))
        for _ in range(3):
            again = launch.forward(q, k, v, block, scale)
            again += launch.backward(dout, dlse, q, k, v, out, lse, block, scale)
            if not all(torch.equal(a, b) for a, b in zip(again, (out, lse, *grads), strict=True)):
                say(f"RESULT {label}: repeats DIFFER")
                break
    say(f"RESULT all {len(shapes)} shapes ran; largest errors: {' '.join(f'{n} {e:.1e}' for n, e in worst.items())}")


def compare(label: str, worst: dict, pairs: dict) -> None:
    import torch

    from tests.closeness import whole_error

    for name, (found, wanted) in pairs.items():
        difference, error = found.float() - wanted, whole_error(found, wanted)
        worst[name] = max(worst.get(name, 0.0), error) if error == error else error
        if not error < 5e-3:
            # Errors of runs of 64 tokens tell which tile, and so which consumer or turn of a ring, is wrong.
            def size(x):
                return x.square().mean().sqrt().item()

            runs = [size(x) for x in difference.split(64, dim=2)][:24]
            heads = [size(x) for x in difference.flatten(0, 1)[:8]]
            say(f"RESULT {label}: {name} {error:.1e} BAD; {size(wanted):.0e} differs by, for each 64 tokens,",
                " ".join(f"{x:.0e}" for x in runs), "and for each head", " ".join(f"{x:.0e}" for x in heads),
                "" if torch.isfinite(found).all() else "NOT FINITE")  # fmt: skip


def graph_time(function) -> float:
    """Microseconds of one call under a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(function, rep=20, return_mode="median") * 1e3


def host_time(function) -> float:
    """Microseconds that the host takes to launch a call."""
    import torch

    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(50):
        function()
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return seconds / 50 * 1e6


def tried_forward(launch, dim: int) -> list:
    choice = launch.ForwardConfiguration
    if dim == 128:
        return [
            choice(2, 3, 4, 2),
            choice(2, 4, 4, 2),
            choice(2, 3, 4, 1),
            choice(2, 3, 4, 2, 2),
            choice(2, 3, 3, 1, 2),
        ]
    return [choice(2, 4, 4, 2), choice(2, 4, 4, 2, 2), choice(2, 4, 4, 1, 2), choice(3, 4, 4, 1), choice(3, 4, 4, 1, 2)]


def tried_backward(launch, dim: int) -> list:
    choice = launch.BackwardConfiguration
    if dim == 128:
        return [choice(4, 3, 2), choice(4, 3, 3), choice(5, 4, 3), choice(4, 2, 3)]
    return [choice(4, 3, 4), choice(4, 3, 4, 3), choice(5, 4, 4, 3), choice(6, 4, 8)]


class Inputs:
    """Tensors and constants of a timed shape."""

    def __init__(self, batch: int, heads: int, tokens: int, dim: int, block: int) -> None:
        import torch

        self.q, self.k, self.v, self.dout = (
            torch.randn(batch, tokens, heads, dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for _ in range(4)
        )
        self.block, self.scale = block, dim**-0.5
        self.flops = 4 * batch * heads * tokens * tokens * dim / 2 / 1e6
        self.name = f"B{batch} H{heads} T{tokens} D{dim} block {block}"


def forwards(x: Inputs) -> dict:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from landmark_cli.attention.kernels.hopper import launch
    from landmark_cli.attention.kernels.training import launch as portable

    layout = portable.Layout(x.block, x.scale)
    calls = {
        f"hopper{c.consumers}{c.key_slots}{c.value_slots}{c.step}{c.row_stages}": functools.partial(
            launch.forward, x.q, x.k, x.v, x.block, x.scale, choice=c
        )
        for c in tried_forward(launch, x.q.shape[3])
    }
    calls["portable"] = lambda: portable.forward(x.q, x.k, x.v, layout)
    for name, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def call(backend=backend):
            with sdpa_kernel(backend):
                return sdpa(x.q, x.k, x.v, is_causal=True)

        calls[name] = call
    return {name: (call, x.flops) for name, call in calls.items()}


def backwards(x: Inputs) -> dict:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from landmark_cli.attention.kernels.hopper import launch
    from landmark_cli.attention.kernels.training import launch as portable

    layout = portable.Layout(x.block, x.scale)
    out, lse = portable.forward(x.q, x.k, x.v, layout)
    given = x.dout, None, x.q, x.k, x.v, out, lse
    work = 2.5 * x.flops
    calls = {
        f"hopper{c.key_slots}{c.value_slots}{c.row_slots}{c.consumers}": (
            functools.partial(launch.backward, *given, x.block, x.scale, choice=c),
            work,
        )
        for c in tried_backward(launch, x.q.shape[3])
    }
    calls |= {
        "portable": (functools.partial(portable.backward, *given, layout), work),
    }
    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
    for name, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def attend(backend=backend):
            with sdpa_kernel(backend):
                return sdpa(*leaves, is_causal=True)

        # Backward runs in the stream of its forward, which is therefore captured with it, and taken off the time.
        calls[name] = lambda attend=attend: torch.autograd.grad(attend(), leaves, x.dout), (work, attend)
    return calls


def timing(phase: str) -> None:
    """Compile, wait for a line of input, then time every shape."""
    import torch

    calls_of = {"forward": forwards, "backward": backwards}[phase]
    for tokens, dim, block in ((512, 128, 64), (512, 64, 64), (510, 128, 51), (510, 64, 51)):
        for name, (call, _) in calls_of(Inputs(1, 2, tokens, dim, block)).items():
            with contextlib.suppress(Exception):
                call()
                torch.cuda.synchronize()
            say(f"... {name}")
    say("... compiled")
    sys.stdin.readline()
    say(f"RESULT {phase}, TF/s; {torch.cuda.get_device_name()}")
    for shape in TIMED:
        x = Inputs(*shape)
        words, host = [], []
        try:
            calls = calls_of(x)
        except Exception as error:
            say(f"RESULT {x.name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        for name, (call, work) in calls.items():
            work, ahead = work if isinstance(work, tuple) else (work, None)
            try:
                words.append(f"{name} {work / (graph_time(call) - (graph_time(ahead) if ahead else 0.0)):.0f}")
                if shape is TIMED[0]:
                    host.append(f"{name} {host_time(call):.0f}")
            except Exception as error:
                words.append(f"{name} {type(error).__name__}: {str(error)[:100]}")
        say(f"RESULT {x.name}: {'  '.join(words)}")
        if host:
            say(f"RESULT    us of host time a call: {'  '.join(host)}")
        del x, calls
        torch.cuda.empty_cache()


class Child:
    """A process that writes to a file, and when it last said something."""

    def __init__(self, name: str, folder: Path) -> None:
        self.log = folder / name
        self.file = self.log.open("w")
        self.heard, self.length = time.time(), 0
        self.begun, self.end = time.time(), ""
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--run", name], stdin=subprocess.PIPE, stdout=self.file, stderr=subprocess.STDOUT
        )

    def running(self, silence: float) -> bool:
        """Whether it runs on; ended here if it has been silent too long."""
        if self.end:
            return False
        length = self.log.stat().st_size
        if length != self.length:
            self.heard, self.length = time.time(), length
        if self.process.poll() is not None:
            self.end = f"exit {self.process.returncode} after {time.time() - self.begun:.0f} s"
        elif time.time() - self.heard > (silence if length else START):
            self.process.kill()
            self.process.wait()
            self.end = f"HANGS in {self.text()[-1:]}"
        return not self.end

    def text(self) -> list[str]:
        return self.log.read_text().splitlines()

    def report(self, name: str) -> None:
        print(f"== {name}: {self.end}")
        for line in self.text():
            if line.startswith("RESULT"):
                print(line[7:400])
        if not self.end.startswith("exit 0"):
            print("\n".join(f"   {line[:160]}" for line in self.text()[-6:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--run", choices=[*CHECKS, "forward", "backward"], help="a group, or a phase's timing, here")
    parser.add_argument("--no-timing", action="store_true")
    options = parser.parse_args()
    if options.run:
        timing(options.run) if options.run in ("forward", "backward") else check(options.run)
        return
    begin = time.time()
    folder = Path(tempfile.mkdtemp())
    groups = {name: Child(name, folder) for name in CHECKS if name != "tiny"}
    timings = {} if options.no_timing else {name: Child(name, folder) for name in ("forward", "backward")}
    while sum(child.running(SILENCE) for child in groups.values()):
        time.sleep(0.1)
    for name, child in groups.items():
        child.report(name)
    print(f"== checks took {time.time() - begin:.0f} s", flush=True)
    for name, child in timings.items():
        while child.running(START) and "... compiled" not in child.text():
            time.sleep(0.1)
        with contextlib.suppress(OSError):
            child.process.stdin.write(b"go\n")
            child.process.stdin.flush()
        child.heard = time.time()
        while child.running(SILENCE):
            time.sleep(0.1)
        child.report(name)
        print(f"== {name} timed after {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
