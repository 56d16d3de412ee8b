"""While an expert trains, its merge with its finished siblings is validated, tuned, and may stop it."""

import copy
import logging
import math
import warnings
from itertools import product

import pytest
import torch
from distributed_runs import UnevenModule, fit, run_jobs
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import save_file
from training_runs import Classifier, assert_same_bits, loader, seed, train, weights_of

from merge_callback import CheckpointMergeCallback
from merge_callback.analysis.interference import interference, overlap, sign_conflict, variance
from merge_callback.merging import Dare, Sma, TaskArithmetic, Ties, merge_state_dicts


class Expert(Classifier):
    """Logs an accuracy, too."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())


class Log(Callback):
    """What a validation showed, after each."""

    def __init__(self, weights=weights_of):
        self.metrics, self.weights, self._weights_of = [], [], weights

    def on_validation_end(self, trainer, pl_module):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.weights.append(self._weights_of(pl_module))


def files(folder, count=2, kind=Expert, scale=0.3):
    """A base, and experts that lie ``scale`` off it; their paths and weights."""
    seed(1)
    states = [weights_of(kind())]
    states[0].pop("head.weight", None)  # UnevenModule's is tied, and no file holds it twice
    for _ in range(count):
        floats = {n: t + scale * torch.randn(t.shape) for n, t in states[0].items() if t.is_floating_point()}
        states.append({**states[0], **floats})
    names = ["base", *(f"expert{i}" for i in range(count))]
    for name, state in zip(names, states, strict=True):
        save_file(state, folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in names], states


def run(folder, paths, states, *callbacks, module=None, steps=6, **options):
    """A fit that begins as the base, validated after every second step; what its validations showed."""
    seed(2)
    module = module or Expert(lr=0.05)
    if states is not None:
        module.load_state_dict(states[0])
    callback = CheckpointMergeCallback(
        every_n_steps=100, dirpath=folder / "merges", base=paths[0], experts=paths[1:], **options
    )
    log = Log()
    train(
        module,
        callback,
        *callbacks,
        log,
        data=loader(),
        val=loader(32),
        max_steps=steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        logger=False,
    )
    return module, log


def scored(weights):
    """The metrics of the validation data, of any weights."""
    module = Expert().eval()
    module.load_state_dict(weights)
    data = list(loader(32))
    with torch.no_grad():
        return {
            "val_loss": sum(float(module.loss(batch)) for batch in data) / len(data),
            "val_acc": sum(float((module(x).argmax(-1) == y).float().mean()) for x, y in data) / len(data),
        }


def merged(base, experts, method):
    """The merge of whole experts of a base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return merge_state_dicts(experts, method, base=base)


