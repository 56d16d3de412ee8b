"""Checkpoints of one run whose names differ by what a wrapper put in, or by a buffer that only some save."""

import pytest
import torch

import merge_callback.cli.main as command_line
from merge_callback.checkpoints.open import open_checkpoint


def merged(tmp_path, *models: list[str], options=()) -> dict[str, float]:
    """What a merge of checkpoints with these names has, the i-th filled with i."""
    for i, names in enumerate(models, 1):
        state = {name: torch.full((2,), float(i)) for name in names}
        torch.save(
            {"state_dict": state, "global_step": i, "pytorch-lightning_version": "2.6"},
            tmp_path / f"{i}.ckpt",
        )
    output = tmp_path / "merged"
    status = command_line.main(
        ["merge", str(tmp_path / "*.ckpt"), "--output", str(output), "--quiet", *options]
    )
    if status:
        raise ChildProcessError
    return {name: tensor[0].item() for name, tensor in open_checkpoint(output).tensors.items()}


SAME = {
    "torch.compile": (["model.l.w"], ["model._orig_mod.l.w"], [], {"model.l.w": 1.5}),
    "the other way round": (["model._orig_mod.l.w"], ["model.l.w"], [], {"model.l.w": 1.5}),
    "compiled before and after": (["_orig_mod.l.w"], ["_orig_mod.l.w"], [], {"l.w": 1.5}),
    "a prefix with it": (
        ["model.l.w"],
        ["model._orig_mod.l.w"],
        ["--strip-prefix", "model._orig_mod."],
        {"l.w": 1.5},
    ),
    "DDP": (["l.w", "b"], ["module.l.w", "module.b"], [], {"l.w": 1.5, "b": 1.5}),
    "DDP came later": (["module.l.w", "module.b"], ["l.w", "b"], [], {"l.w": 1.5, "b": 1.5}),
    "DDP of a compiled one": (["l.w"], ["module._orig_mod.l.w"], [], {"l.w": 1.5}),
    "a prefix of one": (["l.w"], ["net.l.w"], ["--strip-prefix", "net."], {"l.w": 1.5}),
    "a module that is called so": (["module.l.w"], ["module.l.w"], [], {"module.l.w": 1.5}),
    "activation checkpointing": (["l.w"], ["l._checkpoint_wrapped_module.w"], [], {"l.w": 1.5}),
    "FSDP": (["l.w"], ["_fsdp_wrapped_module.l._fsdp_wrapped_module.w"], [], {"l.w": 1.5}),
    "a dropped buffer": (["l.w", "r.inv_freq"], ["l.w"], ["--exclude", "*inv_freq"], {"l.w": 1.5}),
    "a new buffer": (
        ["l.w"],
        ["l.w", "r.inv_freq"],
        ["--exclude", "*inv_freq"],
        {"l.w": 1.5, "r.inv_freq": 2.0},
    ),
    "both": (["_orig_mod.l.w", "_orig_mod.r.f"], ["l.w"], ["--exclude", "r.*"], {"l.w": 1.5}),
    "two of one name": (
        ["a.w", "_orig_mod.a.w"],
        ["a.w", "_orig_mod.a.w"],
        [],
        {"a.w": 1.5, "_orig_mod.a.w": 1.5},
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_tensor_is_found_under_both_names(tmp_path, kind):
    first, second, options, expected = SAME[kind]
    assert merged(tmp_path, first, second, options=options) == expected


def test_a_lightning_merge_keeps_the_names_of_the_module_as_it_is(tmp_path):
    names = ["model._orig_mod.l.w"]
    assert merged(tmp_path, ["model.l.w"], names, options=["--as", "lightning"]) == {names[0]: 1.5}


@pytest.mark.parametrize(
    "models", [(["l.w", "r.f"], ["l.w"]), (["l.w"], ["net.l.w"]), (["a", "module.b"], ["a", "b"])]
)
def test_other_names_are_refused_with_what_helps(tmp_path, capsys, models):
    with pytest.raises(ChildProcessError):
        merged(tmp_path, *models)
    said = capsys.readouterr().err
    assert "1.ckpt and" in said
    assert "have different names: only in the former" in said
    assert "--strip-prefix" in said


def test_a_prefix_that_no_name_has_is_refused(tmp_path, capsys):
    with pytest.raises(ChildProcessError):
        merged(tmp_path, ["l.w"], ["l.w"], options=["--strip-prefix", "net."])
    assert "'net.' begins no tensor's name" in capsys.readouterr().err


def test_measures_compare_what_is_the_same(tmp_path, capsys):
    merged(tmp_path, ["l.w"], ["module._orig_mod.l.w"], ["l.w"])
    for command in ("diversity", "interference"):
        assert command_line.main([command, *(str(tmp_path / f"{i}.ckpt") for i in (1, 2, 3))]) == 0
    assert "different names" not in capsys.readouterr().err
