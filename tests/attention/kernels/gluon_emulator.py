"""Runs Gluon kernels on the CPU: warps are threads, barriers are real, products happen when they are waited for.

Enough of the language for the Hopper kernels, with the hardware's freedoms used to the worst: a product reads its
operands only at the wait that ends it (so a slot given back too early is noticed), copies zero-fill outside their
tensor, shared memory begins as NaN, and a wait that lasts too long is a deadlock. Loops carry what Triton's compiler
makes them carry. Layouts and registers mean nothing.
"""

import ast
import functools
import inspect
import sys
import textwrap
import threading
import types

import torch
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

DEADLOCK = 20.0
here = threading.local()


class Value(torch.Tensor):
    """A register tensor or a scalar: torch's, but `type` says what a Gluon tensor's does."""

    type = types.SimpleNamespace(layout=None)
    __iadd__, __isub__, __imul__ = torch.Tensor.__add__, torch.Tensor.__sub__, torch.Tensor.__mul__


def value(x) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


class Pointer:
    def __init__(self, tensor: torch.Tensor, at=0):
        self.tensor, self.at = tensor, at
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, step):
        return Pointer(self.tensor, self.at + torch.as_tensor(step).long())

    def memory(self):
        numel = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        return self.tensor.as_strided((numel,), (1,), 0), torch.as_tensor(self.at) + self.tensor.storage_offset()


class Descriptor:
    def __init__(self, described):
        self.base, self.shape = described.base.detach(), described.shape
        nbytes = torch.Size(described.block_shape).numel() * described.base.element_size()
        self.block_type = types.SimpleNamespace(shape=described.block_shape, nbytes=nbytes)
        self.layout, self.dtype = None, described.base.dtype

    def box(self, corner):
        """(slices inside the tensor, slices inside the tile) of a copy."""
        spans = [(int(c), int(c) + size) for c, size in zip(corner, self.block_type.shape, strict=True)]
        inside = [(max(a, 0), max(min(b, n), max(a, 0))) for (a, b), n in zip(spans, self.shape, strict=True)]
        return tuple(slice(*x) for x in inside), tuple(
            slice(a - start, b - start) for (a, b), (start, _) in zip(inside, spans, strict=True)
        )


class Shared:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    shape = property(lambda self: list(self.tensor.shape))
    dtype = property(lambda self: self.tensor.dtype)

    def index(self, at):
        return Shared(self.tensor[int(at)])

    def slice(self, start, length, dim=0):
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def _reinterpret(self, dtype, shape, layout):
        assert dtype == self.dtype
        return Shared(self.tensor.view(shape))

    def load(self, layout):
        return value(self.tensor.clone())

    def store(self, x):
        assert x.dtype == self.dtype
        self.tensor.copy_(x)


class Barrier:
    def __init__(self):
        self.changed = threading.Condition()

    def init(self, count):
        self.count, self.left, self.bytes, self.phase = count, count, 0, 0

    def arrive(self, count=1, nbytes=0):
        """nbytes: to be copied before the phase ends, or copied if negative."""
        with self.changed:
            self.left -= count
            self.bytes += nbytes
            assert self.left >= 0, "more arrivals than a phase has"
            if self.left == 0 and self.bytes == 0:
                self.left, self.phase = self.count, self.phase ^ 1
                self.changed.notify_all()

    def wait(self, phase):
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != int(phase), DEADLOCK):
                raise TimeoutError(f"deadlock in phase {int(phase)}")


class Barriers:
    def __init__(self, count):
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, at):
        return self.barriers[int(at)]


class Product:
    """a b + acc, read and calculated when it is waited for."""

    def __init__(self, a, b, acc):
        self.operands = a, b, acc
        self.result = None

    def finish(self):
        a, b, acc = (x.tensor if isinstance(x, Shared) else x for x in self.operands)
        acc = acc.result if isinstance(acc, Product) else acc
        assert a.dtype == b.dtype and acc.shape == (a.shape[0], b.shape[1])
        self.result = value(acc + a.float() @ b.float())


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    assert is_async
    product = Product(a, b, acc if use_acc else torch.zeros_like(acc))
    here.products.append(product)
    return product


def warpgroup_mma_wait(left, deps):
    while len(here.products) > left:
        here.products.pop(0).finish()
    found = tuple(x.result if isinstance(x, Product) else x for x in deps)
    assert all(x is not None for x in found), "the wait leaves a product unfinished that is used"
    return found if len(found) > 1 else found[0]


def copy_in(descriptor, corner, barrier, tile):
    source, place = descriptor.box(corner)
    data = torch.zeros(descriptor.block_type.shape, dtype=descriptor.dtype)
    data[place] = descriptor.base[source]
    tile.tensor.copy_(data)
    barrier.arrive(0, -descriptor.block_type.nbytes)


def copy_out(descriptor, corner, tile):
    target, place = descriptor.box(corner)
    descriptor.base[target] = tile.tensor[place]


def load(pointer, mask=None, other=None):
    memory, at = pointer.memory()
    if mask is None:
        return value(memory[at])
    mask, at = torch.broadcast_tensors(mask.as_subclass(torch.Tensor), at.as_subclass(torch.Tensor))
    found = memory[torch.where(mask, at, 0)]
    return value(torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))


def store(pointer, x, mask):
    memory, at = pointer.memory()
    mask, at, x = torch.broadcast_tensors(*(t.as_subclass(torch.Tensor) for t in (mask, at, x)))
    memory[at[mask]] = x[mask]


