"""Several ranks keep one window together: it is the window of one process, shared out."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from distributed_runs import run_jobs
from sharded_runs import (
    OFF,
    left_over,
    listed,
    merged_fit,
    published,
    snapshots,
    window_folder,
    without_diversity,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from training_runs import assert_same_bits, seed

from merge_callback import load_merge
from merge_callback.sharding import Piece, Ranks, Sharding
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.layout import DTYPE_NAMES

pytestmark = pytest.mark.timeout(600)  # the processes of a whole file start under its first test

SAME_BITS = [(2, "ddp"), (2, "fsdp2"), (2, "fsdp1")]
ALL = [*SAME_BITS, (4, "fsdp2_tp")]

CODEC = {"snapshot_codec": "delta-fp16"}
CODED = ["ddp", "fsdp2"]


def run(strategy, folder, **options):
    return merged_fit(strategy, folder, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder):
    """The outcomes of all ranks, by number of ranks, strategy and whether the callback was there."""

    def jobs(ranks, strategies):
        for strategy in strategies:
            place = str(folder / f"{ranks}-{strategy}")
            yield (ranks, strategy, True), (run, {"strategy": strategy, "folder": place})
            yield (ranks, strategy, False), (run, {"strategy": strategy, "folder": place, "callback": False})

    two = dict(jobs(2, ["ddp", "fsdp2", "fsdp1"]))
    two["shares"] = (shares_of_a_large_model, {})
    two["dtypes"] = (every_dtype_is_gathered, {})
    two["spread"] = (every_kind_of_tensor_is_spread, {})
    two["memory"] = (
        run,
        {"strategy": "ddp", "folder": str(folder / "memory"), "storage": "cpu", "spike": OFF},
    )
    for strategy in CODED:
        place = str(folder / f"differences-{strategy}")
        two["differences", strategy] = (run, {"strategy": strategy, "folder": place, **CODEC})
    four = dict(jobs(4, ["fsdp2_tp"]))
    four["hybrid"] = (hybrid_shards, {})
    return run_jobs(2, two, timeout=400) | run_jobs(4, four, timeout=400)


@pytest.fixture(scope="module")
def alone(folder):
    return run("alone", folder / "alone")


# --- the same as one process --------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "strategy"), SAME_BITS)
def test_several_ranks_publish_the_bytes_of_one_process(runs, alone, folder, ranks, strategy):
    found, there = without_diversity(published(folder / f"{ranks}-{strategy}"))
    expected, here = without_diversity(published(folder / "alone"))
    assert len(expected) == 5  # snapshots at 2 … 12, and one has nothing to be merged with
    assert found == expected  # the files' checksums, and what is told of them
    for name, diversity in here.items():
        # The fp32 sums of squares are cut at other places.
        assert (diversity is None) == (there[name] is None)
        if diversity is not None:
            assert there[name] == {k: pytest.approx(v, rel=1e-7) for k, v in diversity.items()} | {
                "steps": diversity["steps"],
                "tokens": diversity["tokens"],
                "change_percent": pytest.approx(diversity["change_percent"], rel=1e-6, abs=1e-4),
            }


@pytest.mark.parametrize(("ranks", "strategy"), ALL)
def test_a_published_merge_is_the_mean_of_the_live_weights(runs, folder, ranks, strategy):
    weights = runs[ranks, strategy, True][0].run.weights
    place = folder / f"{ranks}-{strategy}" / "merges"
    (last,) = place.glob("step=00000012*")
    record = json.loads((last / "merge.json").read_text())
    assert [s["step"] for s in record["snapshots"]] == [6, 8, 10, 12]
    found = load_merge(last)
    assert found.keys() == weights[12].keys()
    # Of steps 6 and 10 the weights were not noted; those that do not change tell all the same.
    assert_same_bits(found["frozen.weight"], weights[12]["frozen.weight"])
    assert found["embedding.weight"].shape == (13, 6)


@pytest.mark.parametrize(("ranks", "strategy"), SAME_BITS)
def test_several_ranks_log_the_numbers_of_one_process(runs, alone, ranks, strategy):
    assert any("merged/" in name for name in alone.metrics)
    for rank in runs[ranks, strategy, True]:
        # Only the diversity is rounded differently; its change is a difference of two close numbers.
        assert rank.metrics == {
            k: pytest.approx(v, rel=1e-6, abs=1e-4 if "change" in k else 0) for k, v in alone.metrics.items()
        }
        exact = [k for k in alone.metrics if "diversity" not in k]
        assert {k: rank.metrics[k] for k in exact} == {k: alone.metrics[k] for k in exact}


@pytest.mark.parametrize(("ranks", "strategy"), ALL)
def test_the_window_has_the_snapshots_of_one_process(runs, alone, ranks, strategy):
    def facts(outcome):
        files = ("file", "checksum", "frozen", "frozen_checksum")
        return [{k: v for k, v in r.items() if k not in files} for r in outcome.records]

    for rank in runs[ranks, strategy, True]:
        assert rank.windows == alone.windows
        assert facts(rank) == facts(alone)
        assert rank.steps == [6, 8, 10, 12]


@pytest.mark.parametrize(("ranks", "strategy"), ALL)
def test_training_with_the_callback_is_bitwise_training_without_it(runs, ranks, strategy):
    for rank, plain in zip(runs[ranks, strategy, True], runs[ranks, strategy, False], strict=True):
        assert rank.run.losses == plain.run.losses
        assert rank.run.validations == plain.run.validations
        assert_same_bits(rank.run.weights, plain.run.weights)


@pytest.mark.parametrize(("ranks", "strategy"), ALL)
def test_merged_validation_leaves_all_ranks_as_they_were(runs, ranks, strategy):
    for rank in runs[ranks, strategy, True]:
        assert rank.differ == []
        assert rank.replaced == []


@pytest.mark.parametrize(("ranks", "strategy"), ALL)
def test_all_ranks_have_one_state_of_primitives(runs, ranks, strategy):
    first, *others = [json.loads(json.dumps(rank.state)) for rank in runs[ranks, strategy, True]]
    assert first == runs[ranks, strategy, True][0].state
    for other in others:
        for name in first.keys() - {"published"}:  # the first rank alone publishes
            assert other[name] == first[name], name


@pytest.mark.parametrize(("ranks", "strategy"), ALL)
def test_nothing_but_the_window_and_the_emissions_is_left(runs, folder, ranks, strategy):
    place = folder / f"{ranks}-{strategy}"
    assert listed(place) == [6, 8, 10, 12]
    assert left_over(place) == []
    for snapshot in window_folder(place).glob("step=*"):
        assert len([p for p in snapshot.iterdir() if p.suffix == ".safetensors"]) == ranks
        assert (snapshot / "shards.json").is_file()


def test_no_warning_without_a_reason(runs):
    assert not [line for key, ranks in runs.items() if key[-1] is True for r in ranks for line in r.told]


def test_a_window_in_memory_is_the_window_on_disk(runs, folder):
    assert published(folder / "memory") == published(folder / "2-ddp")
    assert [r.windows for r in runs["memory"]] == [r.windows for r in runs[2, "ddp", True]]


# --- snapshots kept as differences --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded_alone(folder):
    return run("alone", folder / "differences-alone", **CODEC)


@pytest.mark.parametrize("strategy", CODED)
def test_differences_that_are_shared_out_are_those_of_one_process(runs, coded_alone, folder, strategy):
    place, alone = folder / f"differences-{strategy}", folder / "differences-alone"
    names = {n: t for n, t in coded_alone.run.final.items() if n != "head.weight"}  # tied to another
    assert_same_bits(snapshots(place, names), snapshots(alone, names))
    found, _ = without_diversity(published(place))
    expected, _ = without_diversity(published(alone))
    assert len(expected) == 5
    assert found == expected
    for rank in runs["differences", strategy]:
        assert [r["difference_to"] for r in rank.records] == [None, 6, 8, 10]
        assert rank.windows == coded_alone.windows
        # Only the diversity is rounded differently; its change is a difference of two close numbers.
        assert rank.metrics == {
            k: pytest.approx(v, rel=1e-6, abs=1e-4 if "change" in k else 0)
            for k, v in coded_alone.metrics.items()
        }


@pytest.mark.parametrize("strategy", CODED)
def test_differences_do_not_touch_the_training_of_any_rank(runs, folder, strategy):
    for rank, plain in zip(runs["differences", strategy], runs[2, strategy, False], strict=True):
        assert_same_bits(rank.run.weights, plain.run.weights)
        assert rank.differ == rank.replaced == rank.told == []
    assert left_over(folder / f"differences-{strategy}") == []


# --- who keeps what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "strategy"), ALL)
def test_no_byte_is_kept_twice(runs, ranks, strategy):
    kept = [rank.bytes[0] for rank in runs[ranks, strategy, True]]
    assert sum(kept) == runs[ranks, strategy, True][0].bytes[1]


def large_model():
    seed()
    return nn.Sequential(nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 130), nn.Linear(130, 11))


def kept_bytes(model, root):
    tensors = ModelTensors.of(model, root)
    sharding = Sharding(tensors.tensors, tensors.pieces, tensors.buffers, Ranks.of_run())
    return sum(part.nbytes for part in sharding.own(tensors.tensors).values())


def shares_of_a_large_model():
    whole = sum(p.nbytes for p in large_model().parameters())
    ddp = large_model()
    fsdp2 = fully_shard(large_model())
    fsdp1 = large_model()
    root = FullyShardedDataParallel(fsdp1, device_id=torch.device("cpu"), use_orig_params=True)
    kept = {"ddp": kept_bytes(ddp, ddp), "fsdp2": kept_bytes(fsdp2, fsdp2), "fsdp1": kept_bytes(fsdp1, root)}
    return {name: count / whole for name, count in kept.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp1"])
def test_each_rank_keeps_about_its_share_of_a_large_model(runs, strategy):
    shares = [rank[strategy] for rank in runs["shares"]]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    assert all(abs(share - 1 / 2) < 0.05 / 2 for share in shares), shares


def hybrid_shards():
    """A (replicate, shard) mesh: what two ranks hold alike is shared out between them."""
    model = large_model()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    tensors = ModelTensors.of(model)
    sharding = Sharding(tensors.tensors, tensors.pieces, tensors.buffers, Ranks.of_run())
    own = {name: part.clone() for name, part in sharding.own(tensors.tensors).items()}
    gathered = dict(zip(whole, sharding.gather(own, whole), strict=True))
    for part in sharding.own(tensors.tensors).values():
        part.add_(1 + dist.get_rank())
    expected = {name: part.clone() for name, part in sharding.own(tensors.tensors).items()}
    sharding.spread(tensors.tensors)
    kept = all(torch.equal(part, expected[name]) for name, part in sharding.own(tensors.tensors).items())
    replicas = [None] * 4
    dist.all_gather_object(replicas, {n: t.to_local().clone() for n, t in model.state_dict().items()})
    sharding.close()
    return {
        "share": sum(p.nbytes for p in own.values()) / sum(p.nbytes for p in whole.values()),
        "gathered": gathered if dist.get_rank() == 0 else None,
        "whole": whole,
        "kept": kept,
        "alike": [
            all(torch.equal(replicas[a][name], replicas[b][name]) for name in whole)
            for a, b in ((0, 2), (1, 3))
        ],
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
    }


def test_replicas_of_a_hybrid_sharding_share_out_what_they_hold_alike(runs):
    first = runs["hybrid"][0]
    assert_same_bits(first["gathered"], first["whole"])
    for rank in runs["hybrid"]:
        assert rank["sharded"]
        assert rank["kept"]
        assert rank["alike"] == [True, True]
        assert abs(rank["share"] - 1 / 4) < 0.05 / 4
    assert sum(rank["share"] for rank in runs["hybrid"]) == pytest.approx(1, abs=1e-12)


# --- every kind of tensor -----------------------------------------------------------------------------------


def of_dtype(dtype, shape=(5, 3)):
    return (torch.arange(math.prod(shape)) % 2).view(shape).to(dtype)


def every_dtype_is_gathered():
    """Gathers tensors whose rows lie on two ranks; returns what came together, or the error, by dtype."""
    found, ranks = {}, Ranks.of_run()
    for dtype, name in DTYPE_NAMES.items():
        tensor, rank = of_dtype(dtype), dist.get_rank()
        part = tensor[:3] if rank == 0 else tensor[3:]
        piece = Piece.box((5, 3), (3 * rank, 0), tuple(part.shape))
        sharding = Sharding({"t": part}, {"t": piece}, (), ranks)
        try:
            (found[name],) = sharding.gather({"t": part.clone()}, ["t"])
        except Exception as error:
            found[name] = repr(error)
    return found


@pytest.mark.parametrize(("dtype", "name"), DTYPE_NAMES.items())
def test_every_dtype_that_a_snapshot_can_hold_is_gathered(runs, dtype, name):
    found = runs["dtypes"][0][name]
    assert isinstance(found, torch.Tensor), found
    assert torch.equal(found.float(), of_dtype(dtype).float())


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        for dtype, name in DTYPE_NAMES.items():
            self.register_buffer(name, of_dtype(dtype))
        self.register_buffer("expanded", torch.zeros(1, 3).expand(4, 3))
        self.register_buffer("column", torch.zeros(4, 3).T)
        self.register_buffer("scalar", torch.zeros(()))
        self.register_buffer("empty", torch.zeros(0, 3))
        with torch.inference_mode():  # as of a module that made it in a validation before the fit
            self.register_buffer("inference", torch.zeros(3))
        self.transposed = nn.Parameter(torch.zeros(6, 5).T)


def every_kind_of_tensor_is_spread():
    model = Kinds()
    tensors = ModelTensors.of(model)
    sharding = Sharding(tensors.tensors, tensors.pieces, tensors.buffers, Ranks.of_run())
    own = sharding.own(tensors.tensors)
    for name in ("column", "scalar", "transposed", *DTYPE_NAMES.values()):
        if own[name].numel():
            own[name].copy_(torch.ones(own[name].shape).to(own[name].dtype))
    try:
        sharding.spread(tensors.tensors)
    except Exception as error:
        return repr(error)
    return {name: tensor.float().min().item() for name, tensor in tensors.tensors.items() if tensor.numel()}


def test_every_kind_of_tensor_is_handed_to_the_ranks_that_hold_it(runs):
    for found in runs["spread"]:
        assert isinstance(found, dict), found
        assert {name for name, least in found.items() if least != 1} == {"expanded", "inference"}
