"""Real runs whose snapshots are kept as differences: what they keep, merge and survive."""

import os
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from codec_windows import CODEC, RELATIVE, assert_rounded_once, decoded
from lightning.pytorch import Callback
from run_outcomes import checksum, damage, emissions, metrics
from run_outcomes import window as manifest_of
from safetensors import safe_open
from slow_cases import mostly_slow
from tiny_run import EVERY, WINDOW, At, Keeper, SaveAt, StopError, Tiny, fit, wait_for_snapshots
from training_runs import assert_same_bits
from window_runs import (
    LAST,
    Full,
    assert_nothing_is_half_there,
    quiet,
    steps,
    unlimited,  # noqa: F401 (a fixture)
)

from merge_callback import load_merge


class Calm(Tiny):
    """A wider model that moves slowly, as models of any size do: its weights by about 0.002 a snapshot."""

    def __init__(self):
        super().__init__(width=64)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


TRAINED = {name for name, _ in Calm().named_parameters()}


PLACES = {
    "disk": {"storage": "disk"},
    "cpu": {"storage": "cpu"},
    "device": {"storage": "device"},
    "cpu, lost with the process": {"storage": "cpu", "durable": False},
    "device, lost with the process": {"storage": "device", "durable": False},
}


@dataclass
class Fitted:
    """What a fit left behind: the last merge, the diversities, the window's bytes, the live weights."""

    merge: dict
    diversities: list
    nbytes: int
    weights: dict

    @property
    def update(self):
        """RMS distance of consecutive snapshots: of what trains, over the last window."""
        taken = [self.weights[step] for step in range(8, 27, EVERY)]
        return rms([distance(a, b) for a, b in pairwise(taken)])

    def merge_error(self, exact):
        return distance(self.merge, exact.merge) / exact.update

    def diversity_error(self, exact):
        pairs = zip(self.diversities, exact.diversities, strict=True)
        return max(abs(found / expected - 1) for found, expected in pairs)


def distance(a, b):
    """RMS distance of what trains."""
    return rms([(a[name].double() - b[name].double()).flatten() for name in sorted(TRAINED)])


def rms(numbers):
    return float(
        torch.cat([torch.as_tensor(n, dtype=torch.float64).view(-1) for n in numbers]).square().mean().sqrt()
    )


