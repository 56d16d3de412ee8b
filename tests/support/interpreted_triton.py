"""What differs between Triton's interpreter and its compiled kernels."""

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_to_bf16(monkeypatch):
    """Has the interpreter round fp32 to bf16, as compiled kernels do (cvt.rn.bf16); it truncates."""
    cast = InterpreterBuilder.cast_impl

    def rounded(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
