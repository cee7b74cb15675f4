"""Compiles the Triton kernels of a block with its lite residual for a GPU that need not be there.

The interpreter accepts much that the compiler does not. ``python compile_triton.py 80 float32`` prints a line for each
kernel that was compiled for compute capability 8.0.
"""

import sys

import torch
import triton
from test_triton import inverted_residual, with_tensors_of
from test_triton_branch import lite_residual
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tinytl_hf.lean import triton_backend as backend
from tinytl_hf.lean import triton_launch
from tinytl_hf.lean.lite_branch import Branch
from tinytl_hf.lean.stage import SMOOTH

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
TYPES |= {torch.uint8: "u8", torch.int64: "i64"}


class Compiled:
    """Stands for a kernel; compiles it where it would be launched."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, *arguments, **constants):
        names = self.kernel.arg_names
        constants |= {name: None for name, value in zip(names, arguments, strict=False) if value is None}
        types = {name: _type(value) for name, value in zip(names, arguments, strict=False)}
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32))
        sys.stdout.write(f"{self.kernel.__name__} {len(compiled.asm['cubin'])}\n")


def _type(value):
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


def main(capability, dtype):
    launch = triton_launch._launch
    triton_launch._launch = lambda kernel, *a, **k: launch(Compiled(kernel, capability), *a, **k)
    x = torch.randn(2, 24, 12, 12)
    for activation in ("relu6", *SMOOTH):
        chain = inverted_residual(24, 72, activation, residual=True)
        chain = with_tensors_of(chain, torch.promote_types(dtype, torch.float32), "cpu")
        y, pooled, kept = backend.chain_forward(chain, x, dtype, True, True)
        backend.chain_backward(chain, kept, x.shape, dtype, y, pooled, True, [True] * 3)
    branch = Branch(lite_residual(torch.float32, 24, 24))
    small, statistics = backend.branch_forward(branch, pooled, dtype)
    backend.branch_backward(branch, pooled, statistics, dtype, small, True)
    backend.upsample_add(y, small)
    backend.upsample_backward(y, small.shape, dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]))
