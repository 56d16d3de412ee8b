"""Each step's loss and gradient norm: the right numbers, one step late, whatever the module returns."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn

from merge_callback.sharding import Ranks
from merge_callback.signals.step_statistics import Statistics, StepStatistics
from merge_callback.signals.token_clock import TokenClock


def tensor(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype)


def with_gradient(*gradients):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def read(statistics, step=99, scale=None):
    """The step before, which ends as this one does."""
    return statistics.end_step(step, scale)


def loss_of(outputs, divided_by=1):
    statistics = StepStatistics()
    statistics.add_loss(outputs, divided_by)
    statistics.end_step(1, None)
    return read(statistics).loss


def test_a_step_is_read_when_the_next_one_ends():
    statistics, seen = StepStatistics(), []
    for step in range(1, 5):
        statistics.add_loss({"loss": tensor(float(step))}, 1)
        seen.append(statistics.end_step(step, None))
    assert seen == [None, *(Statistics(step, float(step), None, False) for step in (1, 2, 3))]


def test_the_loss_is_the_mean_of_the_micro_batches_as_they_were_before_lightning_divided_it():
    statistics = StepStatistics()
    losses = [1.0, 2.5, 4.0, 8.5]
    for loss in losses:
        statistics.add_loss({"loss": tensor(loss / 4)}, 4)
    statistics.end_step(1, None)
    statistics.add_loss({"loss": tensor(5.0 / 4)}, 4)  # the last step of an epoch may have fewer
    assert read(statistics, 2).loss == sum(losses) / 4
    assert read(statistics, 3).loss == 5.0


@pytest.mark.parametrize(
    "outputs", [None, {}, {"logits": tensor(1.0)}, {"loss": None}, "loss", {"loss": "x"}]
)
def test_without_a_loss_there_is_none(outputs):
    assert loss_of(outputs) is None


def test_micro_batches_without_a_loss_do_not_count():
    statistics = StepStatistics()
    for outputs in (None, {"loss": tensor(2.0)}, {}, {"loss": tensor(4.0)}):
        statistics.add_loss(outputs, 1)
    statistics.end_step(1, None)
    assert read(statistics).loss == 3.0


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (tensor(1.5), 1.5),
        (1.5, 1.5),
        ({"loss": 1.5}, 1.5),
        ({"loss": tensor(1.5, torch.bfloat16)}, 1.5),
        ({"loss": tensor(1.5, torch.float16)}, 1.5),
        ({"loss": tensor(1 / 3, torch.float64)}, 1 / 3),
        ({"loss": tensor([1.5])}, 1.5),
        ({"loss": tensor([1.0, 2.0])}, 1.5),
        ({"loss": tensor([[1.0, 1.0078125]], torch.bfloat16)}, 1.00390625),  # a mean that bf16 can't hold
        ({"loss": tensor(1.5).requires_grad_()}, 1.5),
        ({"loss": tensor(-1.5)}, -1.5),
        ({"loss": tensor(3)}, 3.0),
    ],
)
def test_a_loss_may_be_of_any_kind(outputs, expected):
    assert loss_of(outputs) == expected
    assert type(loss_of(outputs)) is float


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_micro_batch_makes_the_step_bad(bad):
    statistics = StepStatistics()
    for loss in (1.0, bad, 2.0):
        statistics.add_loss({"loss": tensor(loss)}, 1)
    statistics.end_step(1, None)
    assert repr(read(statistics).loss) == repr(bad)


def test_numbers_are_copies():
    statistics = StepStatistics()
    loss, scale, gradient = tensor(2.0, torch.float64), tensor(64.0), torch.full((4,), 3.0)
    statistics.add_loss({"loss": loss}, 1)
    statistics.add_gradients(with_gradient(gradient))
    for written in (loss, gradient):
        written.fill_(7.0)
    statistics.end_step(1, scale)
    scale.fill_(32.0)
    assert read(statistics, 2, scale) == Statistics(1, 2.0, 6.0, False)
    assert read(statistics, 3, scale).skipped


@contextmanager
def no_waiting(device):
    """Whatever waits for the device raises, but waiting for the one small copy of the step before."""
    mode = torch.cuda.get_sync_debug_mode() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture(params=["alone", "in a group"])
def ranks(request, tmp_path):
    """A lone rank, and one that sums all the same."""
    if request.param == "alone":
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield Ranks(dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_on_every_device_the_numbers_are_the_same_and_nothing_waits(device, ranks):
    statistics, seen = StepStatistics(ranks, device=device), []
    scale, loss, gradient = (torch.zeros(n, device=device) for n in ((), (), 4))
    parameters = with_gradient(gradient)
    for step in range(1, 9):
        loss.fill_(step / 2)
        gradient.fill_(step)
        scale.fill_(1024 / step)
        with no_waiting(device):
            statistics.add_loss({"loss": loss}, 2)
            statistics.add_loss({"loss": loss.bfloat16()}, 2)
            statistics.add_gradients(parameters)
            statistics.add_tokens(5)
            seen.append(statistics.end_step(step, scale))
        if step == 4:  # a resume goes on with numbers that have travelled already
            state = json.loads(json.dumps(statistics.state_dict()))
            statistics = StepStatistics(ranks, device=device)
            statistics.load_state_dict(state)
    assert seen == [None, *(Statistics(step, float(step), 2.0 * step, step > 1, 5) for step in range(1, 8))]


# --- gradients --------------------------------------------------------------------------------------------


def norm_of(*gradients):
    statistics = StepStatistics()
    statistics.add_gradients(with_gradient(*gradients))
    statistics.end_step(1, None)
    return read(statistics).grad_norm


def test_the_gradient_norm_is_that_of_all_gradients_of_all_optimizers():
    torch.manual_seed(0)
    gradients = [torch.randn(7, 5), torch.randn(3), torch.randn(()), torch.randn(2, 2)]
    statistics = StepStatistics()
    for share in (gradients[:2], gradients[2:]):
        statistics.add_gradients(p for p in [*with_gradient(*share), nn.Parameter(torch.ones(9))])
    statistics.end_step(1, None)
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert read(statistics, 2).grad_norm == pytest.approx(exact, rel=1e-6)  # the norms are fp32
    assert read(statistics, 3).grad_norm is None  # that of one step does not count for the next


def test_gradients_of_several_dtypes_have_one_norm():
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    assert norm_of(*(torch.full((4,), 2.0, dtype=d) for d in dtypes)) == pytest.approx(48**0.5, rel=1e-6)


def test_a_sparse_gradient_counts_what_is_summed_up_in_it():
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 1, 5])).sum().backward()  # 2 four times, 1 four times
    statistics = StepStatistics()
    statistics.add_gradients([*embedding.parameters(), *with_gradient(torch.full((4,), 2.0))])
    statistics.end_step(1, None)
    assert read(statistics).grad_norm == 6.0


def test_without_gradients_there_is_no_norm():
    statistics = StepStatistics()
    statistics.add_gradients([nn.Parameter(torch.ones(3))])
    statistics.end_step(1, None)
    assert read(statistics).grad_norm is None


def test_one_bad_gradient_makes_the_norm_bad():
    assert math.isnan(norm_of(tensor([math.nan]), tensor([1.0])))
    assert norm_of(tensor([math.inf]), tensor([1.0])) == math.inf


# --- fp16 -------------------------------------------------------------------------------------------------


def skips(steps):
    """For (loss, gradient, scale after the step): whether each but the last was skipped."""
    statistics, found = StepStatistics(), []
    for step, (loss, gradient, scale) in enumerate(steps, 1):
        statistics.add_loss({"loss": loss}, 1)
        if gradient is not None:
            statistics.add_gradients(with_gradient(tensor([gradient])))
        found.append(read(statistics, step, scale if scale is None else tensor(scale)))
    return [seen.skipped for seen in found[1:]]


def test_a_falling_loss_scale_is_a_skipped_step():
    scales = [64.0, 64.0, 32.0, 32.0, 64.0, 32.0, 16.0, 16.0, 16.0]
    assert skips([(2.0, None, s) for s in scales]) == [False, False, True, False, False, True, True, False]


def test_without_a_loss_scale_no_step_is_skipped():
    assert skips([(2.0, math.inf, None), (math.nan, 1.0, None), (2.0, 1.0, None)]) == [False, False]


def test_the_first_loss_scale_has_none_to_fall_from_so_an_overflow_tells():
    # The largest scale comes first: that the very first step overflows is as usual as harmless.
    assert skips([(2.0, math.inf, 32.0)] * 2) == [True]
    assert skips([(math.nan, None, 32.0)] * 2) == [True]
    assert skips([(2.0, 1.0, 32.0)] * 2) == [False]


def test_a_restore_that_sets_the_loss_scale_back_skips_no_step():
    for restored_scale, gradient, skipped in [
        (16.0, 1.0, False),
        (999.0, 1.0, False),
        (999.0, math.inf, True),
    ]:
        statistics = StepStatistics()
        for step in (1, 2):
            statistics.end_step(step, tensor(64.0))
        statistics.forget()
        statistics.add_gradients(with_gradient(tensor([gradient])))
        statistics.end_step(3, tensor(restored_scale))
        assert read(statistics, 4, tensor(restored_scale)).skipped is skipped


def test_a_real_grad_scaler_tells_which_steps_it_skipped():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    statistics, seen, moved = StepStatistics(), [], []
    for step in range(1, 13):
        optimizer.zero_grad()
        overflow = math.inf if step in (1, 5, 6, 9) else 1.0
        scaler.scale((weight * overflow).sum()).backward()
        scaler.unscale_(optimizer)
        statistics.add_loss({"loss": 2.0}, 1)
        statistics.add_gradients([weight])
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, weight.detach()))
        seen.append(statistics.end_step(step, scaler._scale))
    assert [s.skipped for s in seen[1:]] == [not m for m in moved[:-1]]
    assert moved.count(False) == 4


# --- tokens -----------------------------------------------------------------------------------------------


def test_a_lone_rank_knows_its_tokens_when_the_step_ends():
    clock = TokenClock()
    statistics = StepStatistics(clock=clock)
    for step in range(1, 4):
        for tokens in (3, 4):
            statistics.add_tokens(tokens)
        statistics.end_step(step, None)
        assert clock.tokens == 7 * step
    assert read(statistics).tokens == 7
    statistics.forget()
    assert clock.tokens == 21


def test_a_batch_that_cannot_be_counted_stops_the_clock():
    clock = TokenClock()
    statistics = StepStatistics(clock=clock)
    for tokens in (3, math.nan):
        statistics.add_tokens(tokens)
        statistics.end_step(1, None)
    assert (clock.tokens, clock.countable) == (3, False)
    assert read(statistics).tokens == 0


# --- restore and resume -----------------------------------------------------------------------------------


def test_after_a_restore_nothing_of_the_old_weights_is_left():
    statistics = StepStatistics()
    statistics.add_loss({"loss": tensor(math.nan)}, 1)
    statistics.end_step(1, None)
    statistics.add_loss({"loss": tensor(math.nan)}, 2)
    statistics.add_gradients(with_gradient(tensor([math.nan])))
    statistics.forget()
    assert statistics.end_step(2, None) is None
    assert read(statistics, 3) == Statistics(2, None, None, False)
    StepStatistics().forget()  # with nothing noted


def test_a_resume_at_any_micro_batch_goes_on_exactly():
    generator = torch.Generator().manual_seed(0)
    unbroken, resumed, scale = StepStatistics(), StepStatistics(), tensor(2.0**16)
    for batch in range(1, 100):
        loss, gradient = torch.randn((), generator=generator), torch.randn(3, generator=generator)
        loss = loss * (math.nan if batch % 11 == 0 else 1)
        for statistics in (unbroken, resumed):
            statistics.add_loss({"loss": loss} if batch % 7 else None, 3)
            if batch % 3 == 0:
                statistics.add_gradients(with_gradient(gradient))
        if batch % 3 == 0:
            scale = scale * (0.5 if batch % 4 == 0 else 1)
            step = batch // 3
            assert repr(resumed.end_step(step, scale)) == repr(unbroken.end_step(step, scale))
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = StepStatistics()
        resumed.load_state_dict(state)
        assert repr(resumed.state_dict()) == repr(unbroken.state_dict())


def test_a_state_is_a_copy():
    statistics = StepStatistics()
    statistics.add_loss({"loss": tensor(1.0)}, 1)
    statistics.end_step(1, tensor(4.0))
    statistics.add_loss({"loss": tensor(2.0)}, 1)
    state = statistics.state_dict()
    kept, other = json.dumps(state), StepStatistics()
    other.load_state_dict(state)
    for one in (statistics, other):
        one.add_loss({"loss": tensor(3.0)}, 1)
        one.end_step(2, tensor(4.0))
    assert json.dumps(state) == kept
