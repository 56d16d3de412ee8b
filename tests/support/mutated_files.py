"""Files of every format the commands read, and what may be wrong with them; as a program, it reads them.

A process reads one mutated file after the other and says so before each. So the one that hangs, takes too
much memory or ends the process is known, and the next process goes on behind it.
"""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import torch
import yaml
from checkpoint_files import save_distributed
from codec_windows import new_window, take
from command_line import run
from safetensors.torch import save_file

from merge_callback import load_merge
from merge_callback.snapshots.files import CorruptFileError
from merge_callback.snapshots.manifest import MANIFEST
from merge_callback.snapshots.safetensors_file import file_checksum, tensors_header, write_file
from merge_callback.snapshots.window_folder import WindowFolder

SECONDS = 2.0
"""The longest that a refusal may take."""

MEMORY = 1 << 30
"""Bytes of address space beyond what the process has when it begins."""


# --- sound files --------------------------------------------------------------------------------------------


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(6, 4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator).bfloat16(),
        "seen": torch.tensor(seed),
    }


def safetensors(folder):
    save_file(tensors(), folder / "step=10.safetensors", {"format": "pt", "tied.weight": "embed.weight"})
    return "step=10.safetensors"


def lightning(folder):
    content = {
        "state_dict": tensors(),
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.6.0",
        "hyper_parameters": {"width": 4, "names": ["a", "b"]},
        "callbacks": {"CheckpointMergeCallback": {"tokens": 400}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
    }
    torch.save(content, folder / "step=10.ckpt")
    return "step=10.ckpt"


def distributed(folder):
    save_distributed(folder / "step=10", {"model": tensors(), "optimizer": {"lr": torch.ones(1)}})
    torch.save({"global_step": 10}, folder / "step=10/meta.pt")
    return "step=10"


def hugging_face(folder):
    model, folder = tensors(), folder / "checkpoint-10"
    folder.mkdir()
    for file, names in (("a.safetensors", ["embed.weight"]), ("b.safetensors", ["norm.weight", "seen"])):
        save_file({name: model[name] for name in names}, folder / file)
    index = {"embed.weight": "a.safetensors", "norm.weight": "b.safetensors", "seen": "b.safetensors"}
    write(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": index})
    write(folder / "config.json", {"model_type": "tiny"})
    write(folder / "trainer_state.json", {"global_step": 10, "num_input_tokens_seen": 400, "log_history": []})
    return "checkpoint-10"


def window(folder):
    """A window of differences, with its manifest: the newest snapshot builds on the others."""
    kept = new_window(tensors(), 3, folder / "window")
    for step in (10, 20, 30):
        take(
            kept,
            step,
            {name: t + step / 1000 if t.is_floating_point() else t for name, t in tensors().items()},
        )
    return f"window/{kept.snapshots[-1].file}"


def shared_out(folder):
    """A snapshot that two ranks kept."""
    place, files = folder / "step=00000010-0123456789ab", {}
    place.mkdir()
    for rank in (0, 1):
        part = {"embed.weight": tensors()["embed.weight"][3 * rank : 3 * rank + 3].contiguous()}
        pieces = {"embed.weight": [[6, 4], None, [[[3 * rank, 0], [3, 4]]]]}
        facts = {"layout": "x", "lr_step": "1", "phase": "stable", "since": "0", "step": "10", "tokens": "40"}
        name = f"rank-{rank:05d}-of-00002.safetensors"
        metadata = {**facts, "pieces": json.dumps(pieces)}
        files[name] = write_file(place / name, tensors_header(part), part.values(), metadata)
    write(place / "shards.json", {"format": 1, "files": files})
    return place.name


def emission(folder):
    save_file(tensors(), folder / "in.safetensors")
    run(
        [
            "merge",
            "--keep-all",
            *[str(folder / "in.safetensors")] * 2,
            "--output",
            str(folder / "merged"),
            "--quiet",
        ]
    )
    return "merged"


def lightning_emission(folder):
    save_file(tensors(), folder / "in.safetensors")
    inputs = [str(folder / "in.safetensors")] * 2
    run(["merge", "--keep-all", *inputs, "--output", str(folder / "merged"), "--quiet", "--as", "lightning"])
    return "merged"


def distributed_emission(folder):
    save_distributed(folder / "merged", tensors())
    files = {path.name: file_checksum(path) for path in (folder / "merged").iterdir()}
    method = {"name": "sma", "options": {}, "reference": "a paper"}
    snapshots = [{"step": 10, "weight": 0.5}, {"step": 20, "weight": 0.5}]
    record = {"format": 1, "method": method, "snapshots": snapshots, "step": 20, "tied": {}, "files": files}
    write(folder / "merged/merge.json", record)
    return "merged"


def options(folder):
    save_file(tensors(), folder / "in.safetensors")
    content = {
        "checkpoints": [str(folder / "in.safetensors")] * 2,
        "method": "ties",
        "density": 0.5,
        "exclude": ["seen*"],
        "last": 2,
        "shard-size": "1GB",
        "quiet": True,
        "prefix": "model.",
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(content))
    return "merge.yaml"


FORMATS = {
    make.__name__: make
    for make in (
        safetensors,
        lightning,
        distributed,
        hugging_face,
        window,
        shared_out,
        emission,
        lightning_emission,
        distributed_emission,
        options,
    )
}


def write(path, content):
    path.write_text(json.dumps(content))


# --- what may be wrong --------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63, 10**30, 0.5, 1e308, float("nan"), float("-inf")]
TEXTS = [
    "",
    ".",
    "../in.safetensors",
    "/etc/passwd",
    "a\0b",
    "\x1b[2J\x07",
    "\n",
    "é" * 300,
    "F32",
    "1" * 5000,
]
TEXTS += ["\u202egnp", "\udcff", "__metadata__", "step", "a" * 100_000]
ODD = [*NUMBERS, *TEXTS, None, True, [], {}, [[]], [{}], {"": ""}, [[[1]]]]


def mutate(place, file, chance):
    """Makes one thing wrong with one of the files below a folder; returns what, in a few words."""
    found = sorted(path for path in place.rglob("*") if path.is_file() and path.name != "in.safetensors")
    path = chance.choice(found) if chance.random() < 0.7 else place / file
    path = path if path.is_file() else chance.choice(found)
    if chance.random() < 0.06:
        return f"{path.name}: {other_kind(path, chance)}"
    content = path.read_bytes()
    kind = next((kind for suffix, kind in STRUCTURED.items() if path.name.endswith(suffix)), None)
    if kind is not None and chance.random() < 0.75:
        path.write_bytes(kind(content, chance))
        return f"{path.name}: {kind.__name__}"
    path.write_bytes(mutate_bytes(content, chance))
    return f"{path.name}: bytes"


def mutate_bytes(content, chance):
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        # The beginning and the end of a file say what is in it.
        near = chance.choice((16, 64, 512, 1 << 30))
        at = chance.randrange(min(len(found), near) + 1)
        at = at if chance.random() < 0.6 else max(0, len(found) - at)
        length = chance.choice((1, 1, 2, 4, 8, 64, 4096))
        what = chance.randrange(6)
        if what == 0 and at < len(found):
            found[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            found[at : at + length] = chance.randbytes(length)
        elif what == 2:
            del found[at : None if chance.random() < 0.3 else at + length]
        elif what == 3:
            found[at:at] = found[at : at + length] * chance.choice((1, 2, 100))
        elif what == 4:
            found[at : at + 8] = struct.pack("<q", chance.choice((-1, 0, 1, 2**31, 2**40, 2**62, 2**63 - 1)))
        else:
            found[at:at] = chance.choice((b"(", b"[", b"{", b"\xff", b"\0", b"N0", b"]")) * chance.choice(
                (1, 5000)
            )
    return bytes(found)


def mutate_tree(tree, chance):
    """One node of a tree of mappings and lists becomes something else, goes, or gets a sibling."""
    places = list(nodes(tree))
    if not places:
        return chance.choice(ODD)
    holder, key = chance.choice(places)
    odd = chance.choice(ODD)
    what = chance.randrange(5)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[str(chance.choice(TEXTS))] = holder.pop(key)
    elif what == 2 and isinstance(holder, dict):
        holder[f"more {chance.randrange(9)}"] = odd
    elif what == 2:
        holder.insert(0, odd)
    else:
        holder[key] = odd
    return tree


def nodes(tree):
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from nodes(tree[key])


def json_text(content, chance):
    return json.dumps(mutate_tree(json.loads(content), chance)).encode(errors="surrogatepass")


def header(content, chance):
    length = int.from_bytes(content[:8], "little")
    text = json_text(content[8 : 8 + length], chance)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def yaml_text(content, chance):
    bombs = ["a: &a [x]\nb: *a\n", "a: &a {x: 1}\nb: {<<: [*a, *a]}\n", "- " * 3000]
    bombs += ["? [1]\n: 2\n", "!!python/x 1", "{" * 3000]
    if chance.random() < 0.3:
        return content + chance.choice(bombs).encode()
    try:
        return yaml.safe_dump(mutate_tree(yaml.safe_load(content), chance)).encode(errors="surrogatepass")
    except (yaml.YAMLError, UnicodeError):
        return b"method: [ties"


def archive(content, chance):
    """A file of torch.save whose pickle, or one of whose tensors, is another, with the right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = chance.choice([*old.namelist(), *[n for n in old.namelist() if n.endswith("data.pkl")] * 4])
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, mutate_bytes(data, chance) if name == chosen else data)
    return out.getvalue()


STRUCTURED = {
    ".json": json_text,
    ".safetensors": header,
    ".yaml": yaml_text,
    ".ckpt": archive,
    ".pt": archive,
}


def other_kind(path, chance):
    """A file becomes something that is none."""
    path.unlink()
    what = chance.choice(("pipe", "zeros", "link", "folder", "gone", "loop", "huge"))
    if what == "pipe":
        os.mkfifo(path)
    elif what in ("zeros", "link", "loop"):
        path.symlink_to({"zeros": "/dev/zero", "link": "/etc/passwd", "loop": path.name}[what])
    elif what == "folder":
        path.mkdir()
    elif what == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)  # a sparse file: no room is taken
    return what


def verdict(place, file, number):
    """What is wrong with how a mutated file was met; empty where nothing is."""
    path = str(place / file)
    if file.endswith(".yaml"):
        arguments = ["merge", "--keep-all", "--config", path, "--output", str(place / "out"), "--quiet"]
    elif number % 3 == 0:
        whole = (place / "window").is_dir() and number // 30 % 2  # by its manifest
        inputs = [str(place / "window")] if whole else [path, path]
        arguments = ["merge", "--keep-all", *inputs, "--output", str(place / "out"), "--quiet"]
    else:
        arguments = ["inspect", path, "--tensors"]
    status, out, errors = run(arguments)
    lines = errors.splitlines()
    if status == 0 or (out and not lines):  # `inspect` lists what does not fit its checksum
        refused = ""
    elif len(lines) != 1 or not re.match("merge-callback( merge)?: ", lines[0]):
        return f"status {status} and {errors!r:.300}"
    else:
        refused = lines[0]
    if refused and place.name not in refused and "checkpoints" not in refused and ".yaml" not in path:
        return f"names no file: {refused:.300}"
    if strange := [line for line in (out + errors).split("\n") if not line.isprintable()]:
        return f"printed {strange[0]!r:.200}"
    return reread(place, file, number)


def reread(place, file, number):
    """What the library's own readers make of the same files, those that a resumed run asks among them."""
    if (place / file / "merge.json").exists() and number % 3 == 1:
        try:
            load_merge(place / file)
        except (CorruptFileError, ValueError, OSError) as error:
            return "" if "\n" not in str(error) else f"load_merge: {error!r:.300}"
    if (place / "window" / MANIFEST).exists():
        folder = WindowFolder(place / "window", "run", "0123456789ab", keeps=True)
        folder.resume([])
        folder.prune([], 1 << 40)
    return ""


def read_all(root, formats, seed, begin, end):
    """Mutates and reads file after file; prints a line before each, and one where something is wrong."""
    root = Path(root)
    sound = {}
    for name in formats:
        (root / "sound" / name).mkdir(parents=True, exist_ok=True)
        known = root / "sound" / f"{name}.txt"
        if not known.exists():
            known.write_text(FORMATS[name](root / "sound" / name))
        sound[name] = known.read_text()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    slowest = 0.0
    for number in range(begin, end):
        name = formats[number % len(formats)]
        chance = random.Random(f"{seed} {number}")
        place = root / f"case-{number}"
        shutil.copytree(root / "sound" / name, place)
        if (place / "merge.yaml").exists():  # which names its inputs by their whole paths
            text = (place / "merge.yaml").read_text()
            (place / "merge.yaml").write_text(text.replace(str(root / "sound" / name), str(place)))
        what = mutate(place, sound[name], chance)
        print(f"case {number} {name} {what}", flush=True)
        signal.setitimer(signal.ITIMER_REAL, 5 * SECONDS)  # which ends the process
        begun = time.process_time()
        try:
            wrong = verdict(place, sound[name], number)
        except BaseException as error:
            frame = error.__traceback__
            while frame.tb_next:
                frame = frame.tb_next
            where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
            wrong = f"raised {error!r:.200} at {where}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.process_time() - begun
        slowest = max(slowest, took)
        if took > SECONDS:
            wrong = wrong or f"took {took:.1f} s"
        if wrong:
            print(f"wrong {number} {json.dumps(wrong)}", flush=True)
        else:
            shutil.rmtree(place)
    print(f"slowest {slowest:.2f}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["TMPDIR"] = sys.argv[1]
    from merge_callback.offline import workers

    workers.available = lambda: 1  # a process that forks would share the limits, and count for itself
    read_all(sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
