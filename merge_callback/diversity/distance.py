"""The RMS distance and the sums of squares that it is computed from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from merge_callback.reduce import one_pass
from merge_callback.sharding.live import as_real


def squared_distances(theta_1: Mapping[str, Tensor], theta_2: Mapping[str, Tensor]) -> dict[str, float]:
    """Σ (θ₁ − θ₂)² of every floating-point or complex tensor, summed in fp32 blocks and fp64.

    Args:
        theta_1: tensors by name, any shapes and float dtypes.
        theta_2: the same names and shapes; each tensor has the device and dtype of its counterpart.

    Raises:
        ValueError: if names or a shape differ.
    """
    if theta_1.keys() != theta_2.keys():
        raise ValueError(f"the names differ: {sorted(theta_1.keys() ^ theta_2.keys())[:5]}")
    return {
        name: _squared_distance(name, t, theta_2[name])
        for name, t in theta_1.items()
        if t.is_floating_point() or t.is_complex()
    }


def rms_per_tensor(squares: Tensor, numel: Tensor) -> Tensor:
    """RMS(t₁, t₂) = √(Σ (t₁ − t₂)² / n) of each tensor ("Practical Guidelines", App. C.2, eq. 4).

    Args:
        squares: fp64, one sum of squared differences per tensor.
        numel: int64, the number of elements of each tensor.
    """
    return (squares / numel.clamp(min=1)).sqrt()


def _squared_distance(name: str, a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"tensor {name!r}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    a, b = as_real(a.detach()).reshape(-1), as_real(b.detach()).reshape(-1)
    squares = one_pass([a, b], contrast=[-1.0, 1.0], bounds=[a.numel()])
    assert squares is not None
    return float(squares[0])
