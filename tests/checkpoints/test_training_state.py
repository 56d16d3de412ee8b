"""Training state is told from weights, at any prefix; what repeats the weights is refused."""

import io
import json

import pytest
import torch
from checkpoint_files import few_tensors, save_distributed
from safetensors.torch import save_file
from training_runs import assert_same_bits

from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.cli.main import main

W = "decoder.layers.linear.weight"

# Flat names of other people's checkpoints, beside a weight W.
STATE = [
    f"optimizer.state.exp_avg.{W}",  # Megatron
    f"chained_0.optimizer.state.fp32_param.{W}",  # Megatron, mixture of experts
    "chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(bf16).bucket_idx_0.exp_avg_sq",
    f"optimizer.state.{W}.exp_avg_sq",  # torchtitan, flattened by torch
    f"optim.state.{W}.step",
    f"state.{W}.row_var",  # flattened by torch, beside the model
    f"param_groups.{W}.lr",
    f"optimizer.param_groups.{W}.lr",
    f"state.optimizers.DecoupledAdamW.state.{W}.exp_avg",  # Composer
    f"optimizer_0.state.{W}.momentum_buffer",
    f"optimizer_states.0.state.{W}.max_exp_avg_sq",  # Lightning
    f"app.optim.{W}.square_avg",
    f"fp32_from_fp16_groups.{W}",  # DeepSpeed
    f"{W}.exp_avg",
    f"exp_avg.{W}",
    f"optimizer.fp32.{W}",
    f"optimizer.{W}",
]


@pytest.mark.parametrize("name", STATE)
def test_an_optimizer_s_tensors_are_no_weights_in_flat_names(tmp_path, name):
    weights = {W: torch.ones(4, 4), "output.bias": torch.zeros(4)}
    content = {**weights, name: torch.full((4, 4), 100.0)}
    save_file(content, tmp_path / "a.safetensors")
    torch.save(content, tmp_path / "a.pt")
    saved = save_distributed(tmp_path / "dcp", content)
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt", saved):
        assert_same_bits(open_checkpoint(path, tmp_path).tensors, weights)


@pytest.mark.parametrize(
    "name", ["rng.0.torch", "rng_state/shard_0.0_1", "cuda_rng_state", "state.rng_states.cpu"]
)
def test_a_generator_s_state_is_no_weight(tmp_path, name):
    content = {W: torch.ones(4, 4), name: torch.get_rng_state()}
    assert open_checkpoint(save_distributed(tmp_path / "dcp", content), tmp_path).tensors.keys() == {W}


def test_composer_s_state_beside_the_model_is_left_out(tmp_path):
    state = {
        "state": {
            "model": few_tensors(),
            "optimizers": {"DecoupledAdamW": {"state": {W: {"exp_avg": torch.ones(3)}}}},
            "train_metrics": {"CrossEntropy": {"total": torch.ones(2)}},
            "schedulers": {"Cosine": {"base": torch.ones(2)}},
        },
        "rng": [{"torch": torch.get_rng_state(), "python": (3, (1, 2))}],
        "bytes": io.BytesIO(b"x"),
    }
    tensors = open_checkpoint(save_distributed(tmp_path / "ba1", state), tmp_path).tensors
    assert_same_bits(tensors, few_tensors())


@pytest.mark.parametrize(
    "name", ["optimizer.weight", "rng.weight", "norm.exp_avg", "optimizer.net.0.weight", "state.h"]
)
def test_a_module_s_own_tensors_may_sound_like_training_state(tmp_path, name):
    content = {W: torch.ones(4, 4), name: torch.ones(3)}
    save_file(content, tmp_path / "a.safetensors")
    assert_same_bits(open_checkpoint(tmp_path / "a.safetensors").tensors, content)


@pytest.mark.parametrize("prefix", ["master", "copies.0", "fp32_weights"])
def test_a_second_copy_of_all_weights_is_refused(tmp_path, prefix):
    weights = {W: torch.ones(4, 4), "output.bias": torch.zeros(4)}
    content = {**weights, **{f"{prefix}.{name}": tensor + 1 for name, tensor in weights.items()}}
    save_file(content, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", save_distributed(tmp_path / "dcp", content)):
        with pytest.raises(ValueError, match=f"every weight twice, the second time under '{prefix}'"):
            open_checkpoint(path, tmp_path)


@pytest.mark.parametrize("prefix", ["ema", "teacher", "layers.1"])
def test_a_model_s_copy_of_itself_is_a_part_of_it(tmp_path, prefix):
    weights = {W: torch.ones(4, 4), "output.bias": torch.zeros(4)}
    content = {**weights, **{f"{prefix}.{name}": tensor + 1 for name, tensor in weights.items()}}
    content |= {"layers.1.norm.weight": torch.ones(2)} if prefix == "layers.1" else {}
    save_file(content, tmp_path / "a.safetensors")
    assert_same_bits(open_checkpoint(tmp_path / "a.safetensors").tensors, content)


def test_a_file_of_training_state_alone_is_refused(tmp_path):
    save_file({f"optimizer.state.{W}.exp_avg": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: holds only training state"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("save", [torch.save, save_file, lambda state, path: save_distributed(path, state)])
def test_a_merge_says_what_it_left_out_as_training_state(save, tmp_path, capsys):
    moments = [f"optimizer.state.exp_avg.{W}", f"optimizer.state.fp32_param.{W}"]
    state = {W: torch.ones(4, 4), **{name: torch.zeros(4, 4) for name in moments}}
    suffix = {torch.save: ".pt", save_file: ".safetensors"}.get(save, "")
    paths = [tmp_path / f"step-{i}{suffix}" for i in (1, 2)]
    for path in paths:
        save({name: tensor.clone() for name, tensor in state.items()}, path)
    assert main(["merge", *map(str, paths), "--output", str(tmp_path / "m"), "--quiet"]) == 0
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["training_state"] == moments
    assert f"left out as training state: 2 tensors ({', '.join(moments)})" in capsys.readouterr().err
