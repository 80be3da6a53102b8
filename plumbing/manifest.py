"""The manifest of a folder: a hash of each of its files, and all else that its bits depend on.

    write_manifest(folder, base_hash, settings)     # manifest.json, over all files that are there
    check(folder, base_hash, settings)              # ModelError says what is not as it was

Guards against damage and mix-ups, not against an enemy who writes a manifest too. Does not handle:
when that is done (checkpoint.py, sft.py, loading.py).
"""

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

import parallel
from plumbing.errors import ModelError, as_model_error

ROOT = Path(__file__).parent.parent
CODE = ("*.py", "games/*.py", "games/alfworld/*.py", "plumbing/*.py")
NO_CODE = ("test_all.py", "conftest.py")
WHOLE = 64 * 2**20      # weights' files up to this size are hashed whole, larger ones at 64 places


def versions():
    """What bits depend on beside the settings."""
    files = [file for pattern in CODE for file in sorted(ROOT.glob(pattern))]
    code = hashlib.sha256(
        b"".join(file.read_bytes() for file in files if file.name not in NO_CODE))
    return {
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "code": code.hexdigest()[:12],
        "threads": torch.get_num_threads(),
    }


def plain(settings):
    """Settings as they come back from JSON, without what may change when a run is resumed."""
    stored = json.loads(json.dumps(asdict(settings)))
    return {name: value for name, value in stored.items() if name not in settings.changeable}


def write_manifest(folder, base_hash, settings=None):
    """Write manifest.json over all files of a folder."""
    os.umask(umask := os.umask(0))
    files = {
        file.name: _digest(file) for file in sorted(Path(folder).iterdir())
        if file.name != "manifest.json"}
    for name in files:                  # safetensors makes its files the owner's alone
        (Path(folder) / name).chmod(0o666 & ~umask)
    manifest = {
        "files": files, "base": base_hash, "settings": settings and plain(settings),
        "versions": versions(),
    }
    manifest["self"] = _digest_of(manifest)
    (Path(folder) / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def check(folder, base_hash=None, settings=None):
    """Hold a folder against its manifest; ModelError says what is not as it was.

    base_hash: of the base model as it is now; settings: of the run that would go on. Other versions
    are a warning.
    """
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        files, was = dict(manifest["files"]), dict(manifest["versions"])
        if manifest.pop("self") != _digest_of(manifest):
            raise ValueError("it is not as it was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} has no manifest that can be read, so it is not taken: {error}") from error
    for name, digest in files.items():
        file = Path(folder) / name
        if not file.exists() or _digest(file) != digest:
            what = "not as it was written: damaged or edited" if file.exists() else "missing"
            raise ModelError(
                f"{file} is {what}; nothing was changed: put back a copy, or start a new run "
                "(--out)")
    if base_hash and manifest["base"] != base_hash:
        raise ModelError(
            f"{folder} was made for other weights than its base model's now: they have changed "
            "since")
    if settings is None:
        return
    mine, theirs = plain(settings), manifest["settings"] or {}
    if other := sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)):
        said = ", ".join(f"{name} {theirs.get(name)}, not {mine.get(name)}" for name in other)
        raise ModelError(f"{folder} is another run's: it has {said}")
    changed = [
        f"{name} {was.get(name)} → {now}" for name, now in versions().items()
        if was.get(name) != now]
    if changed and parallel.rank() == 0:
        print(f"note: since {Path(folder).name} was written these have changed, so bits may differ "
              f"from a run left alone: {', '.join(changed)}", file=sys.stderr)


def _digest(path):
    with as_model_error(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(manifest):
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def weights_hash(folder) -> str:
    """A hash that changes with a model folder's weights.

    Of small files whole, of large ones the size, the header and 64 places of 64 KiB.
    """
    found, index = hashlib.sha256(), Path(folder) / "model.safetensors.index.json"
    names = {"model.safetensors"}
    with as_model_error(index):
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
    for path in sorted(Path(folder) / name for name in names if (Path(folder) / name).exists()):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            if size <= WHOLE:
                found.update(file.read())
                continue
            for place in range(0, size, size // 64):
                file.seek(place)
                found.update(file.read(2**16))
    return found.hexdigest()
