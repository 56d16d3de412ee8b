"""What the tests of stopped, killed and resumed runs share."""

import signal

import pytest
from lightning.pytorch import Callback
from run_outcomes import window
from safetensors.torch import load_file
from tiny_run import SaveAt, StopError, Tiny, fit

STORAGES = ["disk", "cpu", "device"]
CODEC = {"snapshot_codec": "delta-fp16"}
KEPT = [*({"storage": storage} for storage in STORAGES), {"storage": "disk", **CODEC}]
"""Ways to keep a window."""


def kept_id(kept):
    return " ".join(kept.values())


STOPPED = 13
"""The batch after which most runs here stop: in the middle of the second epoch, snapshots 6 8 10 12 taken."""


def stopped(folder, batch=STOPPED, stop=None, fit=fit, **options):
    """A run that saves a checkpoint after a batch and ends with an exception; returns the checkpoint."""
    checkpoint = folder / f"after-{batch}.ckpt"
    after_validation = options.pop("after_validation", False)
    save = SaveAt(checkpoint, batch, after_validation=after_validation, stop=stop or batch)
    with pytest.raises(StopError):
        fit(folder, callbacks=[*options.pop("callbacks", []), save], **options)
    return checkpoint


def assert_same(found, expected, but=()):
    """Two outcomes are equal, bit for bit. Retained files that are in no window may differ."""
    for what in ("weights", "latest", "emissions", "metrics"):
        if what not in but:
            assert found[what] == expected[what], what
    assert found["window"]["snapshots"] == expected["window"]["snapshots"]
    assert found["window"]["layout"] == expected["window"]["layout"]
    for record in found["window"]["snapshots"]:
        assert found["window"]["files"][record["file"]] == record["checksum"]


def steps(merges):
    """The steps of the snapshots in a folder's window."""
    return [record["step"] for record in window(merges)["snapshots"]]


def live_files(merges):
    """Every file of the window's folder by its snapshot's step."""
    return {int(p.name[5:13]): p for p in (merges / "window").glob("step=*.safetensors")}


def assert_survived(result, expected):
    *killed, last = result["ends"]
    assert last == 0, f"the resumed run ended with {last}: {result['outcome']}"
    assert all(end in (-signal.SIGKILL, 0) for end in killed)
    assert not result["damage"]
    assert not result["outcome"]["left over"]
    assert_same(result["outcome"], expected)


def decoded_files(merges):
    """The weights of a window's snapshots by their step, added up from its files."""
    found, before = {}, {}
    for record in window(merges)["snapshots"]:
        tensors = load_file(merges / "window" / record["file"])
        trained = dict(Tiny().named_parameters())
        if record["difference_to"] is not None:
            assert record["difference_to"] == max(found)
            unit = 2.0**-10  # what a 1 stands for in fp16 differences
            tensors = {n: before[n] + unit * t.float() if n in trained else t for n, t in tensors.items()}
        found[record["step"]] = before = tensors
    return found


class StopAtStart(Callback):
    """Ends a run before its first batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        raise StopError
