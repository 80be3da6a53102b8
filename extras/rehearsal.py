"""A dress rehearsal of LLaVA-1.6-Mistral-7B on whatever machine this is: random weights, the real commands.

    python -m extras.rehearsal                              # true width, 2 of 32 layers: minutes on two cores, 2 GB
    python -m extras.rehearsal --full                       # all layers: 14 GB on disk; for a GPU

Writes a checkpoint in the hub's own layout (its key names, its configuration's form, shards with an index, Mistral's
real tokenizer) and takes it in 4 bits through supervised fine-tuning, RL, a kill and its resumption, and evaluation,
each in a process of its own. The last line is one JSON object: seconds and memory by stage, ratio_error, parse rate,
whether the killed run ended as the one that was left alone. Nothing is downloaded, nothing is learned.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlavaNextForConditionalGeneration

import eval as evaluation
import sft
import train
from extras.machine import machine, peak_memory
from extras.shapes import llava_7b_config, mistral_processor
from plumbing.checkpoint import checkpoints

SHARD = 4 * 2**30               # bytes of a file, about
# the names that published checkpoints of LLaVA-NeXT have, by transformers' present ones
OLD_NAMES = ((r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."),
             (r"^model\.vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."), (r"^model\.", ""))
STAGES = {"sft": sft.main, "train": train.main, "eval": evaluation.main}


def write_checkpoint(folder, full):
    """Write random fp16 weights of the 7B model's shape in the hub's layout; return their bytes."""
    processor = mistral_processor()
    processor.save_pretrained(folder)
    config = llava_7b_config(processor)
    if not full:
        config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 2, 3
    text, vision = config.text_config, config.vision_config
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "torch_dtype": "float16",
        "image_token_index": config.image_token_id, "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]],
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "tie_word_embeddings": False, "text_config": {
            "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0, "sliding_window": None},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": vision.hidden_size, "image_size": vision.image_size,
            "intermediate_size": vision.intermediate_size, "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers, "patch_size": vision.patch_size,
            "projection_dim": vision.projection_dim, "vocab_size": 32000}}, indent=1) + "\n")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlavaNextForConditionalGeneration(config).state_dict().items()}
    shards, held = [[]], 0
    for name, shape in shapes.items():
        if held > SHARD:
            shards, held = [*shards, []], 0
        shards[-1].append(name)
        held += 2 * shape.numel()
    generator, index = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0), {}
    for k, names in enumerate(shards, 1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        save_file({old_name(name): random_weight(name, shapes[name], generator) for name in names}, folder / file,
                  metadata={"format": "pt"})
        index |= {old_name(name): file for name in names}
    size = 2 * sum(shape.numel() for shape in shapes.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1) + "\n")
    return size


def old_name(name):
    """
    >>> old_name("model.language_model.layers.0.mlp.up_proj.weight"), old_name("model.image_newline")
    ('language_model.model.layers.0.mlp.up_proj.weight', 'image_newline')
    """
    for pattern, old in OLD_NAMES:
        if re.search(pattern, name):
            return re.sub(pattern, old, name)
    return name


def random_weight(name, shape, generator):
    """fp16: a norm's weights 1, the others small."""
    if re.search(r"norm\w*\.weight$", name):
        return torch.ones(shape, dtype=torch.float16)
    return (0.02 * torch.randn(shape, generator=generator, device=generator.device)).half().cpu()


def run_stage(name, arguments, stop=None):
    """Run a stage in a process of its own; return its seconds and peak memory. stop: kills it once it returns True."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "extras.rehearsal", "--stage", name, *map(str, arguments)]
    print("+", name, *arguments, flush=True)
    killed = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while stop and not killed and process.poll() is None:
            if killed := stop():
                process.send_signal(signal.SIGKILL)
            time.sleep(0.1)
        printed = process.communicate()[0]
    if process.returncode != (-signal.SIGKILL if stop else 0):
        sys.exit(f"{name} failed:\n{printed[-2000:]}")
    found = {"wall_s": round(time.perf_counter() - begun, 1)}
    return found | (json.loads(printed.splitlines()[-1]) if process.returncode == 0 else {"killed": True})


def rehearse(folder, full):
    """The whole of it in an empty folder; return the figures."""
    begun, model = time.perf_counter(), folder / "llava-v1.6-mistral-7b-hf"
    model.mkdir()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {"shape": "32 layers" if full else "2 of 32 layers", "bits": 4, **machine(device)}
    figures["weights_gib"] = write_checkpoint(model, full) / 2**30
    figures["written_s"] = round(time.perf_counter() - begun, 1)
    small = ["--num-envs", 2, "--num-steps", 1, "--total-timesteps", 4, "--update-epochs", 2, "--minibatch-size", 2,
             "--micro-batch-size", 2, "--max-new-tokens", 16, "--eval-episodes", 0]
    rl = ["--task", "blackjack", "--model", folder / "sft", "--bits", 4, *small]
    alone, killed = folder / "alone", folder / "killed"
    stages = figures["stages"] = {}
    stages["sft"] = run_stage("sft", ["--task", "blackjack", "--model", model, "--bits", 4, "--steps", 2,
                                      "--batch-size", 2, "--out", folder / "sft"])
    stages["train"] = run_stage("train", [*rl, "--out", alone])
    stages["train, killed after its first update"] = run_stage(
        "train", [*rl, "--out", killed], stop=lambda: (killed / "checkpoint-000001").exists())
    stages["resume"] = run_stage("train", [*rl, "--out", killed, "--resume"])
    stages["eval"] = run_stage("eval", ["--task", "blackjack", "--run", killed, "--episodes", 2])
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    figures["checkpoint_gib"] = sum(file.stat().st_size for file in checkpoints(alone)[-1].iterdir()) / 2**30
    figures |= {key: [row[key] for row in rows] for key in ("ratio_error", "parse_rate", "response_tokens")}
    figures["resumed_is_the_run_left_alone"] = all(
        (alone / name).read_bytes() == (killed / name).read_bytes() for name in ("metrics.jsonl", "transcripts.jsonl"))
    return figures


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--stage"]:
        STAGES[arguments[1]](arguments[2:])
        print(json.dumps(peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
        return
    options = make_parser().parse_args(arguments)
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="rehearsal-"))
    try:
        figures = rehearse(folder, options.full)
    finally:
        shutil.rmtree(folder)
    if options.out:
        Path(options.out).write_text(json.dumps(figures) + "\n")
    print(json.dumps(figures))


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all 32 layers, and the vision tower's 24")
    parser.add_argument("--folder", help="where the checkpoint and the runs may lie meanwhile [the system's temporary]")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


if __name__ == "__main__":
    main()
