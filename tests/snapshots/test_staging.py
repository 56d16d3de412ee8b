"""The ways between a GPU and host memory, on a pretended one: through pinned memory only, in any chunks."""

import pytest
import torch
from pretend_gpu import OnGpu, plain, pretend_gpu
from training_runs import assert_same_bits

from merge_callback.snapshots import staging
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.layout import Layout

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]


def tensors(seed):
    """Some of each dtype, of all sizes and memory formats."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (3,), (0,), (7, 5), (2, 3, 4, 4), (400,)]
    made = {
        f"{dtype}{shape}": (torch.randn(shape, generator=generator) * 9).to(dtype)
        for dtype in DTYPES
        for shape in shapes
    }
    made["channels last"] = torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last)
    made["large, transposed"] = torch.randn(30, 40, generator=generator).T
    return made


def on_gpu(values):
    return {name: tensor.clone().as_subclass(OnGpu) for name, tensor in values.items()}


@pytest.fixture(params=[512, 1 << 26], ids=["many chunks", "one"])
def gpu(request, monkeypatch):
    monkeypatch.setattr(staging, "_CHUNK", request.param)
    with pretend_gpu(monkeypatch) as gpu:
        yield gpu


def test_live_tensors_come_to_the_host_and_go_back(gpu):
    first, second = tensors(1), tensors(2)
    arena = Arena.empty(Layout.of(first))
    live = on_gpu(first)
    with gpu.refusing("event"):
        arena.copy_from(live)
        assert_same_bits(arena.tensors(), first)  # it waits until all has arrived
        for tensor, other in zip(live.values(), second.values(), strict=True):
            tensor.copy_(other.as_subclass(OnGpu))
        arena.copy_to(live)
    assert_same_bits({name: plain(tensor) for name, tensor in live.items()}, first)


def test_values_are_cast_on_the_way(gpu):
    values = {"a": torch.randn(500), "b": torch.randn(3, 3)}
    arena = Arena.empty(Layout.of(values, torch.bfloat16))
    live = on_gpu(values)
    arena.copy_from(live)
    arena.copy_to(live)
    assert_same_bits(
        {n: plain(t) for n, t in live.items()}, {n: t.bfloat16().float() for n, t in values.items()}
    )


def test_a_copy_that_was_cut_off_leaves_nothing_behind(gpu):
    values = tensors(3)
    live = on_gpu(values)
    kept = Arena.empty(Layout.of(values))
    kept.copy_from(live)

    def broken(pairs, after):
        for index, pair in enumerate(pairs):
            if index == after:
                raise KeyboardInterrupt
            yield pair

    spoilt = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    for after in (1, 9, 20):
        pairs = [(spoilt[n].contiguous(), live[n]) for n in values]
        with pytest.raises(KeyboardInterrupt):
            staging.fetch(broken(pairs, after))
        before = [target.clone() for target, _ in pairs]
        again = Arena.empty(kept.layout)
        again.copy_from(live)
        assert_same_bits(again.tensors(), values)
        assert_same_bits([target for target, _ in pairs], before)  # nothing lands there any more
        with pytest.raises(KeyboardInterrupt):
            staging.send(broken([(live[n], staging.copying(values[n])) for n in values], after))
        kept.copy_to(live)
        assert_same_bits({name: plain(tensor) for name, tensor in live.items()}, values)
