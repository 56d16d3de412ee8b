"""Codes and scales mean something only together: multiplied out if the rule is known, else refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge_callback.cli.main as command_line
from merge_callback.checkpoints.open import open_checkpoint

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def saved(folder: Path, tensors: dict[str, Tensor], quantisation: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if quantisation is not None:
        config = {"model_type": "llama", "quantization_config": quantisation}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def codes(*shape: int, dtype: torch.dtype = E4M3, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)


def scales(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def expand(scale: Tensor, block: int, shape: torch.Size) -> Tensor:
    return scale.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., : shape[-2], : shape[-1]]


BLOCKS = {"quant_method": "fp8", "weight_block_size": [4, 4]}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "config_groups": {"0": {"weights": {"strategy": "channel"}}},
}
GROUPS = {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"group_size": 3}}}}
KNOWN = {  # name of the codes and the scales, the scales, each value's factor, what the configuration says
    "DeepSeek": ("l.weight", "l.weight_scale_inv", scales(2, 3), lambda s: expand(s, 4, (6, 9)), BLOCKS),
    "original DeepSeek": ("l.weight", "l.scale", scales(1, 1), lambda s: s, None),
    "experts": ("e.up", "e.up_scale_inv", scales(5, 2, 3), lambda s: expand(s, 4, (6, 9)), BLOCKS),
    "FBGEMM": ("l.weight", "l.weight_scale", scales(6, 1), lambda s: s, {"quant_method": "fbgemm_fp8"}),
    "channels": ("l.weight", "l.weight_scale", scales(6, 1).bfloat16(), lambda s: s, CHANNELS),
    "groups": ("l.weight", "l.weight_scale", scales(6, 3), lambda s: s.repeat_interleave(3, 1), GROUPS),
    "ComfyUI": ("l.weight", "l.scale_weight", scales(1), lambda s: s, None),
    "AutoFP8": ("l.weight", "l.weight_scale", torch.tensor(0.3), lambda s: s, {"quant_method": "fp8"}),
    "Mistral": ("l.weight", "l.qscale_weight", torch.tensor(0.3), lambda s: s, None),
    "rows": ("l.weight", "l.weight_scale", scales(6), lambda s: s[:, None], None),
    "square": (
        "l.weight",
        "l.weight_scale_inv",
        scales(2, 3).to(torch.bfloat16),
        lambda s: expand(s, 4, (6, 9)),
        BLOCKS,
    ),
}
if hasattr(torch, "float8_e8m0fnu"):  # not in torch 2.6
    powers = (2.0 ** torch.arange(6.0)).view(2, 3).to(torch.float8_e8m0fnu)
    KNOWN["powers of two"] = (
        "l.weight",
        "l.weight_scale_inv",
        powers,
        lambda s: expand(s, 4, (6, 9)),
        BLOCKS,
    )


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_eight_bit_codes_are_multiplied_with_their_scales(tmp_path, kind, dtype):
    weight, scale, factors, expand, told = KNOWN[kind]
    code = codes(*([5] if kind == "experts" else []), 6, 9, dtype=dtype)
    beside = {"l.input_scale": torch.ones(1), "l.bias": torch.ones(3), "attn.k_scale": torch.ones(1)}
    folder = saved(tmp_path / "a", {weight: code, scale: factors, **beside}, told)
    tensors = open_checkpoint(folder, tmp_path).tensors
    assert tensors.keys() == {weight, "l.bias"}
    torch.testing.assert_close(tensors[weight], code.float() * expand(factors.float()), rtol=0, atol=0)


def test_blocks_of_128_need_no_configuration(tmp_path):
    code, scale = codes(130, 200), scales(2, 2)
    folder = saved(tmp_path / "a", {"l.weight": code, "l.weight_scale_inv": scale})
    found = open_checkpoint(folder, tmp_path).tensors["l.weight"]
    assert torch.equal(found, code.float() * expand(scale, 128, code.shape))


def test_the_merge_is_the_mean_of_the_weights_and_its_configuration_says_so(tmp_path):
    weights = []
    for i in range(2):
        code, scale = codes(6, 9, seed=i), scales(2, 3, seed=i)
        saved(tmp_path / f"checkpoint-{i}", {"l.weight": code, "l.weight_scale_inv": scale}, BLOCKS)
        weights.append(code.double() * expand(scale, 4, code.shape))
    inputs = [str(tmp_path / f"checkpoint-{i}") for i in range(2)]
    assert command_line.main(["merge", *inputs, "--output", str(tmp_path / "merged"), "--quiet"]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(merged["l.weight"].double(), sum(weights) / 2, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {"model_type": "llama"}
    assert command_line.main(["inspect", str(tmp_path / "merged")]) == 0


def test_eight_bit_floats_without_scales_are_values_of_their_own(tmp_path):
    folder = saved(tmp_path / "a", {"l.weight": codes(6, 9), "attn.logit_scale": torch.ones(1)})
    assert open_checkpoint(folder, tmp_path).tensors["l.weight"].dtype == E4M3


BYTES, INT8, INT32 = (torch.ones(6, 9, dtype=d) for d in (torch.uint8, torch.int8, torch.int32))
HALF = torch.ones(6, 1).half()
REFUSED = {
    "bitsandbytes 4 bit": {"l.weight": BYTES, "l.weight.absmax": HALF, "l.weight.quant_map": HALF},
    "its state alone": {"l.w": HALF, "l.w.quant_state.bitsandbytes__nf4": BYTES},
    "bitsandbytes 8 bit": {"l.weight": INT8, "l.SCB": HALF},
    "GPTQ": {"l.qweight": INT32, "l.qzeros": INT32, "l.scales": HALF, "l.g_idx": INT32[0]},
    "AWQ": {"l.qweight": INT32, "l.qzeros": INT32, "l.scales": HALF},
    "HQQ": {"l.W_q": BYTES, "l.scale": HALF, "l.zero": HALF},
    "compressed-tensors": {"l.weight_packed": INT32, "l.weight_scale": HALF, "l.weight_shape": INT32[0, :2]},
    "whole numbers and scales": {"l.weight": INT8, "l.weight_scale": HALF},
    "NVFP4": {"l.weight": BYTES, "l.weight_scale": codes(6, 1), "l.weight_scale_2": torch.ones(1)},
    "MXFP4": {"e.up_blocks": BYTES, "e.up_scales": BYTES[:, 0]},
    "MLX": {"l.weight": torch.ones(6, 9, dtype=torch.uint32), "l.scales": HALF, "l.biases": HALF},
    "EXL2": {"l.q_weight": INT32, "l.q_scale": INT32, "l.q_scale_max": HALF},
    "EXL3": {"l.trellis": torch.ones(2, 3, 4, dtype=torch.int16), "l.suh": HALF, "l.svh": HALF},
    "flattened torchao": {"l._weight_qdata": INT8, "l._weight_scale": HALF, "l._weight_zero_point": INT8},
    "Quanto": {"l.weight._data": INT8, "l.weight._scale": HALF},
    "torchao": {"l.weight_qdata": codes(6, 9), "l.weight_scale": scales(6, 1)},
    "any 8 bit": {"l.codes8": INT8, "l.my_scales": HALF},
    "scales in a name of their own": {"l.weight": codes(6, 9), "l.other_scale": HALF},
    "scales of another shape": {"l.weight": codes(6, 9), "l.weight_scale": scales(3)},
    "blocks of an unknown size": {"l.weight": codes(6, 9), "l.weight_scale_inv": scales(2, 3)},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_codes_are_refused_in_one_line_that_does_not_advise_to_copy_them(tmp_path, capsys, kind):
    for name in ("a", "b"):
        saved(tmp_path / name, {**REFUSED[kind], "norm.weight": torch.ones(4)})
    for extra in ([], ["--exclude", "l.*", "e.*"]):
        arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "m"), *extra]
        assert command_line.main(["merge", *arguments, "--quiet"]) == 1
        said = capsys.readouterr().err
        assert said.startswith((f"merge-callback: {tmp_path / 'a'}: ", f"merge-callback: {tmp_path / 'b'}: "))
        assert said.count("\n") == 1
        assert "quantised" in said
        assert "--exclude" not in said


@pytest.mark.parametrize(
    ("told", "tensors"),
    [
        ({"quant_method": "aqlm"}, {"l.codes": torch.ones(6, 9, dtype=torch.int16), "l.codebooks": HALF}),
        ({"quant_method": "mxfp8"}, {"l.weight": codes(6, 9), "l.weight_scale": scales(1)}),
        ({"quant_method": "fp8"}, {"l.weight": codes(6, 9)}),
    ],
)
def test_what_the_configuration_says_is_named(tmp_path, told, tensors):
    with pytest.raises(ValueError, match=f"'{told['quant_method']}', its configuration says"):
        open_checkpoint(saved(tmp_path / "a", tensors, told), tmp_path)


def test_codes_can_be_looked_at(tmp_path, capsys):
    folder = saved(tmp_path / "a", {**REFUSED["bitsandbytes 8 bit"], "m.weight": codes(6, 9)})
    assert command_line.main(["inspect", str(folder), "--tensors"]) == 0
    assert {"int8", "float16", "float8_e4m3fn"} <= set(capsys.readouterr().out.split())


def test_integers_that_are_no_codes_are_read(tmp_path):
    tensors = {
        "attn.relative_position_index": torch.ones(3, 3, dtype=torch.int64),
        "attn.logit_scale": torch.ones(3),
        "h.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),  # GPT-2's mask
        "bn.num_batches_tracked": torch.tensor(3),
        "fake_quant.scale": torch.ones(3),
        "fake_quant.zero_point": torch.zeros(3, dtype=torch.int32),
    }
    assert open_checkpoint(saved(tmp_path / "a", tensors)).tensors.keys() == tensors.keys()
