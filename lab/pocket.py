"""A LLaVA for two CPU cores, made from nothing: a large one's classes, 1.5 million weights.

    python -m lab.pocket --out runs/my-pocket   # under half an hour; checkpoints/pocket holds it
    python -m lab.pocket --task examples/gridworld.py:GridWorld --out runs/grid-pocket  # your own

Everything the 7B model goes through, it goes through: from_pretrained, 4 bits, LoRA, generate,
score, PPO. It learns in three lessons on pictures drawn on the fly: first to say what a picture
shows; then to answer in the games' format; last, shortly, with so many random action labels that
there is something left for RL to learn.
It reads these games' pictures and nothing else; no claim about the 7B model follows from it. For a
game of your own the lessons are shorter, and its class must have best_actions, reading, thoughts.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next import image_processing_pil_llava_next

from env import GAMES, check_game, make_game
from families import save_processor
from parse import make_answer
from plumbing.checkpoint import locked, put_in_place, unfinished
from plumbing.errors import ModelError, in_words
from plumbing.flags import add_flags
from plumbing.settings import Settings
from policy import Policy, load_model
from sft import Demonstration, demonstrations, finetune, mixed

# a picture becomes 5 × 5 image tokens
SIDE, PATCH = 120, 24

# Shares of random action labels in the second lesson and in the third, short one. The third's were
# set by trial so that RL starts at or somewhat above the paper's LLaVA-sft row (25, 23, 3, 23 %);
# measured at temperature 0.5: NumberLine 27 %, EZPoints 26, Points24 6, Blackjack 32.
NOISE = {
    "numberline": (1.0, 1.0), "ezpoints": (0.45, 0.8), "points24": (0.25, 0.68),
    "blackjack": (0.8, 0.87)}
# Points24 has most to learn (a solution to each of its solvable deals) and comes three times
MORE = ("points24", "points24")
STEPS = (500, 4200, 300)        # of the three lessons
# of a game of your own
OWN_NOISE, OWN_STEPS = (0.3, 0.8), (300, 1200, 100)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}\n{% endif %}{% endfor %}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>"
    "{% endif %}{% endfor %}")

# What the tokenizer never merges across. So picture, prompt and answer are some 45 to 80 tokens,
# half of what one a word would be; "10" is one token wherever it stands, and the action part begins
# at a token's start.
MARK = r"""(?:(?!"action)[.,:'"{} ])"""     # punctuation or a space, but not that before `action`
PIECES = Regex("|".join((
    r"\n(?:Actions|Answer)[^\n]*",          # a prompt's fixed line, whole
    '"action',
    # a phrase with the punctuation before it: `. I choose`
    MARK + "*(?:I|[A-Z]?[a-z]+)(?: [a-z]+)*",
    " ?[A-Za-z]+", " ?[0-9]+",              # a card, a number
    r""" ?[^A-Za-z0-9.,:'"{} ]""",          # an operator
    MARK + "+",                             # other punctuation: `": "`
    ".")))


# ---- the model, before its lessons -------------------------------------------------------------
def game_texts(tasks=GAMES, seed=0, samples=1500, game_options=None):
    """The games' own prompts and answers."""
    texts = []
    for task, cot in itertools.product(tasks, (True, False)):
        played = itertools.islice(demonstrations(task, seed, 0.5, cot, game_options), samples)
        read = itertools.islice(captions(task, seed, game_options), samples // 5)
        for demonstration in itertools.chain(played, read):
            texts += [demonstration.prompt, demonstration.answer]
    return texts


def make_tokenizer(texts, vocabulary=640, pieces=PIECES):
    """Train a byte-level BPE of at most so many tokens on texts.

    No token reaches across `pieces`. The same texts give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token in ("<pad>", "<s>", "</s>", "<image>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"})


def make_processor(tokenizer, side=SIDE, patch=PATCH, chat_template=CHAT_TEMPLATE):
    """A LLaVA-NeXT's processor for pictures of side × side pixels."""
    images = image_processing_pil_llava_next.LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_grid_pinpoints=[[side, side]])
    return LlavaNextProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        chat_template=chat_template, num_additional_image_tokens=1)


def llava_config(vision, text, tokenizer, vision_feature_layer, tied=False):
    """The configuration of a LLaVA-NeXT of a vision tower and a language model."""
    return LlavaNextConfig(
        vision_config=vision, text_config=text, vision_feature_layer=vision_feature_layer,
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=[[vision.image_size, vision.image_size]],
        vision_feature_select_strategy="default", tie_word_embeddings=tied)


