"""A pocket LLaVA for ALFWorld: longer prompts than pocket.py's, four text layers, words for tokens.

    python -m lab.pocket_alfworld --out runs/my-pocket-alfworld    # as checkpoints/pocket-alfworld

It learns from the demonstrator's play in training houses, in three lessons: to say what a picture
shows; to answer with the demonstrator's commands, some replaced by random ones so that it learns
which are legal at all; last, shortly, with so many random commands that there is something left for
RL to learn. States are played once, on the engine, and shown again and again with their pictures
drawn anew.
"""

import multiprocessing
from collections.abc import Iterator

import numpy as np
from tokenizers import Regex

from env import make_game
from games.alfworld.expert import BADGES, hand, kind_of, next_step, thoughts
from games.alfworld.scene import draw_scene
from lab import pocket
from lab.pocket import MARK, make_model, make_processor, make_tokenizer, teach
from parse import make_answer, make_prompt
from plumbing.errors import in_words
from sft import Demonstration

EARLY_NOISE = 0.3               # share of random commands in the second lesson
LABEL_NOISE = 0.75              # and in the last: where RL starts

# One token a word or number, so that a name is read and written as its words; a prompt's fixed
# lines whole.
PIECES = Regex("|".join((
    r"You are in a house\. Your task is to:", r"\n?Answer in JSON:[^\n]*", r"\n?Actions:\n",
    '"action', r"You are in the middle of a room\. Looking quickly around you, you see",
    " ?[A-Za-z]+", " ?[0-9]+", MARK + "+", r"\n", ".")))


def play(seed, games, follow=0.7) -> list[tuple[str, str, dict]]:
    """Play so many training houses; return (prompt, prompt without thoughts, info) of each state.

    A share `follow` of the commands is the demonstrator's, the others are random: what comes after
    a mistake is seen.
    """
    generator, game, found = np.random.default_rng(seed), make_game("alfworld"), []
    for number in range(games):
        _, info = game.reset(seed=10**6 * (seed + 1) + number)
        over = False
        while not over:
            found.append((make_prompt(game, info), make_prompt(game, info, cot=False), info))
            legal = game.legal_actions()
            if generator.random() < follow:
                command = next_step(info)[1]
            else:
                command = legal[generator.integers(len(legal))]
            _, _, terminated, truncated, info = game.step(legal.index(command))
            over = terminated or truncated
    return found


def kinds_seen(states) -> list[str]:
    """The kinds of things that lie about in these states."""
    return sorted({kind_of(name) for _, _, info in states for name in info["inside"] or ()})


# ---- lessons -----------------------------------------------------------------------------------
def caption(info, kinds, generator) -> Demonstration:
    """Says what the picture shows, no more: what is held, what lies there.

    In every second picture the hand holds a thing of one of `kinds`, drawn at random: the engine's
    words often leave out what is held, so it has to be read, and play alone shows few kinds often
    enough.
    """
    if generator.random() < 0.5:
        badges = [badge for badge in BADGES.values() if generator.random() < 0.25]
        held = f"{kinds[generator.integers(len(kinds))]} 1"
        info = info | {"holding": held, "badges": badges}
    seen = "shut"
    if not info["shut"]:
        seen = " ".join(map(kind_of, info["inside"] or ())) or "nothing"
    return Demonstration(
        draw_scene(info), "Read the picture.", make_answer(f"{hand(info)} {seen}"))


def captions(states, seed) -> Iterator[list[Demonstration]]:
    """Batches of captions: the first lesson."""
    generator, kinds = np.random.default_rng(seed), kinds_seen(states)
    while True:
        drawn = generator.integers(len(states), size=64)
        yield [caption(states[i][2], kinds, generator) for i in drawn]


def answers(states, seed, noise=0.0) -> Iterator[list[Demonstration]]:
    """Batches of the demonstrator's answers, one in eight without thoughts.

    A share `noise` names random commands. One in eight is a caption, so that reading is not
    forgotten.
    """
    generator, kinds = np.random.default_rng(seed), kinds_seen(states)
    while True:
        batch = []
        for i in generator.integers(len(states), size=64):
            prompt, short, info = states[i]
            if generator.random() < 1 / 8:
                batch.append(caption(info, kinds, generator))
                continue
            label = _label(info, noise, generator)
            picture = draw_scene(info)
            if generator.random() > 1 / 8:
                said = make_answer(label, thoughts(info, label))
                batch.append(Demonstration(picture, prompt, said))
            else:
                batch.append(Demonstration(picture, short, make_answer(label)))
        yield batch


def _label(info, noise, generator):
    """The command to answer with."""
    todo, label = next_step(info)
    options = [label]
    if generator.random() < noise:
        options = info["commands"]
    if todo.startswith("find") and label.startswith("go to"):
        # It looks for a thing, so it goes anywhere: a model that remembers nothing and always goes
        # the same way can go round in circles for ever.
        options = [command for command in info["commands"] if command.startswith("go to")]
    return options[generator.integers(len(options))]


def build(out, seed=0, games=2000, steps=(500, 2000, 150)):
    """Play, make the model, teach it three lessons of so many steps."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        halves = pool.starmap(play, [(2 * seed + k, games // 2) for k in (0, 1)])
    states = halves[0] + halves[1]
    texts = []
    for prompt, _, info in states[:6000]:
        first = info["commands"][0]
        texts += [prompt, make_answer(first, thoughts(info, first))]
    processor = make_processor(make_tokenizer(texts, vocabulary=2000, pieces=PIECES))
    model = make_model(processor, seed, text_layers=4)
    print(f"{len(states)} states, {len(processor.tokenizer)} tokens, "
          f"{model.num_parameters():,} weights", flush=True)
    lessons = (
        captions(states, seed),
        answers(states, seed + 1, EARLY_NOISE),
        answers(states, seed + 2, LABEL_NOISE))
    teach(out, model, processor, seed, *zip(lessons, steps))


if __name__ == "__main__":
    with in_words():
        pocket.finish(pocket.bare_parser(__doc__).parse_args(), "alfworld", build)
