"""Complex parameters and buffers are merged as `merge_state_dicts` does: under the callback and in files."""

import json

import pytest
import torch
from checkpoint_files import save_distributed
from distributed_runs import UnevenModule, fit, run_jobs
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from spiking_runs import FIRES, USED, Line, spiking
from torch.distributed.fsdp import fully_shard
from training_runs import Classifier, Probe, assert_same_bits, emissions, loader, seed, train, weights_of

from merge_callback import CheckpointMergeCallback, load_merge, merge_state_dicts
from merge_callback.cli.main import main


class Fourier(Classifier):
    """A layer of a Fourier neural operator: complex weights, a complex scalar, and a buffer that changes."""

    def __init__(self, dtype=torch.complex64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.spectrum = torch.nn.Parameter(torch.randn(5, dtype=dtype, generator=generator))
        self.register_buffer("phases", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("turn", torch.tensor(1j))

    def forward(self, x):
        if self.training:
            self.phases = self.phases * torch.polar(torch.tensor(1.0), torch.tensor(0.1))
        return self.net(torch.fft.irfft(torch.fft.rfft(x) * self.spectrum, n=8))


class Scaled(Fourier):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.complex64))

    def forward(self, x):
        return super().forward(x) * self.scale.abs()


def merging(folder, **options) -> CheckpointMergeCallback:
    return CheckpointMergeCallback(
        **{"window": 3, "every_n_steps": 2, "dirpath": folder / "merges", **options}
    )


def fourier_run(folder, **options) -> Probe:
    seed()
    probe = Probe()
    train(Scaled(), merging(folder, **options), probe, data=loader(), val=loader(16), val_check_interval=4)
    return probe


def assert_close(found, expected, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=name)


METHODS = {
    "files": {},
    "memory": {"storage": "cpu"},
    "differences": {"snapshot_codec": "delta-fp16"},
    "ties": {"method": "ties"},
    "slerp": {"method": "slerp", "window": 2},
    "ema": {"method": "ema"},
    "excluded": {"exclude": ["spectrum"]},
}


@pytest.mark.parametrize("kind", METHODS)
def test_the_callback_merges_complex_tensors_as_merge_state_dicts_does(kind, tmp_path):
    options = METHODS[kind]
    probe = fourier_run(tmp_path, **options)
    steps = [8, 10, 12][-options.get("window", 3) :]
    snapshots = [probe.weights[step] for step in steps]
    chosen = {"method": options.get("method", "sma"), "exclude": [*options.get("exclude", []), "turn"]}
    expected = merge_state_dicts(snapshots, steps=steps, **chosen)
    found = load_merge(tmp_path / "merges" / "latest")
    # A difference in fp16 is off by 2⁻¹² of a move, and nothing moves by as much as 1.
    assert_close(found, expected, 2.0**-12 if kind == "differences" else 1e-6)
    assert found["spectrum"].dtype == torch.complex64
    Scaled().load_state_dict(found)


def test_a_run_with_complex_tensors_is_bitwise_the_one_without_the_callback(tmp_path):
    seed()
    module = Scaled()
    train(module, merging(tmp_path), data=loader(), val=loader(16), val_check_interval=4)
    seed()
    plain = Scaled()
    train(plain, data=loader(), val=loader(16), val_check_interval=4)
    assert_same_bits(weights_of(module), weights_of(plain))


def test_the_merged_validation_of_complex_weights_is_of_the_published_ones(tmp_path):
    seed()
    module = Fourier()
    trainer = train(
        module,
        merging(tmp_path),
        data=loader(),
        val=loader(16),
        check_val_every_n_epoch=None,
        val_check_interval=12,
    )
    merged = Fourier().eval()
    merged.load_state_dict(load_merge(tmp_path / "merges" / "latest"))
    features, labels = next(iter(loader(16, batch_size=16)))
    expected = torch.nn.functional.cross_entropy(merged(features), labels)
    torch.testing.assert_close(
        trainer.callback_metrics["merged/val_loss"], expected.detach(), rtol=1e-5, atol=0
    )


def test_a_resumed_run_takes_its_complex_snapshots_over(tmp_path):
    module = Fourier()
    train(module, merging(tmp_path), data=loader(), max_steps=8).save_checkpoint(tmp_path / "last.ckpt")
    train(Fourier(), merging(tmp_path), data=loader(), max_steps=10, ckpt_path=tmp_path / "last.ckpt")
    newest = emissions(tmp_path / "merges")[-1]
    assert [s["step"] for s in json.loads((newest / "merge.json").read_text())["snapshots"]] == [6, 8, 10]
    Fourier().load_state_dict(load_merge(newest))


