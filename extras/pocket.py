"""A LLaVA for two CPU cores, made from nothing: same classes, same folder layout, 1.5 million parameters.

    python -m extras.pocket --out runs/my-pocket       # under half an hour; checkpoints/pocket holds the result
    python -m extras.pocket --family qwen3_vl --out runs/pocket-qwen3         # the same lessons for another family

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
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from env import GAMES
from games.expert import reading
from parse import make_answer
from plumbing.checkpoint import part_of, put_in_place
from policy import Policy
from sft import Demonstration, demonstrations, finetune, mixed
from vlm.families import save_processor, without_video
from vlm.loading import load_model

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


def game_texts(seed=0, samples=1500):
    """The card games' own prompts and answers."""
    texts = []
    for task, cot in itertools.product(GAMES, (True, False)):
        texts += [text for d in itertools.islice(demonstrations(task, seed, 0.5, cot), samples)
                  for text in (d.prompt, d.answer)]
        texts += [text for d in itertools.islice(captions(task, seed), samples // 5) for text in (d.prompt, d.answer)]
    return texts


def make_tokenizer(texts, vocabulary=640, pieces=PIECES, image=("<image>",), **named):
    """Train a byte-level BPE on texts: at most so many tokens, none across `pieces`; the same for the same texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in ("<pad>", "<s>", "</s>", *image)]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   extra_special_tokens={"image_token": image[0]} | named)


def make_processor(tokenizer, side=SIDE, patch=PATCH, chat_template=CHAT_TEMPLATE):
    """A LLaVA-NeXT's processor for pictures of side × side pixels."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=[[side, side]])
    return LlavaNextProcessor(images, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
                              chat_template=chat_template, num_additional_image_tokens=1)


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


def llava_next(seed=0):
    """(model, processor) of the pocket LLaVA, before its lessons."""
    processor = make_processor(make_tokenizer(game_texts(seed)))
    return make_model(processor, seed), processor


def qwen3_vl(seed=0, patch=15, vision_hidden=96):
    """The same for a Qwen3-VL of as many weights: M-RoPE, four patches a token, a deeper vision layer seen as well."""
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = make_tokenizer(game_texts(seed), image=special)
    images = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2,
                                      size={"shortest_edge": SIDE ** 2, "longest_edge": SIDE ** 2})
    processor = without_video(Qwen3VLProcessor)(
        image_processor=images, tokenizer=tokenizer, video_processor=None,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"))
    ids = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                   tokenizer.convert_tokens_to_ids(special)))
    config = Qwen3VLConfig(
        text_config={"vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN,
                     "num_hidden_layers": TEXT_LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
                     "head_dim": HIDDEN // HEADS, "max_position_embeddings": 1024, "initializer_range": 0.08,
                     "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
                     "eos_token_id": tokenizer.eos_token_id,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5],
                                         "mrope_interleaved": True}},
        vision_config={"depth": VISION_LAYERS, "hidden_size": vision_hidden, "intermediate_size": 4 * vision_hidden,
                       "num_heads": HEADS, "patch_size": patch, "out_hidden_size": HIDDEN,
                       "num_position_embeddings": (SIDE // patch) ** 2, "deepstack_visual_indexes": [1],
                       "initializer_range": 0.08},
        initializer_range=0.08, tie_word_embeddings=False, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config), processor


FAMILIES = {"llava_next": llava_next, "qwen3_vl": qwen3_vl}


# ---- its lessons ----------------------------------------------------------------------------------------------------
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


def build(out, seed=0, steps=(500, 4200, 300), batch=64, streams=16, family="llava_next"):
    """Make the pocket model, teach it three lessons of so many steps, write it to the folder `out` (fp16: 3 MB)."""
    model, processor = FAMILIES[family](seed)
    policy = Policy(model, processor, target_modules=(), seed=seed)
    generator = np.random.default_rng(seed)
    reads = [captions(task, seed + i) for i in range(streams) for task in GAMES]
    finetune(policy, mixed(reads, batch, generator), steps[0], 1e-3, title="reading")
    finetune(policy, mixed(answers(EARLY_NOISE, seed, streams), batch, generator), steps[1], 1e-3, title="answering")
    part = part_of(out)                                     # whole after the last lesson
    policy.model.half().save_pretrained(part)
    save_processor(processor, part)
    last_lesson(part, seed, steps[2], batch)
    put_in_place(out)


def last_lesson(out, seed, steps, batch=64):
    """Teach the model in the folder the start that RL is to have (LABEL_NOISE), from the fp16 weights on disk."""
    policy = Policy(*load_model(str(out)), target_modules=(), seed=seed)
    batches = mixed(answers(LABEL_NOISE, seed + 1000), batch, np.random.default_rng(seed + 1000))
    finetune(policy, batches, steps, 5e-4, title="settling")
    policy.model.half().save_pretrained(out)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the model, in Hugging Face's layout")
    parser.add_argument("--family", choices=FAMILIES, default="llava_next", help="which classes of model [llava_next]")
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
    build(options.out, options.seed, options.steps, family=options.family)
    print(f"{options.out} in {time.perf_counter() - begun:.0f} s; try: python eval.py --task blackjack "
          f"--model {options.out}")


if __name__ == "__main__":
    main()