@pytest.mark.parametrize(
    "method", [Sma(), TaskArithmetic(scale=0.5), Ties(density=0.3, scale=0.8), Dare(density=0.5)]
)
def test_each_validation_shows_what_the_merge_of_the_live_expert_with_the_others_scores(method, tmp_path):
    paths, states = files(tmp_path)
    module, log = run(tmp_path, paths, states, method=method)
    for metrics, live in zip(log.metrics, log.weights, strict=True):
        own = None if isinstance(method, Sma) else states[0]
        for name, value in scored(merged(own, [live, *states[1:]], method)).items():
            assert metrics[f"merged/{name}"] == pytest.approx(value, abs=1e-6)
        assert metrics["merged/val_loss"] != pytest.approx(metrics["val_loss"], abs=1e-3)
    alone = Expert(lr=0.05)
    seed(2)
    Expert()
    alone.load_state_dict(states[0])
    log = Log()
    train(
        alone,
        log,
        data=loader(),
        val=loader(32),
        max_steps=6,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    assert_same_bits(weights_of(module), weights_of(alone))


def test_a_method_by_its_name_is_tuned_on_the_validation_data(tmp_path, caplog):
    paths, states = files(tmp_path)
    with caplog.at_level(logging.INFO):
        _, log = run(tmp_path, paths, states, method="ties", lower_is_better=["val_loss"])
    assert "scale and density of the merge with the other experts: tuned by its val_loss" in caplog.text
    grid = list(product([round(0.5 + 0.1 * i, 1) for i in range(11)], [0.1, 0.2, 0.3]))
    experts = [log.weights[0], *states[1:]]
    losses = {
        (scale, density): scored(merged(states[0], experts, Ties(density, scale)))["val_loss"]
        for scale, density in grid
    }
    first, *others = log.metrics
    assert first["merged/val_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    best = min(losses, key=losses.get)
    assert (first["merge_experts/scale"], first["merge_experts/density"]) == pytest.approx(best)
    assert first["merge_experts/evaluated"] == len(grid) == 33
    for metrics, live in zip(others, log.weights[1:], strict=True):
        scale, density = (round(metrics[f"merge_experts/{name}"], 2) for name in ("scale", "density"))
        again = scored(merged(states[0], [live, *states[1:]], Ties(density, scale)))
        assert metrics["merged/val_loss"] == pytest.approx(again["val_loss"], abs=1e-6)
        assert metrics["merge_experts/evaluated"] <= 9  # what lies next to the best of before


def test_an_expert_stops_where_its_merge_peaks(tmp_path):
    paths, states = files(tmp_path, scale=0.05)
    stop = EarlyStopping("merged/val_loss", patience=2)
    _, log = run(tmp_path, paths, states, stop, module=Expert(lr=2.0), steps=80)
    losses = [metrics["merged/val_loss"] for metrics in log.metrics]
    assert len(losses) < 40
    assert min(losses) == losses[-3]
    assert stop.best_score == pytest.approx(losses[-3])


def test_the_interference_with_each_sibling_is_that_of_the_files(tmp_path):
    paths, states = files(tmp_path)
    _, log = run(tmp_path, paths, states, method=Sma())
    for metrics, live in zip(log.metrics, log.weights, strict=True):
        counts = interference([live, *states[1:]], states[0])
        for i in (1, 2):
            name = f"merge_experts/expert{i - 1}.safetensors"
            assert metrics[f"{name}/sign_conflict"] == pytest.approx(float(sign_conflict(counts)[0, i]))
            assert metrics[f"{name}/overlap"] == pytest.approx(float(overlap(counts)[0, i]))
            assert metrics[f"{name}/magnitude_ratio"] > 1
        assert metrics["merge_experts/variance"] == pytest.approx(variance(counts))


class Normalised(Expert):
    """With running statistics."""

    def __init__(self, lr=0.05):
        super().__init__(lr)
        self.net.insert(1, torch.nn.BatchNorm1d(16))


def test_running_statistics_are_averaged_and_files_of_a_wrapped_model_are_known(tmp_path):
    paths, states = files(tmp_path, kind=Normalised)
    for path, state in zip(paths[1:], states[1:], strict=True):
        state["net.1.running_var"] = states[0]["net.1.running_var"] * 0.1
        save_file({f"module.{name}": tensor for name, tensor in state.items()}, path)
    method, log = TaskArithmetic(scale=0.9, normalize=False), Log()
    run(tmp_path, paths, states, log, module=Normalised(), method=method)
    module = Normalised().eval()
    for metrics, live in zip(log.metrics, log.weights, strict=True):
        experts = [live, *states[1:]]
        weights = merged(states[0], experts, method)
        means = {name: torch.stack([e[name] for e in experts]).mean(0) for name in live if "running" in name}
        module.load_state_dict({**weights, **means})
        with torch.no_grad():
            expected = sum(float(module.loss(batch)) for batch in loader(32)) / 4
        assert metrics["merged/val_loss"] == pytest.approx(expected, rel=1e-5)


class Longer(Expert):
    """Has a head that the base lacks."""

    def __init__(self, lr=0.05):
        super().__init__(lr)
        self.head = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.net(x))


class Wider(Expert):
    """Has a head of another shape under the name of the base's."""

    def __init__(self, lr=0.05):
        super().__init__(lr)
        self.net[2] = torch.nn.Linear(16, 6)


@pytest.mark.parametrize(("kind", "head"), [(Longer, "head"), (Wider, "net.2")])
def test_a_head_that_the_base_lacks_stays_the_experts_own(kind, head, tmp_path, caplog):
    paths, _ = files(tmp_path, count=1)
    module = kind()
    with caplog.at_level(logging.INFO):
        _, log = run(tmp_path, paths, None, module=module, method=TaskArithmetic(normalize=False))
    assert f"{head}.bias, {head}.weight stay this expert's own" in caplog.text
    assert all(math.isfinite(metrics["merged/val_loss"]) for metrics in log.metrics)


def test_what_compiling_has_put_into_the_names_of_an_expert_does_not_matter(tmp_path):
    paths, states = files(tmp_path)
    compiled = {name.replace("net.", "net._orig_mod."): tensor for name, tensor in states[1].items()}
    save_file(compiled, paths[1])
    method = TaskArithmetic(scale=0.5)
    _, log = run(tmp_path, paths, states, method=method, steps=2)
    right = scored(merged(states[0], [log.weights[-1], *states[1:]], method))
    assert log.metrics[-1]["merged/val_loss"] == pytest.approx(right["val_loss"], abs=1e-6)


def test_a_run_that_is_resumed_tunes_on_from_the_best(tmp_path):
    paths, states = files(tmp_path)
    options = {"every_n_steps": 100, "base": paths[0], "experts": paths[1:], "method": "task_arithmetic"}
    module, callback = Expert(lr=0.05), CheckpointMergeCallback(dirpath=tmp_path / "merges", **options)
    module.load_state_dict(states[0])
    fits = {"data": loader(), "val": loader(32), "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = train(module, callback, max_steps=4, **fits)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    log = Log()
    again = CheckpointMergeCallback(dirpath=tmp_path / "merges", **options)
    train(Expert(lr=0.05), again, log, max_steps=6, ckpt_path=tmp_path / "last.ckpt", **fits)
    assert log.metrics[-1]["merge_experts/evaluated"] <= 5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"experts": ["x"], "method": {"stable": "sma"}}, "it is one method, which merges the experts"),
        ({"experts": ["x"], "method": "unknown"}, "unknown merging method 'unknown'"),
        ({"experts": 3}, "experts=3 must be a list of the paths"),
        ({"base": "x"}, r"base='x' has no meaning without experts=\[…\]"),
        ({"base": 3, "experts": ["x"]}, "base=3 must be the path"),
        ({"experts": ["x"], "evaluate": False}, "the merge is evaluated"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options, told):
    with pytest.raises(ValueError, match=told):
        CheckpointMergeCallback(every_n_steps=2, **options)