def fitted(folder, **options):
    keeper = Keeper()
    options = {"window": 10, "method": "sma", "emit_every": 1, "evaluate": False, **options}
    fit(folder, module=Calm, callbacks=[keeper], **options)
    merges, logged = folder / "merges", metrics(folder)
    files = (merges / "window").glob("step=*.safetensors")
    return Fitted(
        load_merge(merges / "latest"),
        [value for key, value in logged.items() if "diversity_rms" in key],
        sum(path.stat().st_size for path in files),
        keeper.weights,
    )


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The same training with a window in fp32."""
    return fitted(tmp_path_factory.mktemp("exact"))


@pytest.mark.parametrize(
    ("codec", "place"),
    mostly_slow(
        [*((CODEC, place) for place in PLACES), ("delta-bf16", "disk"), ("delta-bf16", "cpu")],
        daily=[0, 2, len(PLACES) + 1],
    ),
)
def test_merges_and_diversity_of_a_real_run_are_those_of_fp32_snapshots(tmp_path, exact, codec, place):
    found = fitted(tmp_path, snapshot_codec=codec, **PLACES[place])

    assert_same_bits(found.weights, exact.weights)
    # A rounding is off by 0.4 of the largest error (RMS), the mean of ten by 0.13; twice that, for luck. And
    # the two merges are rounded to fp32, which is relative to the weights.
    fp32 = 2 * 2**-24 * rms([exact.merge[name] for name in TRAINED]) / exact.update
    assert 0 < found.merge_error(exact) < min(RELATIVE[codec] / 4 + fp32, 1e-3)
    assert found.diversity_error(exact) < 1e-2
    for name in exact.merge.keys() - TRAINED:
        assert torch.equal(found.merge[name], exact.merge[name]), name


def test_raw_bf16_snapshots_are_too_coarse_for_that(tmp_path, exact):
    found = fitted(tmp_path, snapshot_dtype="bf16")

    assert_same_bits(found.weights, exact.weights)
    assert found.merge_error(exact) > 1e-2
    assert found.diversity_error(exact) > 1e-2


def data_and_header(path):
    """Bytes of the data and of the header of a safetensors file."""
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - header, header


def test_a_full_window_takes_a_little_more_than_half_the_bytes(tmp_path, exact):
    found = fitted(tmp_path, snapshot_codec=CODEC)

    model = Calm()
    trained = sum(p.numel() * p.element_size() for p in model.parameters())
    native = sum(b.numel() * b.element_size() for b in model.buffers())
    sizes = [data_and_header(path) for path in sorted((tmp_path / "merges/window").glob("step=*"))]
    assert len(sizes) == 10
    assert sum(data for data, _ in sizes) == trained + 9 * trained / 2 + 10 * native
    # 55 % of what trains; the rest are the headers, which are long beside so small a model, and the buffers.
    headers = sum(header for _, header in sizes)
    assert found.nbytes == headers + 10 * (0.55 * trained + native)
    assert headers < 0.5 * found.nbytes
    assert found.nbytes < exact.nbytes


def test_excluded_tensors_and_buffers_are_bitwise_those_of_a_run_without_the_codec(tmp_path):
    exclude = ["head.*"]
    keeper = Keeper()
    fit(tmp_path / "with", callbacks=[keeper], exclude=exclude, snapshot_codec=CODEC)
    fit(tmp_path / "without", exclude=exclude)

    native = {"head.weight", "head.bias", *dict(Tiny().named_buffers())}
    for path in (tmp_path / "with/merges/window").glob("step=*.safetensors"):
        step = int(path.name[5:13])
        with safe_open(path, "pt") as file:
            for name in native:
                assert torch.equal(file.get_tensor(name), keeper.weights[step][name]), name
            assert file.get_tensor("embed.weight").dtype == (torch.float32 if step == 20 else torch.float16)
    for path in emissions(tmp_path / "without/merges"):
        found, expected = load_merge(tmp_path / "with/merges" / path.name), load_merge(path)
        assert_same_bits({n: found[n] for n in native}, {n: expected[n] for n in native})


def freeze(name, frozen=True):
    return lambda module: module.get_parameter(name).requires_grad_(not frozen)


def test_a_tensor_frozen_while_the_run_goes_on_is_soon_merged_to_its_own_bits(tmp_path):
    _, module, _ = fit(tmp_path, callbacks=[At(step11=freeze("embed.weight"))], snapshot_codec=CODEC)

    merged = load_merge(tmp_path / "merges/latest")
    assert torch.equal(merged["embed.weight"], module.embed.weight)
    assert not torch.equal(merged["head.weight"], module.head.weight)


class HeadFirst(Tiny):
    """Begins with a frozen embedding, which Adam knows of all the same."""

    def __init__(self):
        super().__init__()
        self.embed.weight.requires_grad_(False)


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_run_that_unfroze_a_tensor_resumes_bit_for_bit(tmp_path, storage):
    def unfreeze():
        return At(step9=freeze("embed.weight", frozen=False), step14=freeze("embed.weight", frozen=False))

    def resumed():
        module = HeadFirst()  # as a fine-tuning callback leaves it before the fit: past that moment
        module.embed.weight.requires_grad_(True)
        return module

    options = {"snapshot_codec": CODEC, "storage": storage}
    fit(tmp_path / "unbroken", module=HeadFirst, callbacks=[unfreeze()], **options)
    save = SaveAt(tmp_path / "run.ckpt", 13, stop=13)
    with pytest.raises(StopError):
        fit(tmp_path / "run", module=HeadFirst, callbacks=[unfreeze(), save], **options)

    fit(tmp_path / "run", tmp_path / "run.ckpt", module=resumed, **options)

    found, expected = (manifest_of(tmp_path / name / "merges") for name in ("run", "unbroken"))
    assert found["snapshots"] == expected["snapshots"]
    assert len(expected["snapshots"]) == WINDOW


def test_what_builds_on_a_file_cut_off_while_the_run_goes_on_goes_with_it(tmp_path):
    keeper, left = Keeper(), {}

    def cut(module):
        (path,) = (tmp_path / "merges/window").glob("step=00000006*")
        os.truncate(path, 100)

    def look(module):
        window = module.trainer.callbacks[0].session.window
        left.update({s.step: s.difference_to for s in window.snapshots})
        found, live = decoded(window), keeper.weights[10]
        for name in dict(module.named_parameters()):
            assert_rounded_once(found[10][name], live[name].flatten(), found[4][name])

    looks = [keeper, At(step9=cut, step10=look)]
    with pytest.warns(UserWarning, match="left out of the window") as told:
        fit(tmp_path, callbacks=looks, snapshot_codec=CODEC)

    lines = [str(w.message) for w in told if "left out of the window" in str(w.message)]
    assert ["step 6" in lines[0], "step 8" in lines[1], len(lines)] == [True, True, 2]
    assert left == {2: None, 4: 2, 10: 4}
    assert steps(tmp_path) == LAST


# --- no room to make a snapshot whole -----------------------------------------------------------------------


def wide():
    """A model whose snapshots take 13.4 kB whole and 9 kB as a difference."""
    return Tiny(width=64)


class Lengths(Callback):
    """How many snapshots the window holds after each step; put it after the merging callback."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        wait_for_snapshots(trainer)
        self.seen[trainer.global_step] = len(trainer.callbacks[0].session.window.snapshots)


