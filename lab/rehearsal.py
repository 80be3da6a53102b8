"""A dress rehearsal of LLaVA-1.6-Mistral-7B on any machine: random weights, the real commands.

    python -m lab.rehearsal                     # true width, 2 of 32 layers: 12 minutes, 4 GB
    python -m lab.rehearsal --full              # all layers: 14 GB on disk ($TMPDIR); for a GPU

Writes a checkpoint in the hub's own layout (its key names, its configuration's form, shards with an
index, Mistral's real tokenizer) and takes it in 4 bits through supervised fine-tuning, RL, a kill
and its resumption, and evaluation, each in a process of its own. The last line is one JSON object:
seconds and memory by stage, ratio_error, parse rate, whether the killed run ended as the one that
was left alone. Nothing is downloaded, nothing is learned.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlavaNextForConditionalGeneration

import eval as evaluation
import sft
import train
from lab.bench import GIB, bare_parser, best_device, finish, machine, peak_memory, timed
from lab.shapes import mistral_processor
from plumbing.checkpoint import newest_checkpoint

SHARD = 4 * GIB                 # bytes of a file, about
STAGES = {"sft": sft.main, "train": train.main, "eval": evaluation.main}

# the names that published checkpoints of LLaVA-NeXT have, by transformers' present ones
OLD_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^model\.", ""))

# the hub's own config.json, without what later versions of transformers added
HUB_CONFIG = """{
 "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
 "torch_dtype": "float16", "image_token_index": 32000, "vision_feature_layer": -2,
 "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]], "tie_word_embeddings": false,
 "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
 "text_config": {
  "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32064,
  "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
  "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null},
 "vision_config": {
  "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336,
  "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
  "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}
}"""


# ---- a checkpoint as the hub has it ------------------------------------------------------------
def write_checkpoint(folder, full):
    """Write random fp16 weights of the 7B model's shape in the hub's layout; return their bytes."""
    mistral_processor().save_pretrained(folder)
    config = json.loads(HUB_CONFIG)
    if not full:
        config["text_config"]["num_hidden_layers"] = 2
        config["vision_config"]["num_hidden_layers"] = 3
    write_json(folder / "config.json", config)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        tensors = LlavaNextForConditionalGeneration(config).state_dict()

    # which file each weight lies in
    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = f"model-{1 + size // SHARD:05d}.safetensors"
        size += 2 * tensor.numel()
    generator = torch.Generator(best_device()).manual_seed(0)
    for file in sorted(set(files.values())):
        shard = {
            old_name(name): random_weight(name, tensors[name].shape, generator)
            for name in tensors if files[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {
        "metadata": {"total_size": size},
        "weight_map": {old_name(name): file for name, file in files.items()}})
    return size


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def old_name(name):
    """The published name of a weight.

    >>> old_name("model.language_model.layers.0.mlp.up_proj.weight")
    'language_model.model.layers.0.mlp.up_proj.weight'
    """
    for pattern, old in OLD_NAMES:
        if re.search(pattern, name):
            return re.sub(pattern, old, name)
    return name


def random_weight(name, shape, generator):
    """fp16: a norm's weights 1, the others small."""
    if re.search(r"norm\w*\.weight$", name):
        return torch.ones(shape, dtype=torch.float16)
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    return (0.02 * drawn).half().cpu()


# ---- the rehearsal -----------------------------------------------------------------------------
def run_stage(name, arguments, stop_at=None):
    """Run a stage in a process of its own; return its seconds and peak memory.

    stop_at: a path; the process is killed once it is there.
    """
    begun = time.perf_counter()
    command = [sys.executable, "-m", "lab.rehearsal", "--stage", name, *map(str, arguments)]
    print("+", *command[4:], flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while stop_at and not stop_at.exists() and process.poll() is None:
            time.sleep(0.1)
        if stop_at:
            process.kill()
        printed = process.communicate()[0]
    if process.returncode != (-9 if stop_at else 0):
        sys.exit(f"{name} failed:\n{printed[-2000:]}")
    found = {"killed": True} if stop_at else json.loads(printed.splitlines()[-1])
    return {"wall_s": round(time.perf_counter() - begun, 1)} | found


def rehearse(folder, full):
    """The whole of it in an empty folder; return the figures."""
    model, alone, killed = folder / "llava-7b", folder / "alone", folder / "killed"
    model.mkdir()
    device = best_device()
    size, seconds = timed(device, write_checkpoint, model, full)
    game = ["--task", "blackjack"]
    lessons = "--bits 4 --steps 2 --batch-size 2".split()
    small = ("--bits 4 --num-envs 2 --num-steps 1 --total-timesteps 4 --update-epochs 2 "
             "--minibatch-size 2 --micro-batch-size 2 --max-new-tokens 16 --eval-episodes 0")
    rl = [*game, "--model", folder / "sft", *small.split(), "--out"]
    stages = {
        "sft": run_stage("sft", [*game, "--model", model, *lessons, "--out", folder / "sft"]),
        "train": run_stage("train", [*rl, alone]),
        "train, killed after its first update":
            run_stage("train", [*rl, killed], stop_at=killed / "checkpoint-000001"),
        "resume": run_stage("train", [*rl, killed, "--resume"]),
        "eval": run_stage("eval", [*game, "--run", killed, "--episodes", 2])}
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    kept = sum(file.stat().st_size for file in newest_checkpoint(alone).iterdir())
    same = all(
        (alone / name).read_bytes() == (killed / name).read_bytes()
        for name in ("metrics.jsonl", "transcripts.jsonl"))
    return {
        "shape": "32 layers" if full else "2 of 32 layers", "bits": 4, **machine(device),
        "weights_gib": size / GIB, "written_s": round(seconds, 1), "stages": stages,
        "checkpoint_gib": kept / GIB,
        **{key: [row[key] for row in rows]
           for key in ("ratio_error", "parse_rate", "response_tokens")},
        "resumed_is_the_run_left_alone": same}


def make_parser():
    parser = bare_parser(__doc__)
    parser.add_argument(
        "--full", action="store_true", help="all 32 layers, and the vision tower's 24")
    return parser


def main(arguments=None):
    arguments = arguments or sys.argv[1:]
    if arguments[:1] == ["--stage"]:
        STAGES[arguments[1]](arguments[2:])
        print(json.dumps({"peak_memory_gib": peak_memory(best_device())}))
        return
    options = make_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        finish(rehearse(Path(folder), options.full), options.out)


if __name__ == "__main__":
    main()