def allocate_shared_memory(dtype, shape, layout):
    if dtype == torch.int64:
        return Barriers(shape[0])
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def warp_specialize(roles, warps, registers):
    assert len(warps) == len(registers) == len(roles) - 1
    failures = []
    program = here.program

    def run(function, arguments):
        here.program, here.products = program, []
        try:
            function(*arguments)
            assert not here.products, "a product is never waited for"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=role, daemon=True) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def assembly(text, constraints, arguments, dtype, is_pure, pack):
    (x,) = arguments
    name = text.split(".")[0]
    return {"cvt": lambda: x.to(dtype), "ex2": lambda: torch.exp2(x), "rcp": lambda: 1 / x}[name]()


def where(condition, a, b):
    if isinstance(condition, bool):
        return value(a if condition else b)
    return value(torch.where(condition, a, b))


# Python 3.11 counts how deep it parses for all threads together.
parsing = threading.Lock()


@functools.cache
def changed_in_branches(code: types.CodeType, line: int) -> set[str]:
    """The variables that branches inside the loop at this line assign."""
    lines, first = inspect.getsourcelines(code)
    with parsing:
        tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For) and node.lineno == line]
    branches = [node for loop in loops for node in ast.walk(loop) if isinstance(node, ast.If)]
    names = [node for branch in branches for node in ast.walk(branch) if isinstance(node, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


class Loop:
    """A range that stops where Triton would compile something else.

    Triton works out what a loop carries by looking for variables that its first turn changes, and compares values, not
    names: one that is given the very value it had before the loop stays that value in every turn. (Seen here only in
    values, not in plain numbers, of which Python has one each.) What a branch may change is another value to it,
    whether the first turn takes that branch or not.
    """

    def __init__(self, *bounds):
        self.numbers = iter(range(*map(int, bounds)))
        self.turns = 0

    def __iter__(self):
        return self

    def __next__(self):
        frame = sys._getframe(1)
        variables = frame.f_locals
        if self.turns == 0:
            branches = changed_in_branches(frame.f_code, frame.f_lineno)
            self.before = {n: x for n, x in variables.items() if isinstance(x, Value) and n not in branches}
        elif self.turns == 1:
            self.constant = [name for name, x in self.before.items() if variables[name] is x]
        else:
            moved = [name for name in self.constant if variables[name] is not self.before[name]]
            assert not moved, f"Triton takes {', '.join(moved)} for constant in this loop"
        self.turns += 1
        return value(next(self.numbers))


def no_layout(*_) -> None:
    """Layouts mean nothing here."""


LANGUAGE = types.SimpleNamespace(
    constexpr=lambda x: x,
    bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32, int32=torch.int32, int64=torch.int64,
    NVMMADistributedLayout=no_layout, DotOperandLayout=no_layout, SliceLayout=no_layout, BlockedLayout=no_layout,
    SwizzledSharedLayout=no_layout, NVMMASharedLayout=types.SimpleNamespace(get_default_for=no_layout),
    allocate_shared_memory=allocate_shared_memory,
    arange=lambda first, last, layout: value(torch.arange(first, last, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, x, dtype, layout: value(torch.full(shape, x, dtype=dtype)),
    max=lambda x, dim: x.amax(dim), sum=lambda x, dim: x.sum(dim),
    maximum=lambda a, b: torch.maximum(value(a), value(b)), minimum=lambda a, b: torch.minimum(value(a), value(b)),
    exp2=torch.exp2, log2=torch.log2, where=where, convert_layout=lambda x, layout: x,
    cdiv=lambda a, b: (a + b - 1) // b, static_range=range, load=load, store=store,
    program_id=lambda axis: here.program[0], num_programs=lambda axis: here.program[1],
    inline_asm_elementwise=assembly, warp_specialize=warp_specialize,
)  # fmt: skip
GLOBALS = {
    "gl": LANGUAGE,
    "tl": LANGUAGE,
    "mbarrier": types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, nbytes: barrier.arrive(1, nbytes),
        arrive=lambda barrier, count, pred=True: barrier.arrive(count) if pred else None,
        wait=lambda barrier, phase, pred=True: barrier.wait(phase) if pred else None,
    ),
    "tma": types.SimpleNamespace(
        async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=lambda left: None
    ),
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": lambda: None,
    "thread_barrier": lambda: None,
    "range": Loop,
}


class Emulated:
    """A kernel that is launched like the original."""

    def __init__(self, kernel: JITFunction):
        self.function = emulated(kernel, {})

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, maxnreg, **constants):
            for program in range(grid[0]):
                here.program, here.products = (program, grid[0]), []
                self.function(*map(argument, arguments), **constants)

        return launch


def argument(x):
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    if isinstance(x, torch.Tensor):
        return Pointer(x.detach())
    return value(x) if isinstance(x, int) else x


def emulated(kernel, known: dict):
    """The plain function of a kernel or of a part of one, with everything it names replaced by its emulation."""
    function = kernel.fn
    scope = known.setdefault(id(function.__globals__), {})
    if not scope:
        for name, x in function.__globals__.items():
            scope[name] = x.value if isinstance(x, gl.constexpr) else x
        scope |= {name: x for name, x in GLOBALS.items() if name in scope or name == "range"}
        for name, x in function.__globals__.items():
            if hasattr(x, "fn") and name not in GLOBALS:
                scope[name] = emulated(x, known)
    return types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