def test_files_that_do_not_fit_are_refused_at_the_start(tmp_path):
    paths, states = files(tmp_path)
    less = {name: t for name, t in states[1].items() if name != "net.2.bias"}
    save_file(less, paths[1])
    with pytest.raises(ValueError, match=r"expert0.safetensors lacks 'net.2.bias'"):
        run(tmp_path, paths, states)
    save_file({**less, "net.2.bias": torch.zeros(5)}, paths[1])
    with pytest.raises(ValueError, match=r"'net.2.bias' is \(5,\), the base's \(4,\)"):
        run(tmp_path, paths, states)
    save_file({"other": torch.zeros(5)}, paths[1])
    with pytest.raises(
        ValueError, match=r"has no tensor of this model; it has 'other', the model has 'net\.0"
    ):
        run(tmp_path, paths, states)
    with pytest.raises(FileNotFoundError, match="there is no such checkpoint"):
        run(tmp_path, [paths[0], tmp_path / "gone"], states)


def test_a_merge_that_fails_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    paths, states = files(tmp_path)
    monkeypatch.setattr(Sma, "merge", lambda *_: 1 / 0)
    _, log = run(tmp_path, paths, states, method="sma")
    assert "the merge with the other experts failed; training goes on" in caplog.text
    assert all("merged/val_loss" not in metrics for metrics in log.metrics)


class Adapted(Classifier):
    """A linear model with an adapter of peft."""

    def __init__(self, seeded=3, base=None, **options):
        peft = pytest.importorskip("peft")
        super().__init__(0.02)
        if base is not None:
            self.load_state_dict(base)
        seed(seeded)
        config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0", "2"], **options})
        self.net = peft.get_peft_model(self.net, config)
        for name, parameter in self.net.named_parameters():
            if "lora_B" in name:  # else it adds nothing
                torch.nn.init.normal_(parameter, std=0.2)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def plain_weights(module):
    """The weights of a model whose adapter is merged into its base, by peft."""
    whole = copy.deepcopy(module.net).merge_and_unload()
    return {f"net.{name}": tensor.clone() for name, tensor in whole.state_dict().items()}


