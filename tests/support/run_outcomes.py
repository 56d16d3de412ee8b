"""What a run leaves behind: its window, its merges, what it logged."""

import hashlib
import json
import os
from pathlib import Path

import torch


def outcome(folder, module):
    """All that a run leaves behind, as primitives that hold no paths and no run id."""
    merges = Path(folder) / "merges"
    return {
        "window": window(merges),
        "emissions": {path.name: emission(path) for path in emissions(merges)},
        "latest": os.readlink(merges / "latest") if (merges / "latest").is_symlink() else None,
        "metrics": metrics(folder),
        "weights": {name: checksum_of(tensor) for name, tensor in module.state_dict().items()},
        "left over": leftovers(merges),
    }


def window(merges):
    """The manifest's records, and the checksum of every file beside it."""
    manifest = json.loads((merges / "window" / "manifest.json").read_text())
    files = {p.name: checksum(p) for p in sorted((merges / "window").glob("*.safetensors")) if p.is_file()}
    return {"snapshots": manifest["snapshots"], "layout": manifest["layout"], "files": files}


def emissions(merges):
    """The folders of the visible emissions, by name."""
    if not merges.is_dir():
        return []
    return sorted(p for p in merges.iterdir() if p.name.startswith("step=") and p.is_dir())


def emission(path):
    """The checksums of an emission's files, and what `merge.json` says but for the run's id."""
    record = json.loads((path / "merge.json").read_text())
    del record["run_id"]
    files = {p.name: checksum(p) for p in sorted(path.iterdir()) if p.name != "merge.json"}
    return {"record": record, "files": files}


def damage(merges):
    """What is wrong with the visible emissions: nothing, if what is visible is complete."""
    found = []
    for path in emissions(merges):
        try:
            content = emission(path)
        except (OSError, ValueError, KeyError) as error:
            found.append(f"{path.name}: {error!r}")
            continue
        weights = {name for name in content["files"] if name.endswith(".safetensors")}
        named = content["record"]["files"]
        if weights - named.keys() or any(content["files"].get(n) != named[n] for n in named):
            found.append(f"{path.name}: {content['files']} are not what merge.json says: {named}")
    latest = merges / "latest"
    if latest.is_symlink() and not (latest / "merge.json").is_file():
        found.append(f"latest points at {os.readlink(latest)}, which is not there")
    return found


def leftovers(merges):
    """Names under `merges` that nobody would miss."""
    found = [p.name for p in merges.iterdir() if p.name[0] == "." and p.name != ".lock"]
    return sorted(found + [p.name for p in (merges / "window").iterdir() if p.name[0] == "."])


def metrics(folder):
    """Every logged number by step and name. One that was logged with two values shows as a list."""
    found = {}
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        step, numbers = json.loads(line)
        for name, value in numbers.items():
            values = found.setdefault(f"{step} {name}", [])
            if value not in values:
                values.append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def checksum(path):
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def checksum_of(tensor):
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(
        tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()
