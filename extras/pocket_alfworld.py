"""A pocket LLaVA for ALFWorld: extras/pocket.py's recipe with longer prompts, four text layers and words for tokens.

    python -m extras.pocket_alfworld --out runs/my-pocket-alfworld        # checkpoints/pocket-alfworld holds the result

It learns from the demonstrator's play in training houses, in three lessons: to say what a picture shows; to answer with
the demonstrator's commands, some replaced by random ones so that it learns which are legal at all; last, shortly, with
so many random commands that there is something left for RL to learn. States are played once, on the engine, and shown
again and again with their pictures drawn anew.
"""

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex

from env import make_game
from extras.pocket import MARK, make_model, make_processor, make_tokenizer
from games.household import BADGES, kind_of, next_step, thoughts
from games.scene import draw_scene
from parse import make_answer, make_prompt
from plumbing.checkpoint import part_of, put_in_place
from policy import Policy
from sft import Demonstration, finetune
from vlm.families import save_processor
from vlm.loading import load_model

EARLY_NOISE = 0.3               # share of random commands in the second lesson
LABEL_NOISE = 0.75              # and in the last: where RL starts
# One token a word or number, so that a name is read and written as its words; a prompt's fixed lines whole.
PIECES = Regex("|".join((r"You are in a house\. Your task is to:", r"\n?Answer in JSON:[^\n]*", r"\n?Actions:\n",
                         '"action', r"You are in the middle of a room\. Looking quickly around you, you see",
                         " ?[A-Za-z]+", " ?[0-9]+", MARK + "+", r"\n", ".")))


def play(seed, games, follow=0.7) -> list[tuple[str, str, dict]]:
    """Play so many training houses; return (prompt, prompt without thoughts, info) of each state.

    A share `follow` of the commands is the demonstrator's, the others are random: what comes after a mistake is seen.
    """
    generator, game, found = np.random.default_rng(seed), make_game("alfworld"), []
    for number in range(games):
        _, info = game.reset(seed=10**6 * (seed + 1) + number)
        over = False
        while not over:
            found.append((make_prompt(game, info), make_prompt(game, info, cot=False), info))
            legal = game.legal_actions()
            command = next_step(info)[1] if generator.random() < follow else legal[generator.integers(len(legal))]
            _, _, terminated, truncated, info = game.step(legal.index(command))
            over = terminated or truncated
    return found


def kinds_seen(states) -> list[str]:
    """The kinds of things that lie about in these states."""
    return sorted({kind_of(name) for _, _, info in states for name in info["inside"] or ()})


def caption(info, kinds, generator) -> Demonstration:
    """Says what the picture shows, no more: what is held, what lies there.

    In every second picture the hand holds a thing of one of `kinds`, drawn at random: the engine's words often leave
    out what is held, so it has to be read, and play alone shows few kinds often enough.
    """
    if generator.random() < 0.5:
        badges = [badge for badge in BADGES.values() if generator.random() < 0.25]
        info = info | {"holding": f"{kinds[generator.integers(len(kinds))]} 1", "badges": badges}
    held = "nothing" if info["holding"] is None else " ".join([*info["badges"], kind_of(info["holding"])])
    seen = "shut" if info["shut"] else " ".join(map(kind_of, info["inside"] or ())) or "nothing"
    return Demonstration(draw_scene(info), "Read the picture.", make_answer(f"Holding {held}. {seen}"))


def captions(states, seed) -> Iterator[list[Demonstration]]:
    """Batches of captions: the first lesson."""
    generator, kinds = np.random.default_rng(seed), kinds_seen(states)
    while True:
        yield [caption(states[i][2], kinds, generator) for i in generator.integers(len(states), size=64)]


def answers(states, seed, noise=0.0) -> Iterator[list[Demonstration]]:
    """Batches of the demonstrator's answers, one in eight without thoughts; a share `noise` names random commands.

    Where the demonstrator looks for a thing it goes anywhere: a model that remembers nothing and always goes the same
    way can go round in circles for ever. One in eight is a caption, so that reading is not forgotten.
    """
    generator, kinds = np.random.default_rng(seed), kinds_seen(states)
    while True:
        batch = []
        for i in generator.integers(len(states), size=64):
            prompt, short, info = states[i]
            if generator.random() < 1 / 8:
                batch.append(caption(info, kinds, generator))
                continue
            todo, label = next_step(info)
            options = info["commands"] if generator.random() < noise else [label]
            if todo.startswith("find") and label.startswith("go to"):
                options = [command for command in info["commands"] if command.startswith("go to")]
            label = options[generator.integers(len(options))]
            cot = generator.random() > 1 / 8
            batch.append(Demonstration(draw_scene(info), prompt if cot else short,
                                       make_answer(label, thoughts(info, label) if cot else None)))
        yield batch


def build(out, seed=0, games=2000, steps=(500, 2000, 150)):
    """Play, make the model, teach it three lessons of so many steps, write it to the folder `out` (fp16)."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        states = [state for part in pool.starmap(play, [(2 * seed + k, games // 2) for k in (0, 1)]) for state in part]
    texts = [text for prompt, _, info in states[:6000]
             for text in (prompt, make_answer(info["commands"][0], thoughts(info, info["commands"][0])))]
    processor = make_processor(make_tokenizer(texts, vocabulary=2000, pieces=PIECES))
    policy = Policy(make_model(processor, seed, text_layers=4), processor, target_modules=(), seed=seed)
    print(f"{len(states)} states, {len(processor.tokenizer)} tokens, "
          f"{sum(p.numel() for p in policy.model.parameters()):,} weights", flush=True)
    finetune(policy, captions(states, seed), steps[0], 1e-3, title="reading")
    finetune(policy, answers(states, seed + 1, EARLY_NOISE), steps[1], 1e-3, title="answering")
    part = part_of(out)                                     # whole after the last lesson
    policy.model.half().save_pretrained(part)
    save_processor(processor, part)
    last_lesson(part, states, seed, steps[2])
    put_in_place(out)


def last_lesson(out, states, seed, steps, noise=LABEL_NOISE):
    """Teach the model in the folder the start that RL is to have, from the fp16 weights on disk."""
    policy = Policy(*load_model(str(out)), target_modules=(), seed=seed)
    finetune(policy, answers(states, seed + 2, noise), steps, 5e-4, title="settling")
    policy.model.half().save_pretrained(out)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the model, in Hugging Face's layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--games", type=int, default=2000, help="houses that the demonstrator plays [2000]")
    parser.add_argument("--steps", type=int, nargs=3, default=(500, 2000, 150),
                        metavar=("READ", "ANSWER", "SETTLE"), help="steps of the three lessons [500 2000 150]")
    return parser


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    if Path(options.out).exists():
        parser.error(f"{options.out} is there already: choose another --out")
    if options.seed < 0 or min(options.steps) < 1 or options.games < 2:
        parser.error("--seed must not be negative, --steps 1 or more, --games 2 or more")
    begun = time.perf_counter()
    build(options.out, options.seed, options.games, options.steps)
    print(f"{options.out} in {time.perf_counter() - begun:.0f} s; try: python eval.py --task alfworld "
          f"--model {options.out}")


if __name__ == "__main__":
    main()
