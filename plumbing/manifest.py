"""The manifest of a folder: a hash of each of its files, and of all else that its bits depend on.

    depends = {"base model": hashes("checkpoints/pocket")}
    write_manifest(folder, depends, settings)       # manifest.json, over all files that are there
    check(folder, depends, settings)                # ModelError says what is not as it was

What a folder depends on is {role: {file: hash}}. The roles are "base model", "start adapters" (that
a run starts from) and "run folder" (checkpoint.py). Guards against damage and mix-ups, not an
enemy who writes a manifest too. Does not handle: when that is done (checkpoint.py, sft.py,
loading.py).
"""

import ast
import hashlib
import inspect
import json
import os
import platform
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
import transformers

import parallel
from env import find_game
from plumbing.errors import UNREADABLE, ModelError, as_model_error, lines_of

ROOT = Path(__file__).parent.parent
METHOD = (
    "env.py", "parse.py", "policy.py", "lora.py", "decode.py", "families.py", "ppo.py",
    "rollout.py", "train.py", "sft.py", "imitation.py", "groups.py", "parallel.py", "games/*.py",
    "plumbing/adapters.py", "plumbing/loading.py")
# what is read of a model's folder, or of adapters', beside the weights
READ = (
    "config.json", "generation_config.json", "adapter_config.json", "preprocessor_config.json",
    "processor_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja")
WHOLE = 64 * 2**20      # weights' files up to this size are hashed whole, larger ones at 64 places


def versions(settings):
    """What bits depend on beside the settings; "method" is what runs that are compared share."""
    return {
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "method": method_hash(),
        "threads": torch.get_num_threads(),
        "game": _game_hash(settings.task),
    }


@cache
def method_hash():
    """Of the syntax trees of the method's files: comments and docstrings move no bit.

    By one version of Python: another may build other trees.
    """
    found = hashlib.sha256()
    for file in (file for pattern in METHOD for file in sorted(ROOT.glob(pattern))):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if documented and ast.get_docstring(node) is not None:
                del node.body[0]
        found.update(f"{file.name} {ast.dump(tree)}".encode())
    return found.hexdigest()[:12]


@cache
def _game_hash(task):
    """Of the file that the game's class is in, as it was when it was first asked for.

    Of its package, where it has one (ALFWorld); not of what else it imports.
    """
    file = Path(inspect.getfile(find_game(task)))
    package = sorted(file.parent.glob("*.py")) if (file.parent / "__init__.py").exists() else ()
    found = hashlib.sha256("".join(map(_digest, package or [file])).encode())
    return found.hexdigest()[:12]


def plain(settings):
    """Settings as they come back from JSON, without what may change when a run is resumed."""
    stored = json.loads(json.dumps(asdict(settings)))
    return {name: value for name, value in stored.items() if name not in settings.changeable}


def write_manifest(folder, depends, settings):
    """Write manifest.json over all files of a folder, or of the part that will be it."""
    os.umask(umask := os.umask(0))      # the only way to read it is to set it, twice
    files = {
        file.name: _digest(file) for file in sorted(Path(folder).iterdir())
        if file.name != "manifest.json"}
    for name in files:                  # safetensors makes its files the owner's alone
        (Path(folder) / name).chmod(0o666 & ~umask)
    manifest = {
        "folder": Path(folder).name.removesuffix(".part"), "files": files, "depends": depends,
        "settings": plain(settings), "versions": versions(settings),
    }
    manifest["self"] = _digest_of(manifest)
    (Path(folder) / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def check(folder, depends=None, settings=None):
    """Hold a folder against its manifest; ModelError says what is not as it was. Returns what the
    folder depends on.

    depends: those roles that can be looked at now; settings: of the run that would go on. Other
    versions are a warning.
    """
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        if manifest.pop("self") != _digest_of(manifest):
            raise ValueError("it is not as it was written")
        if "depends" not in manifest:
            raise ValueError("it is an earlier version's")
        files, was = manifest["files"], manifest["versions"]
    except UNREADABLE as error:
        raise ModelError(
            f"{folder} has no manifest that can be read, so it is not taken: {error}") from error
    for name, digest in files.items():
        file = Path(folder) / name
        if not file.exists() or _digest(file) != digest:
            what = "not as it was written: damaged or edited" if file.exists() else "missing"
            raise ModelError(
                f"{file} is {what}; nothing was changed: put back a copy, or start a new run "
                "(--out)")
    for role, now in (depends or {}).items():
        then = manifest["depends"].get(role, {})
        if other := sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
            raise ModelError(
                f"{folder} was written for other files of its {role} than are there now "
                f"({', '.join(other)}); nothing was changed: put back what was there, or start a "
                "new run (--out)")
    if settings is None:
        return manifest["depends"]
    if manifest["folder"] != Path(folder).name:
        raise ModelError(
            f"{folder} was written as {manifest['folder']}, whose place in the run it has: give it "
            "back its name")
    mine, theirs = plain(settings), manifest["settings"]
    if other := sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)):
        said = ", ".join(f"{name} {theirs.get(name)}, not {mine.get(name)}" for name in other)
        raise ModelError(f"{folder} is another run's: it has {said}")
    changed = [
        f"{name} {was.get(name)} → {now}" for name, now in versions(settings).items()
        if was.get(name) != now]
    if changed and parallel.rank() == 0:
        said = (f"note: since {Path(folder).name} was written these have changed, so bits may "
                f"differ from a run left alone: {', '.join(changed)}")
        print(lines_of(said), file=sys.stderr)
    return manifest["depends"]


def _digest(path):
    with as_model_error(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(manifest):
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def hashes(folder) -> dict[str, str]:
    """{file: hash} of all that is read of a model's folder, or of a folder of adapters.

    Of large files of weights the hash is of the size and of 64 places of 64 KiB.
    """
    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    names = {*READ, "model.safetensors", "adapter_model.safetensors"}
    with as_model_error(index):
        if index.exists():
            names |= set(json.loads(index.read_text())["weight_map"].values())
    if not (folder / "tokenizer.json").exists():
        names.add("tokenizer.model")            # read only where there is no tokenizer.json
    found = {}
    for path in sorted(folder / name for name in names if (folder / name).exists()):
        size = path.stat().st_size
        if size <= WHOLE:
            found[path.name] = _digest(path)
            continue
        some = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            for offset in range(0, size, size // 64):
                file.seek(offset)
                some.update(file.read(2**16))
        found[path.name] = some.hexdigest()
    return found
