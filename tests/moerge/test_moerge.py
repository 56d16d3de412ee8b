"""MoErging: the naive loop's numbers and gradients, Arrow, training, saving, and peft's own routing."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import assert_same_bits, loader, train, weights_of

from merge_callback.merging.low_rank import LowRank
from merge_callback.moerge import MoergedLinear, arrow, load_moerged, moerge, save_moerged

LAYERS = {"0": (16, 8), "2": (4, 16)}
RANKS = (2, 4, 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def factors(ranks=RANKS, dtype=torch.float32, layers=LAYERS):
    """Adapters of other ranks and scales, as mappings."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return [
        {name: LowRank(normal(out, r), normal(r, into), 3 / r) for name, (out, into) in layers.items()}
        for r in ranks
    ]


def folder_of(path, expert, **config):
    """The same adapter as peft saves it."""
    path.mkdir()
    rank = next(iter(expert.values())).rank
    scale = next(iter(expert.values())).scale
    tensors = {}
    for name, e in expert.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = e.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = e.b.contiguous()
    save_file(tensors, path / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "target_modules": [*expert], **config}
    (path / "adapter_config.json").write_text(json.dumps(told))
    return path


def naive(layer, x, k, score):
    """Equation 2 token by token and expert by expert."""
    experts, outputs = layer.experts(), []
    for token in x.reshape(-1, x.shape[-1]):
        scores = layer.router.to(token.dtype) @ token
        scores = scores.abs() if score == "abs" else scores
        pi = scores.softmax(0)
        chosen = scores.topk(k).indices.tolist()
        y = layer.base(token)
        for t in chosen:
            e = experts[t]
            y = y + pi[t] / pi[chosen].sum() * e.scale * (e.b @ (e.a @ token))
        outputs.append(y)
    return torch.stack(outputs).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize(("k", "score"), [(1, "abs"), (2, "abs"), (2, "signed"), (3, "abs")])
def test_outputs_and_gradients_are_those_of_the_naive_loop(shape, k, score):
    layer = moerge(net(), factors(), k=k, score=score)[0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    trained = [x, layer.lora_A, layer.lora_B, layer.router]
    found, expected = layer(x), naive(layer, x, k, score)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad((found * weights).sum(), trained, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), trained, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_only_the_routers_and_experts_train():
    model = moerge(net().eval(), factors())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.{part}" for layer in LAYERS for part in ("lora_A", "lora_B", "router")}
    assert not any(layer.training for layer in model.modules())
    assert all(isinstance(model[int(name)], MoergedLinear) for name in LAYERS)


@pytest.mark.parametrize(("out", "into", "rank"), [(30, 20, 4), (3, 20, 8), (20, 3, 8), (5, 5, 1)])
def test_arrow_is_the_first_right_singular_vector_of_the_dense_product(out, into, rank):
    torch.manual_seed(4)
    expert = LowRank(torch.randn(out, rank), torch.randn(rank, into), -0.5)
    vector = torch.linalg.svd(expert.b.double() @ expert.a.double(), full_matrices=False).Vh[0]
    found = arrow(expert)
    torch.testing.assert_close(found, vector * (vector @ found).sign(), rtol=1e-10, atol=1e-10)
    assert found[found.abs().argmax()] > 0
    assert arrow(LowRank(torch.zeros(out, rank), expert.a)).count_nonzero() == 0


def test_the_sign_of_a_vector_changes_nothing_unless_scores_are_signed():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(5))
    same = {}
    for score in ("abs", "signed"):
        layer = moerge(net(), factors(), score=score)[0]
        before = layer(x)
        with torch.no_grad():
            layer.router[1].neg_()
        same[score] = torch.equal(layer(x), before)
    assert same == {"abs": True, "signed": False}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "autocast off"])
def test_lower_precision_keeps_the_base_and_its_dtype(precision):
    exact = moerge(net(), factors())
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(6))
    model = moerge(net(), factors())
    if precision == "bf16-true":
        model, x = model.to(torch.bfloat16), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        y = model[0](x)
    assert y.dtype == (torch.float32 if precision == "autocast off" else torch.bfloat16)
    torch.testing.assert_close(y.float(), exact[0](x.float()), rtol=0.05, atol=0.15)
    half = moerge(net().to(torch.bfloat16), factors(dtype=torch.bfloat16))
    assert half[0].lora_A.dtype == torch.float32
    assert half[0](x.bfloat16()).dtype == torch.bfloat16


def test_rank_stabilised_scales_are_exact_after_a_cast():
    expert = {name: LowRank(e.b, e.a, 16 / 8**0.5) for name, e in factors()[0].items()}
    layer = moerge(net(), [expert, expert]).to(torch.bfloat16)[0]
    assert layer._scale.tolist() == pytest.approx([16 / 8**0.5] * 4, rel=1e-7)


def test_it_compiles_without_a_graph_break():
    model = moerge(net(), factors())
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(7))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