ROOM_FOR_A_DIFFERENCE = 11_000


def small_emissions(folder):
    """The checksums of all emissions' files, by name."""
    return {
        p.name: [checksum(f) for f in sorted(p.glob("*.safetensors"))] for p in emissions(folder / "merges")
    }


def test_a_window_that_could_not_let_its_oldest_go_catches_up_and_its_merges_are_right(tmp_path):
    options = {"module": wide, "snapshot_codec": CODEC, "keep_last": None, "max_shard_size": 5000}
    fit(tmp_path / "unbroken", **options)
    full, lengths = Full(ROOM_FOR_A_DIFFERENCE, 12, 18), Lengths()

    with pytest.warns(UserWarning, match="step 14 could not be kept .*step 4 can't go yet"):
        fit(tmp_path, before=[full], callbacks=[lengths], trainer=quiet(), **options)

    assert [lengths.seen[step] for step in (10, 12, 14, 16, 18)] == [4, 5, 5, 5, 4]
    assert steps(tmp_path) == LAST
    assert_nothing_is_half_there(tmp_path)
    found, expected = small_emissions(tmp_path), small_emissions(tmp_path / "unbroken")
    # Of the five snapshots then four were merged.
    assert found["step=00000012-tokens=288-sma"] == expected["step=00000012-tokens=288-sma"]


def test_a_window_in_memory_lets_its_oldest_go_without_a_file_and_writes_files_again_later(tmp_path):
    options = {"module": wide, "snapshot_codec": CODEC, "storage": "cpu", "keep_last": None}
    options |= {"max_shard_size": 5000}
    fit(tmp_path / "unbroken", **options)
    full, lengths = Full(ROOM_FOR_A_DIFFERENCE, 10, 14), Lengths()

    fit(tmp_path, before=[full], callbacks=[lengths], trainer=quiet(), **options)

    assert max(lengths.seen.values()) == 4
    assert steps(tmp_path) == LAST
    assert_nothing_is_half_there(tmp_path)
    assert all(record["file"] for record in manifest_of(tmp_path / "merges")["snapshots"])
    assert small_emissions(tmp_path) == small_emissions(tmp_path / "unbroken")


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_disk_that_stays_full_makes_no_window_longer(tmp_path, storage):
    full, lengths = Full(3000, 10, 99), Lengths()

    with pytest.warns(UserWarning, match="step 26 could not be kept in a file"):
        fit(
            tmp_path,
            before=[full],
            callbacks=[lengths],
            module=wide,
            snapshot_codec=CODEC,
            storage=storage,
            trainer=quiet(),
        )

    assert max(lengths.seen.values()) == 4
    assert not damage(tmp_path / "merges")


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_snapshot_that_found_no_room_is_not_built_on(tmp_path, storage):
    full = Full(3000, 12, 14)

    with pytest.warns(UserWarning, match="step 12 could not be kept in a file"):
        fit(tmp_path, before=[full], window=10, snapshot_codec=CODEC, storage=storage, trainer=quiet())

    records = manifest_of(tmp_path / "merges")["snapshots"]
    builds_on = {r["step"]: r["difference_to"] for r in records}
    if storage == "disk":
        assert builds_on[14] == 10
    else:
        assert builds_on[12] == 10
        assert builds_on[14] is None
    assert_nothing_is_half_there(tmp_path)