def test_a_merge_of_the_snapshots_files_has_the_complex_tensors_of_the_emission(tmp_path):
    fourier_run(tmp_path)
    window = sorted((tmp_path / "merges" / "window").glob("step=*.safetensors"))
    assert main(["merge", *map(str, window), "--output", str(tmp_path / "m"), "--quiet"]) == 0
    assert_close(load_merge(tmp_path / "m"), load_merge(tmp_path / "merges" / "latest"))


class Turned(Line):
    """Its features go through a complex filter."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = torch.nn.Parameter(torch.ones(5, dtype=torch.complex64))

    def loss(self, batch):
        filtered = torch.fft.irfft(torch.fft.rfft(batch[0]) * self.spectrum, n=8)
        return torch.nn.functional.mse_loss(self.net(filtered), batch[1])


@pytest.mark.filterwarnings("ignore:merge:")
def test_complex_weights_are_restored_after_a_spike(tmp_path):
    run = spiking(tmp_path, module=Turned, steps=FIRES)
    assert len(run.restores) == 1
    assert_close(run.watch.weights[FIRES], merge_state_dicts([run.watch.weights[step] for step in USED]))


def test_a_trained_tensor_that_safetensors_has_no_dtype_for_is_refused_at_the_start(tmp_path):
    with pytest.raises(
        ValueError, match=r"'spectrum' has dtype torch.complex128 .*keep it as torch.complex64"
    ):
        train(Fourier(torch.complex128), merging(tmp_path, exclude=["spectrum"]), data=loader())


# Files


def complex_model(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    weights = torch.randn(3, 4, dtype=torch.complex64, generator=generator)
    return {"w": weights, "freqs": torch.polar(torch.ones(4), torch.arange(4.0)), "b": weights.abs()}


WRITERS = {
    "safetensors": lambda path, state: save_file(state, path.with_suffix(".safetensors")),
    "torch": lambda path, state: torch.save(state, path.with_suffix(".pt")),
    "lightning": lambda path, state: torch.save(
        {"state_dict": state, "global_step": 1, "pytorch-lightning_version": "2.6.0"},
        path.with_suffix(".ckpt"),
    ),
    "dcp": save_distributed,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("arguments", [[], ["--exclude", "freqs"], ["--method", "ties"]], ids=" ".join)
def test_complex_tensors_in_files_are_merged_as_merge_state_dicts_does(kind, arguments, tmp_path):
    models = [complex_model(i) for i in (1, 2)]
    for i, state in enumerate(models):
        WRITERS[kind](tmp_path / f"step-{i}", state)
    files = sorted(map(str, tmp_path.glob("step-*")))
    assert main(["merge", *files, *arguments, "--output", str(tmp_path / "m"), "--quiet"]) == 0
    options = {"method": "ties"} if "--method" in arguments else {}
    assert_close(load_file(tmp_path / "m" / "model.safetensors"), merge_state_dicts(models, **options))


def test_the_distance_of_complex_tensors_is_that_of_their_parts(tmp_path, capsys):
    for i in (1, 2):
        save_file({"w": torch.full((4,), i * (3 + 4j))}, tmp_path / f"step-{i}.safetensors")
    assert main(["diversity", *map(str, sorted(tmp_path.glob("step-*")))]) == 0
    assert "3.53" in capsys.readouterr().out  # √((3² + 4²) / 2)


# Several ranks


class Turn(torch.nn.Module):
    """FSDP 2 wants the dtypes of a module's own parameters to be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))
        self.register_buffer("phases", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x):
        if self.training:
            self.phases.mul_(torch.polar(torch.tensor(1.0), torch.tensor(0.1)))
        return torch.fft.irfft(torch.fft.rfft(x) * self.spectrum.sum(0), n=6)


class Turning(UnevenModule):
    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(*self.features, Turn())

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for part in (self.features[2], self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def publish(strategy, folder, **options) -> None:
    fit(strategy, Turning(), merging(folder, **options))


RUNS = {"ddp": {}, "fsdp2": {}, "ddp as dcp": {"format": "dcp"}}


@pytest.mark.slow
def test_ranks_publish_the_complex_tensors_that_one_process_does(tmp_path):
    jobs = {
        name: (publish, {"strategy": name.split()[0], "folder": tmp_path / name, **options})
        for name, options in RUNS.items()
    }
    run_jobs(2, jobs, timeout=300)
    publish("alone", tmp_path / "alone")
    expected = load_merge(tmp_path / "alone" / "merges" / "latest")
    assert expected["features.2.spectrum"].is_complex()
    for name in RUNS:
        assert_close(load_merge(tmp_path / name / "merges" / "latest"), expected)