class Mixture(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = moerge(net(), factors())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_training_in_lightning_moves_routers_and_experts_and_not_the_base(tmp_path):
    module = Mixture()
    before = weights_of(module)
    train(module, data=loader(), max_steps=5).save_checkpoint(tmp_path / "run.ckpt")
    for name, tensor in weights_of(module).items():
        is_trained = name.endswith(("lora_A", "lora_B", "router"))
        assert torch.equal(tensor, before[name]) != is_trained, name
    again = Mixture.load_from_checkpoint(tmp_path / "run.ckpt")
    assert_same_bits(weights_of(again), weights_of(module))


def test_folders_of_peft_give_the_same_model_as_mappings(tmp_path):
    folders = [folder_of(tmp_path / str(i), expert) for i, expert in enumerate(factors())]
    found, expected = moerge(net(), folders), moerge(net(), factors())
    assert_same_bits(weights_of(found), weights_of(expected))
    assert found[2].scales == expected[2].scales == (1.5, 0.75, 1.0)


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = moerge(net(), factors(), k=1, score="signed")
    nn.init.normal_(model[0].router)
    for _ in range(2):  # the second save replaces the first
        save_moerged(model, tmp_path / "moerged")
    assert {path.name for path in (tmp_path / "moerged").iterdir()} == {"moerge.json", "moerge.safetensors"}
    again = load_moerged(net(), tmp_path / "moerged")
    assert_same_bits(weights_of(again), weights_of(model))
    x = torch.randn(7, 8)
    assert torch.equal(again(x), model(x))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def changed(**changes):
    def change(folder):
        record = json.loads((folder / "moerge.json").read_text())
        (folder / "moerge.json").write_text(json.dumps({**record, **changes}))

    return change


def without_a_tensor(folder):
    tensors = load_file(folder / "moerge.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "2.router"}, folder / "moerge.safetensors")


@pytest.mark.parametrize(
    ("change", "base", "message"),
    [
        (changed(format=9), net, "no record of moerge"),
        (changed(layers={"0": {"ranks": "x"}}), net, "a broken record"),
        (changed(k=4), net, "k=4 must be at most"),
        (without_a_tensor, net, "2.router is in the record or the file, not in both"),
        (lambda _: None, lambda: net()[:1], "the adapters have a layer 2, Sequential has none"),
        (
            lambda _: None,
            lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)),
            r"0.lora_B is \(16, 9\), but the base needs \(12, 9\)",
        ),
    ],
)
def test_another_base_or_a_broken_folder_is_refused(change, base, message, tmp_path):
    save_moerged(moerge(net(), factors()), tmp_path)
    change(tmp_path)
    model = base()
    with pytest.raises(ValueError, match=message):
        load_moerged(model, tmp_path)
    assert not any(isinstance(layer, MoergedLinear) for layer in model)


def test_what_is_no_expert_of_the_base_is_refused(tmp_path):
    ours = factors()
    attention = SimpleNamespace(attention=nn.MultiheadAttention(16, 2))
    cases = [
        (net(), [], {}, "needs adapters"),
        (net(), ours, {"k": 4}, "k=4 must be at most the number of adapters, 3"),
        (net(), ours, {"init": "zeros"}, "init='zeros'"),
        (net(), ours, {"score": "cosine"}, "score='cosine'"),
        (
            net(),
            [ours[0], {"0": ours[1]["0"]}],
            {},
            "adapters 1 and 2 differ in their layers: only one has 2",
        ),
        (net(), [{"1": ours[0]["0"]}] * 2, {}, "1 is a Tanh"),
        (
            net(),
            [{"2": ours[0]["0"]}] * 2,
            {},
            r"2: A of adapter 1 is \(2, 8\), but the base needs \(2, 16\)",
        ),
        (attention.attention, [{"out_proj": ours[0]["0"]}] * 2, {}, "MultiheadAttention"),
    ]
    for base, adapters, options, message in cases:
        with pytest.raises(ValueError, match=message):
            moerge(base, adapters, **options)
        assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(ValueError, match="pissa has changed the base"):
        moerge(net(), [folder_of(tmp_path / "pissa", ours[0], init_lora_weights="pissa")] * 2)
    with pytest.raises(ValueError, match="has no layers of moerge"):
        save_moerged(net(), tmp_path / "none")


def test_routing_is_that_of_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra 'lora'")
    lora = pytest.importorskip("peft.tuners.lora.arrow", reason="needs a peft with Arrow")
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)

    def base():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    layers = {
        f"model.layers.{i}.self_attn.{name}": (32, 32) for i in range(2) for name in ("q_proj", "v_proj")
    }
    # One direction dominates, because peft's power iteration stops after 15 rounds.
    experts = factors((3,) * 5, layers=layers)
    for expert in experts:
        for e in expert.values():
            e.a[0].mul_(8)
            e.b.div_(4)
    folders = [str(folder_of(tmp_path / str(i), e)) for i, e in enumerate(experts)]
    for folder in folders:  # peft wants its targets by their last names, the same in each layer
        path = tmp_path / folder / "adapter_config.json"
        told = {**json.loads(path.read_text()), "target_modules": ["q_proj", "v_proj"]}
        path.write_text(json.dumps(told))
    theirs = lora.create_arrow_model(base(), folders, peft.ArrowConfig(top_k=2)).eval()
    ours = moerge(base(), folders, k=2)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids).logits
    assert (found - base()(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name in layers:
        prototypes = theirs.get_submodule(f"base_model.model.{name}").lora_arrow["arrow_router"].prototypes
        x = torch.randn(100, 32, generator=torch.Generator().manual_seed(8))
        similarity, expected_experts = (x @ prototypes.T).abs().topk(2)
        chosen, weights = ours.get_submodule(name).route(x)
        assert torch.equal(chosen, expected_experts)
        torch.testing.assert_close(weights, similarity.softmax(-1), rtol=1e-4, atol=1e-5)
