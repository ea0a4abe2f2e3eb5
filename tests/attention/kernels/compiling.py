"""Compiling kernels for an H100, which takes no GPU."""

import types


class H100:
    """As much of Triton's driver as compiling takes."""

    utils = types.SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448})

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


class Compiled:
    """Instead of a kernel: compiles it, and keeps the assembly, and how many bytes of shared memory it takes."""

    def __init__(self, kernel):
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid):
        def compile_(*arguments, **options):
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.assembly, self.shared = compiled.asm["ptx"], compiled.metadata.shared

        return compile_