@pytest.mark.parametrize("given", [False, True], ids=["adapters alone", "a base and a whole expert"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "rank_pattern": {"0": 3}}], ids=["lora", "rslora"]
)
def test_a_live_adapter_is_merged_with_others_as_what_it_adds(given, options, tmp_path):
    seed(1)
    base = weights_of(Classifier())
    module, sibling = Adapted(3, base, **options), Adapted(4, base)
    sibling.net.save_pretrained(tmp_path / "sibling")
    others, states = [tmp_path / "sibling"], [plain_weights(sibling)]
    if given:
        states.append({name: tensor + 0.1 for name, tensor in base.items()})
        save_file(states[1], tmp_path / "whole.safetensors")
        save_file(base, tmp_path / "base.safetensors")
        others.append(tmp_path / "whole.safetensors")
    paths = [tmp_path / "base.safetensors" if given else None, *others]
    method, log = TaskArithmetic(scale=0.6, normalize=False), Log(plain_weights)
    run(tmp_path, paths, None, log, module=module, method=method)
    for metrics, live in zip(log.metrics, log.weights, strict=True):
        expected = scored(merged(base, [live, *states], method))
        assert metrics["merged/val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        assert metrics["merge_experts/sibling/overlap"] > 0


def test_adapters_of_layers_that_are_not_merged_are_refused(tmp_path):
    Adapted(4).net.save_pretrained(tmp_path / "sibling")
    paths = [None, tmp_path / "sibling"]
    with pytest.raises(ValueError, match=r"the live adapter adds to '2\.weight', which is not merged"):
        run(tmp_path, paths, None, module=Adapted(3), exclude=["*.2.*"])
    files(tmp_path, kind=Classifier)
    sequence = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    module, plain = Classifier(), {"strip_prefix": "net."}
    module.net = sequence
    with pytest.raises(ValueError, match=r"sibling adds to '2\.weight', which is not merged"):
        run(tmp_path, [tmp_path / "base.safetensors", tmp_path / "sibling"], None, module=module, **plain)


def test_adapters_that_are_no_sum_are_refused(tmp_path):
    paths, _ = files(tmp_path, kind=Classifier)
    with pytest.raises(ValueError, match="can't merge DoRA"):
        run(tmp_path, paths, None, module=Adapted(use_dora=True))
    with pytest.raises(
        ValueError, match=r"this one also trains 'net\.base_model\.model\.0\.base_layer\.bias'"
    ):
        run(tmp_path, [None, tmp_path / "expert0.safetensors"], None, module=Adapted(bias="all"))


def test_what_modules_to_save_has_replaced_is_merged_whole(tmp_path):
    seed(1)
    base = weights_of(Classifier())
    module, sibling = (Adapted(value, base, target_modules=["0"], modules_to_save=["2"]) for value in (3, 4))
    with torch.no_grad():
        sibling.net.base_model.model[2].modules_to_save["default"].weight.add_(0.3)
    sibling.net.save_pretrained(tmp_path / "sibling")
    method, log = TaskArithmetic(scale=0.6, normalize=False), Log(plain_weights)
    run(tmp_path, [None, tmp_path / "sibling"], None, log, module=module, method=method)
    for metrics, live in zip(log.metrics, log.weights, strict=True):
        expected = scored(merged(base, [live, plain_weights(sibling)], method))
        assert metrics["merged/val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


class Shown(Callback):
    """What each validation showed, as this rank has it."""

    def __init__(self):
        self.metrics = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            shown = trainer.callback_metrics.items()
            self.metrics.append({n: float(v) for n, v in shown if n.startswith(("merge", "val"))})


def on_each_rank(strategy, folder, method):
    callback = CheckpointMergeCallback(
        every_n_steps=100,
        dirpath=folder / f"{strategy}-{method}",
        base=folder / "base.safetensors",
        experts=[folder / "expert0.safetensors", folder / "expert1.safetensors"],
        method=method,
    )
    shown = Shown()
    run = fit(strategy, UnevenModule(), callback, shown, max_steps=4, val_check_interval=2)
    return shown.metrics, run.final


class AdaptedRows(Adapted):
    """With data of its own, the same on all ranks."""

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(32)


def with_an_adapter(strategy, folder):
    options = {"every_n_steps": 100, "dirpath": folder / strategy, "experts": [folder / "sibling"]}
    shown, callback = Shown(), CheckpointMergeCallback(**options, method="ties")
    seed()
    fit(strategy, AdaptedRows(), callback, shown, max_steps=4, val_check_interval=2)
    return shown.metrics


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_several_ranks_merge_what_one_does(method, tmp_path):
    files(tmp_path, kind=UnevenModule, scale=0.05)
    metrics, final = on_each_rank("alone", tmp_path, method)
    options = {"folder": tmp_path, "method": method}
    jobs = {name: (on_each_rank, {**options, "strategy": name}) for name in ("ddp", "fsdp2")}
    assert len(metrics) > 1
    assert metrics[0]["merge_experts/evaluated"] >= 20
    for ranks in run_jobs(2, jobs).values():
        for theirs, weights in ranks:
            assert [m.keys() for m in theirs] == [m.keys() for m in metrics]
            for found, expected in zip(theirs, metrics, strict=True):
                # The same sums in another order: a few roundings of fp32.
                assert found == pytest.approx(expected, rel=1e-4)
            for name, tensor in final.items():
                torch.testing.assert_close(weights[name], tensor)


@pytest.mark.slow
def test_an_adapter_that_several_ranks_train_is_merged_as_by_one(tmp_path):
    Adapted(4).net.save_pretrained(tmp_path / "sibling")
    expected = with_an_adapter("alone", tmp_path)
    jobs = {"ddp": (with_an_adapter, {"strategy": "ddp", "folder": tmp_path})}
    for found in run_jobs(2, jobs)["ddp"]:
        assert len(found) == len(expected) > 1
        for theirs, ours in zip(found, expected, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4)
