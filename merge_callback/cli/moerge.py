"""The command ``moerge``."""

from __future__ import annotations

import argparse
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merge_callback.cli.dry_run import HELP, reads, size_of, tell_dry
from merge_callback.cli.imports import import_named
from merge_callback.engine.plan import in_bytes
from merge_callback.moerge import MoergedLinear, moerge, save_moerged
from merge_callback.moerge.model import RECORD
from merge_callback.offline.output_folder import OutputFolder
from merge_callback.snapshots.files import printable, read_object, write_json

_DESCRIPTION = """\
Put LoRA adapters side by side as experts of one model, in which a router in each layer sends each token to K
of them. The output holds the experts, in the order given, and the routers; the base stays where it is."""

_EXAMPLES = """\
examples:
  merge-callback moerge model/ experts/law experts/code experts/math --output moerged
  merge-callback moerge model/ experts/* --k 1 --output moerged
  merge-callback moerge my_models:build experts/law experts/code --output moerged

then, in Python, to train or to use it:
  model = load_moerged(AutoModelForCausalLM.from_pretrained("model"), "moerged")
"""


def add_moerge(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``moerge``."""
    parser.set_defaults(run=_moerge)
    parser.description = _DESCRIPTION
    parser.epilog, parser.formatter_class = _EXAMPLES, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "base",
        metavar="BASE",
        help="folder of a Hugging Face model (its weights are not read), or module:function, a function "
        "without arguments that returns the model",
    )
    add("adapters", nargs="+", metavar="ADAPTER", help="folders of peft's LoRA adapters, one for each expert")
    add("--output", required=True, type=Path, metavar="DIR", help="the folder to make")
    add("--k", type=int, default=2, metavar="K", help="experts per token (%(default)s)")
    add(
        "--init",
        choices=("arrow", "random"),
        default="arrow",
        help="routers: the direction each expert changes most, or normal noise (%(default)s)",
    )
    add(
        "--score",
        choices=("abs", "signed"),
        default="abs",
        help="experts are ranked by |R x|, as in Arrow, or by R x, as in eq. 2 of the paper (%(default)s)",
    )
    add("--dry-run", action="store_true", help=HELP)


def _moerge(parsed: argparse.Namespace) -> int:
    if os.path.lexists(parsed.output):
        raise FileExistsError(f"{parsed.output} exists; name another folder with --output")
    folder = OutputFolder(parsed.output, force=False, sources=())
    is_own = ":" in parsed.base and not Path(parsed.base).exists()
    base = _own(parsed.base) if is_own else _pretrained(Path(parsed.base))
    if parsed.dry_run:
        adapters = [Path(adapter) for adapter in parsed.adapters]
        total = in_bytes(sum(map(size_of, adapters)))
        return tell_dry(
            [*reads(adapters), f"would write {len(adapters)} experts to {parsed.output}, about {total}"]
        )
    torch.manual_seed(0)  # of --init random: the same command makes the same file
    model = moerge(base, parsed.adapters, parsed.k, parsed.init, parsed.score)
    with folder.draft() as draft:
        save_moerged(model, draft)
        made_from = {"base": parsed.base, "experts": parsed.adapters, "init": parsed.init}
        write_json(draft / RECORD, {**read_object(draft / RECORD), **made_from})
    layers = sum(isinstance(layer, MoergedLinear) for layer in model.modules())
    print(printable(f"{parsed.output}: {len(parsed.adapters)} experts in {layers} layers, k={parsed.k}"))
    return 0


def _pretrained(folder: Path) -> nn.Module:
    """The model that a folder's ``config.json`` describes, without memory for its weights."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: is no folder of a Hugging Face model; of another model, name a function that makes "
            "it, as module:function"
        )
    if find_spec("transformers") is None:
        raise ValueError("transformers is missing: pip install 'merge-callback[transformers]'")
    import transformers

    try:
        # Nothing of the folder is run, and nothing is asked of the network.
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        named = next(iter(config.architectures or []), "")
        any_kind = partial(transformers.AutoModel.from_config, trust_remote_code=False)
        kind: Any = getattr(transformers, named, any_kind)
        with torch.device("meta"):
            made: nn.Module = kind(config)
    except Exception as error:  # the configuration may be anyone's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder}: transformers can't make this model ({reason:.300})") from None
    return made


def _own(text: str) -> nn.Module:
    """The model that a function of the user's makes."""
    module, _, name = text.partition(":")
    make: Any = getattr(import_named(text, module), name, None)
    if not callable(make):
        raise ValueError(f"{text}: {module} has no function {name!r}")
    try:
        model = make()
    except Exception as error:
        raise ValueError(f"{text}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model
