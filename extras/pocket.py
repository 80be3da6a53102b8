"""A LLaVA for two CPU cores, made from nothing: same classes, same folder layout, 1.5 million parameters.

    python -m extras.pocket --out runs/my-pocket       # under half an hour; checkpoints/pocket holds the result

Everything the 7B model goes through, it goes through: from_pretrained, 4 bits, LoRA, generate, score, PPO. It learns
in three lessons on pictures drawn on the fly: first to say what a picture shows; then to answer in the games' format;
last, shortly, with so many random action labels that there is something left for RL to learn.
It reads these games' pictures and nothing else; no claim about the 7B model follows from it.
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
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from env import GAMES
from games.expert import reading
from loading import load_model
from parse import make_answer
from policy import Policy
from sft import Demonstration, demonstrations, finetune, mixed

SIDE, PATCH = 120, 24                       # a picture becomes 5 × 5 image tokens
HIDDEN, HEADS, VISION_LAYERS, TEXT_LAYERS = 128, 4, 3, 2
# Share of random action labels by game. The second lesson is taught with EARLY_NOISE; the third, short, with
# LABEL_NOISE, set by trial so that RL starts at or somewhat above the paper's LLaVA-sft row (25, 23, 3, 23 %); measured
# at temperature 0.5: NumberLine 27 %, EZPoints 26, Points24 6, Blackjack 32.
EARLY_NOISE = {"numberline": 1.0, "ezpoints": 0.45, "points24": 0.25, "blackjack": 0.8}
LABEL_NOISE = {"numberline": 1.0, "ezpoints": 0.8, "points24": 0.68, "blackjack": 0.87}

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}\n{% endif %}{% endfor %}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}{% endfor %}")
# What the tokenizer never merges across. So picture, prompt and answer are some 45 to 80 tokens, half of what one a
# word would be; "10" is one token wherever it stands, and the action part begins at a token's start.
MARK = r"""(?:(?!"action)[.,:'"{} ])"""                    # punctuation or a space, but not that before `action`
PIECES = Regex("|".join((
    r"\n(?:Actions|Answer)[^\n]*",                       # a prompt's fixed line, whole
    '"action',
    MARK + "*(?:I|[A-Z]?[a-z]+)(?: [a-z]+)*",            # a phrase with the punctuation before it: `. I choose`
    " ?[A-Za-z]+", " ?[0-9]+",                           # a card, a number
    r""" ?[^A-Za-z0-9.,:'"{} ]""",                       # an operator
    MARK + "+",                                          # other punctuation: `": "`
    ".")))


def make_tokenizer(seed=0, vocabulary=640):
    """Train a byte-level BPE on the games' own prompts and answers: at most so many tokens, the same for a seed."""
    texts = []
    for task, cot in itertools.product(GAMES, (True, False)):
        texts += [text for d in itertools.islice(demonstrations(task, seed, 0.5, cot), 1500)
                  for text in (d.prompt, d.answer)]
        texts += [text for d in itertools.islice(captions(task, seed), 300) for text in (d.prompt, d.answer)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in ("<pad>", "<s>", "</s>", "<image>")]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   extra_special_tokens={"image_token": "<image>"})


def make_processor(seed=0, side=SIDE, patch=PATCH, vocabulary=640):
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=[[side, side]])
    return LlavaNextProcessor(images, make_tokenizer(seed, vocabulary), patch_size=patch,
                              vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
                              num_additional_image_tokens=1)


def make_model(processor, seed=0, hidden=HIDDEN, heads=HEADS, vision_layers=VISION_LAYERS, text_layers=TEXT_LAYERS):
    """A LlavaNextForConditionalGeneration with seeded random weights that fits the processor."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=vision_layers,
                              num_attention_heads=heads, image_size=SIDE, patch_size=PATCH, projection_dim=hidden)
    text = MistralConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden,
                         num_hidden_layers=text_layers, num_attention_heads=heads, num_key_value_heads=heads,
                         max_position_embeddings=1024, sliding_window=None, pad_token_id=tokenizer.pad_token_id,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = LlavaNextConfig(vision_config=vision, text_config=text,
                             image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                             image_grid_pinpoints=[[SIDE, SIDE]], vision_feature_layer=-1,
                             vision_feature_select_strategy="default", tie_word_embeddings=False)
    # Transformers' 0.02 leaves so small a model at chance for thousands of steps; 0.08 starts to read at once.
    for part in (config, vision, text):
        part.initializer_range = 0.08
    with torch.random.fork_rng(devices=[]):             # transformers draws weights from the global generator
        torch.manual_seed(seed)
        return LlavaNextForConditionalGeneration(config)


def captions(task, seed):
    """Yield Demonstrations that only say what the picture shows: the first lesson."""
    game, generator = GAMES[task](), np.random.default_rng([seed, len(task)])
    picture, info = game.reset(seed=seed)
    while True:
        yield Demonstration(picture, "Read the picture.", make_answer(reading(task, info)))
        picture, _, terminated, truncated, info = game.step(generator.integers(len(game.legal_actions())))
        if terminated or truncated:
            picture, info = game.reset()


def answers(noise, seed, streams=16):
    """Sources of answers of all games, one stream in eight without thoughts.

    Many streams a game keep the deals in a batch different; Points24 has most to learn (a solution to each of its
    solvable deals) and comes three times.
    """
    return [demonstrations(task, seed + i, noise[task], cot=i % 8 > 0)
            for i in range(streams) for task in (*GAMES, "points24", "points24")]


def build(out, seed=0, steps=(500, 4200, 300), batch=64, streams=16):
    """Make the pocket model, teach it three lessons of so many steps, write it to the folder `out` (fp16: 3 MB)."""
    processor = make_processor(seed)
    policy = Policy(make_model(processor, seed), processor, target_modules=(), seed=seed)
    generator = np.random.default_rng(seed)
    reads = [captions(task, seed + i) for i in range(streams) for task in GAMES]
    finetune(policy, mixed(reads, batch, generator), steps[0], 1e-3, title="reading")
    finetune(policy, mixed(answers(EARLY_NOISE, seed, streams), batch, generator), steps[1], 1e-3, title="answering")
    policy.model.half().save_pretrained(out)
    processor.save_pretrained(out)
    last_lesson(out, seed, steps[2], batch)


def last_lesson(out, seed, steps, batch=64):
    """Teach the model in the folder the start that RL is to have (LABEL_NOISE), from the fp16 weights on disk."""
    policy = Policy(*load_model(str(out)), target_modules=(), seed=seed)
    batches = mixed(answers(LABEL_NOISE, seed + 1000), batch, np.random.default_rng(seed + 1000))
    finetune(policy, batches, steps, 5e-4, title="settling")
    policy.model.half().save_pretrained(out)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the model, in Hugging Face's layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, default=(500, 4200, 300), metavar=("READ", "ANSWER", "SETTLE"),
                        help="steps of the three lessons [500 4200 300]")
    return parser


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    if Path(options.out).exists() and (Path(options.out).is_file() or any(Path(options.out).iterdir())):
        parser.error(f"{options.out} is not empty: choose another --out")
    if options.seed < 0 or min(options.steps) < 1:
        parser.error("--seed must not be negative, --steps 1 or more")
    begun = time.perf_counter()
    build(options.out, options.seed, options.steps)
    print(f"{options.out} in {time.perf_counter() - begun:.0f} s; try: python eval.py --task blackjack "
          f"--model {options.out}")


if __name__ == "__main__":
    main()
