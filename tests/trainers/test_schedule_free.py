"""Optimizers that evaluate other weights than they train: what is evaluated is kept, merged and restored."""

import pytest
import torch
from training_runs import Classifier, assert_mean, assert_same_bits, loader, seed, train, weights_of

from merge_callback import CheckpointMergeCallback, CheckpointMerger, load_merge
from merge_callback.recovery.optimizer_state import is_known, reset
from merge_callback.recovery.schedule_free import evaluated_weights, restart_sequences


class Averaging(torch.optim.SGD):
    """SGD by Defazio et al., arXiv 2405.15682: gradients at y, the average x, and z in the state."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(beta=beta, train_mode=False, k=0)

    def _switch(self, train):
        for group in self.param_groups:
            if group["train_mode"] != train:
                group["train_mode"] = train
                weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)

    @torch.no_grad()
    def eval(self):
        self._switch(False)

    @torch.no_grad()
    def train(self):
        self._switch(True)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                share = 1 / group["k"]
                p.lerp_(z, share).sub_(p.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - share)))
                z.sub_(p.grad, alpha=group["lr"])
        return loss


class Trained(Classifier):
    """Switches the optimizer around the whole training."""

    def __init__(self, kind=Averaging):
        super().__init__()
        self.kind, self.averages, self.judged = kind, {}, []

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.1)

    def on_train_start(self):
        self.optimizers().optimizer.train()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step % 2 == 0:
            with evaluated_weights(self.trainer.optimizers):
                self.averages[self.trainer.global_step] = weights_of(self)


class InEpochHooks(Trained):
    def on_validation_epoch_start(self):
        self.optimizers().optimizer.eval()

    def on_validation_epoch_end(self):
        self.optimizers().optimizer.train()


class InModelHooks(Trained):
    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.optimizers().optimizer.eval()

    def on_validation_model_train(self):
        super().on_validation_model_train()
        self.optimizers().optimizer.train()


def other_kinds():
    """Those of the libraries, if they are installed."""
    found = [Averaging]
    for module, name in (("schedulefree", "AdamWScheduleFree"), ("prodigyplus", "ProdigyPlusScheduleFree")):
        try:
            found.append(getattr(__import__(module), name))
        except ImportError:
            continue
    return found


def merging(folder, **options):
    options = {"window": 3, "every_n_steps": 2, "keep_last": None, "spike": "off", **options}
    return CheckpointMergeCallback(dirpath=folder, **options)


@pytest.mark.parametrize("kind", other_kinds(), ids=lambda kind: kind.__name__)
def test_the_averaged_sequence_is_merged_and_training_is_bitwise_that_without(kind, tmp_path):
    seed()
    alone = Trained(kind)
    train(alone, data=loader())
    seed()
    module = Trained(kind)
    train(module, merging(tmp_path), data=loader())
    assert_same_bits(weights_of(module), weights_of(alone))
    assert not torch.equal(module.averages[12]["net.0.weight"], module.net[0].weight)
    assert_mean(load_merge(tmp_path / "latest"), [module.averages[step] for step in (8, 10, 12)])


@pytest.mark.parametrize("module", [InModelHooks, InEpochHooks])
def test_what_is_validated_is_what_is_published(module, tmp_path):
    seed()
    alone = module()
    train(alone, data=loader(), val=loader(32), max_steps=12, val_check_interval=4)
    seed()
    trained = module()
    trainer = train(
        trained, merging(tmp_path), data=loader(), val=loader(32), max_steps=12, val_check_interval=4
    )
    assert_same_bits(weights_of(trained), weights_of(alone))
    judge = module().eval()
    judge.load_state_dict(load_merge(tmp_path / "latest"))
    with torch.no_grad():
        loss = sum(float(judge.loss(batch)) for batch in loader(32)) / 4
    assert float(trainer.callback_metrics["merged/val_loss"]) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("switched", [False, True], ids=["in training", "in evaluation"])
def test_merged_weights_of_a_plain_loop_are_not_moved_by_the_optimizer(switched, tmp_path):
    seed()
    model = torch.nn.Linear(4, 2)
    optimizer = Averaging(model.parameters())
    optimizer.train()
    with CheckpointMerger(
        model, optimizer, dirpath=tmp_path, window=2, every_n_steps=1, spike="off"
    ) as merger:
        for _ in range(4):
            model.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            merger.step()
        if switched:
            optimizer.eval()
        before = weights_of(model)
        with merger.merged_weights() as merge:
            optimizer.eval()
            assert_same_bits(weights_of(model), {n: t.clone() for n, t in merge.arena.tensors().items()})
            optimizer.train()
        assert_same_bits(weights_of(model), before)
        assert optimizer.param_groups[0]["train_mode"] is not switched


def test_all_sequences_go_on_from_restored_weights():
    seed()
    model = torch.nn.Linear(4, 2)
    optimizer = Averaging(model.parameters())
    optimizer.train()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    restored = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    model.load_state_dict(restored)
    restart_sequences([optimizer])
    optimizer.eval()
    assert_same_bits(weights_of(model), restored)
    optimizer.train()
    assert_same_bits(weights_of(model), restored)


def test_the_library_s_state_is_set_back_as_a_fresh_one():
    schedulefree = pytest.importorskip("schedulefree", reason="needs the package 'schedulefree'")
    seed()
    model = torch.nn.Linear(4, 2)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), warmup_steps=2)
    assert is_known(optimizer)
    optimizer.train()
    start, batch = weights_of(model), torch.randn(8, 4)

    def steps():
        for _ in range(4):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        return weights_of(model)

    first = steps()
    reset(optimizer)
    model.load_state_dict(start)
    restart_sequences([optimizer])
    assert_same_bits(steps(), first)