def make_model(processor, seed=0, hidden=128, heads=4, vision_layers=3, text_layers=2):
    """A LLaVA-NeXT with seeded random weights that fits the processor."""
    tokenizer = processor.tokenizer
    # Transformers' 0.02 leaves so small a model at chance for thousands of steps; 0.08 starts to
    # read at once.
    shared = {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": heads,
        "initializer_range": 0.08}
    vision = CLIPVisionConfig(
        num_hidden_layers=vision_layers, image_size=SIDE, patch_size=PATCH, projection_dim=hidden,
        **shared)
    text = MistralConfig(
        vocab_size=len(tokenizer), num_hidden_layers=text_layers, num_key_value_heads=heads,
        max_position_embeddings=1024, sliding_window=None, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **shared)
    config = llava_config(vision, text, tokenizer, vision_feature_layer=-1)
    config.initializer_range = 0.08
    # transformers draws weights from the global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaNextForConditionalGeneration(config)


# ---- its lessons -------------------------------------------------------------------------------
def captions(task, seed, game_options=None):
    """Yield Demonstrations that only say what the picture shows: the first lesson."""
    game = make_game(task, **(game_options or {}))
    generator = np.random.default_rng([seed, len(type(game).__name__)])
    picture, info = game.reset(seed=seed)
    while True:
        yield Demonstration(picture, "Read the picture.", make_answer(game.reading(info)))
        action = generator.integers(len(game.legal_actions()))
        picture, _, terminated, truncated, info = game.step(action)
        if terminated or truncated:
            picture, info = game.reset()


def answers(tasks, shares, seed, streams=16, game_options=None):
    """Sources of answers to games, one stream in eight without thoughts.

    Many streams a game keep the deals in a batch different. shares: {task: share of random labels}.
    """
    return [
        demonstrations(task, seed + i, shares[task], i % 8 > 0, game_options)
        for i in range(streams) for task in tasks]


def teach(out, model, processor, seed, first, second, last):
    """Teach a model its three lessons and write it to the folder `out` (fp16).

    Each lesson: (batches of Demonstrations, steps).
    """
    policy = Policy(model, processor, target_modules=(), seed=seed)
    finetune(policy, *first, 1e-3, title="reading")
    finetune(policy, *second, 1e-3, title="answering")
    # the folder appears after the last lesson, whole
    part = unfinished(out)
    policy.model.half().save_pretrained(part)
    save_processor(processor, part)
    # subtle: the last one goes on from the fp16 weights on disk
    policy = Policy(*load_model(str(part)), target_modules=(), seed=seed)
    finetune(policy, *last, 5e-4, title="settling")
    policy.model.half().save_pretrained(part)
    put_in_place(out)


def build(out, seed=0, steps=STEPS, noise=NOISE, more=MORE, game_options=None):
    """Make the pocket model and teach it three lessons of so many steps.

    noise: {task: shares of random action labels in the second lesson and the third}; more: tasks
    that come oftener in these.
    """
    processor = make_processor(make_tokenizer(game_texts(noise, seed, game_options=game_options)))
    reads = [captions(task, seed + i, game_options) for i in range(16) for task in noise]
    early, late = ({task: shares[k] for task, shares in noise.items()} for k in (0, 1))
    first, last = (
        answers((*noise, *more), shares, start, game_options=game_options)
        for shares, start in ((early, seed), (late, seed + 1000)))
    # subtle: the first two lessons draw from one generator, in turn
    generator, later = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    lessons = mixed(reads, 64, generator), mixed(first, 64, generator), mixed(last, 64, later)
    teach(out, make_model(processor, seed), processor, seed, *zip(lessons, steps))


# ---- the command line --------------------------------------------------------------------------
def bare_parser(description):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", required=True, help="folder for the model, in Hugging Face's layout")
    return parser


def make_parser():
    parser = bare_parser(__doc__)
    parser.add_argument("--task", help="a game of your own, my_game.py:CLASS [the card games]")
    add_flags(parser, Settings, ("game",))
    return parser


def finish(options, task, build, **more):
    """Build a model in options.out; pocket_alfworld.py's too."""
    if Path(options.out).exists():
        raise ModelError(f"{options.out} is there already: choose another --out")
    begun = time.perf_counter()
    with locked(unfinished(options.out)):       # two builds in one folder would spoil each other
        build(options.out, **more)
        (Path(options.out) / "run.lock").unlink()
    print(f"{options.out} in {time.perf_counter() - begun:.0f} s; try: python eval.py --task "
          f"{task} --model {options.out}")


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    task = options.task
    with in_words():
        if not task:
            return finish(options, "blackjack", build)
        needs = ("best_actions", "reading", "thoughts")
        own = check_game(task, getattr(options, "game", ()), needs)
        finish(options, task, build, steps=OWN_STEPS, noise={task: OWN_NOISE}, more=(),
               game_options=own)


if __name__ == "__main__":
    main()
