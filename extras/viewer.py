"""One held-out game as a web page: what was seen, written and played, and what each step was worth.

    python eval.py --task ezpoints --run runs/ezpoints-seed1 --episodes 1 --render game.html
    python eval.py --task ezpoints --model pocket --beside runs/ezpoints-seed1 --episodes 1 \\
        --render before-after.html

One file that needs no network, to be sent or put anywhere: the figures as JSON in a hand-written
page (viewer.html, viewer.js). game.html#2 opens it at step 2. A model plays the game here once
more, by itself; with --episodes 1 it draws the same answers as in the evaluation. Of a player
without a model the page shows what it did there.
Does not handle: making the two players (eval.py). Both models are in memory at once.
"""

import argparse
import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from env import held_out_game
from parse import make_prompt, parse
from players import scripted_player
from plumbing.checkpoint import checkpoints
from ppo import answer_logprob, gae
from rollout import act

HERE = Path(__file__).parent


class Page:
    """Takes note of an evaluation's first episode (evaluate's `watch`); save() writes the page.

    sides: one or two (Policy or None, name, Settings), as eval.find_policy returns them. Of the
    first without a policy the episode that was watched is shown; the second without one is the
    scripted player of that name.
    """

    def __init__(self, task: str, seed: int, greedy: bool, sides: list):
        self.task, self.seed, self.greedy, self.sides = task, seed, greedy, sides
        self.watched = []           # the first episode's Choices

    def __call__(self, picture, choice, episode):
        if episode == 0 and choice:
            self.watched.append(choice)

    def data(self) -> dict:
        """All that the page shows, as plain values.

        {"task", "goal", "seed", "sides": for each player "name", "lambda" and what play_side says}
        """
        sides = []
        for policy, name, settings in self.sides:
            # not where somebody's folders are
            shown = Path(name).name if Path(name).is_absolute() else name
            choose = self._chooser(policy, name, settings, is_first=not sides)
            played = play_side(self.task, self.seed, policy, settings, choose)
            goal = played.pop("goal")       # the same on both sides
            sides.append({"name": shown, "lambda": settings.cot_lambda, **played})
        task = Path(self.task).name             # without the place of somebody's file
        return {"task": task, "goal": goal, "seed": self.seed, "sides": sides}

    def _chooser(self, policy, name, settings, is_first):
        """play_side's choose of one player."""
        if policy:
            return model_chooser(policy, self.seed, self.greedy, settings)
        if is_first:
            watched = iter(self.watched)
            return lambda game, picture, info: (next(watched), {})
        player = scripted_player(name, self.task, self.seed)
        return lambda game, picture, info: (*player([game], [picture], [info]), {})

    def save(self, path):
        page = (HERE / "viewer.html").read_text(encoding="utf-8")
        script = (HERE / "viewer.js").read_text(encoding="utf-8")
        # the data last, for a model may have written "{{script}}"
        page = page.replace("{{script}}", script).replace("{{data}}", embed(self.data()))
        Path(path).write_text(page, encoding="utf-8")


def asked_beside(options, given, settings):
    """eval.find_policy's (options, given) for the player that --beside names.

    It is a run, a model or a script. A model plays as the first player's settings say (temperature,
    chain of thought), a run as its own do.
    """
    try:
        scripted_player(options.beside, options.task, options.seed)
        kind = "policy"
    except ValueError:
        kind = "run" if checkpoints(options.beside) else "model"
    kept = given.keys() - {"temperature", "cot", "bits"}
    own = {name: given[name] for name in kept} | {"game": settings.game}    # both play the same
    if kind == "model":
        own["cot"] = settings.cot
        if options.run or "temperature" in given:
            own["temperature"] = given.get("temperature", settings.temperature)
    nobody = dict.fromkeys(("run", "model", "policy", "endpoint"))
    return argparse.Namespace(**{**vars(options), **nobody, kind: options.beside}), own


def embed(data) -> str:
    """JSON that is safe inside a <script>, whatever a model wrote.

    It may have written "</script>", what JavaScript takes for a line's end, or what no file holds.

    >>> embed({"text": "</script>&"})
    '{"text": "\\\\u003c/script\\\\u003e\\\\u0026"}'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    safe = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
    surrogates = dict.fromkeys(range(0xd800, 0xe000), "\ufffd")
    return text.translate(safe | surrogates)


# ---- playing and scoring -----------------------------------------------------------------------
def play_side(task, seed, policy, settings, choose) -> dict:
    """Play the episode of this seed; return its steps and its end as plain values.

    choose(game, picture, info) → (Choice, what the policy says of it). Values and advantages are
    there where the value head has learned: a run's. Advantages are ppo.gae's, before they are
    normalised over a rollout.
    """
    game = held_out_game(task, settings.game_options)
    steps, terminated, truncated = [], False, False
    picture, info = game.reset(seed=seed)
    while not (terminated or truncated):
        choice, scores = choose(game, picture, info)
        step = {
            "picture": data_url(picture),
            "info": info,
            "expert": game.best_actions(info),
            "action": choice.action,
            "named": choice.named,
            "text": choice.text,
            "prompt": make_prompt(game, info, settings.cot),
            **scores,
        }
        if choice.text is not None:
            _, step["action_character"] = parse(choice.text, game.legal_actions())
        picture, step["reward"], terminated, truncated, info = game.step(choice.index)
        # ALFWorld's: PPO sees it, the return does not
        step["unnamed_reward"] = 0 if choice.named else game.unnamed_reward
        step["return"] = game.episode_return
        steps.append(step)
    end = {
        "picture": data_url(picture),
        "info": info,
        "return": game.episode_return,
        "truncated": truncated,
        "success": info["is_success"],
    }
    learned = bool(policy and policy.value_head.fitted)
    if learned:
        if truncated:
            [prompt] = policy.encode([picture], [make_prompt(game, info, settings.cot)])
            end["value"] = policy.value([prompt]).item()
        add_advantages(steps, end.get("value", 0.0), terminated, settings)
    return {
        "goal": f"Your task is to: {info['task']}" if "task" in info else game.description,
        "cot": settings.cot,
        "learned": learned,
        "steps": steps,
        "end": end,
        **{name: getattr(settings, name) if learned else None
           for name in ("gamma", "gae_lambda", "reward_scale")},
        "temperature": policy.temperature if policy else None,
    }


def model_chooser(policy, seed, greedy, settings):
    """choose for play_side: the policy answers, and its answer is scored.

    It draws as players.model_player does.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    fallback = np.random.default_rng(seed)

    @torch.no_grad()
    def choose(game, picture, info):
        [prompt], [response], [choice] = act(
            policy, [game], [picture], [info], generator, fallback, settings.cot,
            settings.max_new_tokens, greedy)
        logp, value = policy.logprobs([prompt], [response])             # (1, T), (1,)
        start = choice.action_start
        starts = torch.tensor([start], device=logp.device)
        return choice, {
            "tokens": pieces(policy, response),
            "logp": logp[0].tolist(),
            "action_token": start,
            "thought_logp": logp[0, :start].sum().item(),
            "action_logp": answer_logprob(logp, starts, cot_lambda=0.0).item(),
            "weighted_logp": answer_logprob(logp, starts, settings.cot_lambda).item(),
            "value": value.item() if policy.value_head.fitted else None,
        }

    return choose


def pieces(policy, response: list[int]) -> list[str]:
    """The text that each token adds; together they are the answer.

    "" for the end, and for a token that ends within a character.
    """
    found, shown = [], ""
    for length in range(1, len(response) + 1):
        text = policy.decode(response[:length])
        # subtle: a character's first bytes are not a sign yet
        if text.endswith("\ufffd") and length < len(response):
            text = shown
        found.append(text[len(shown):])
        shown = text
    return found


def add_advantages(steps, last_value, terminated, settings):
    """Fill in each step's advantage.

    last_value: V of the last observation, where the episode was truncated.
    """
    rewards = [step["reward"] + step["unnamed_reward"] for step in steps]
    values = [*(step["value"] for step in steps), last_value]
    rewards = torch.tensor(rewards, dtype=torch.float64)[:, None]       # (L, 1): one game
    values = torch.tensor(values, dtype=torch.float64)[:, None]         # (L + 1, 1)
    ended = torch.zeros_like(rewards)
    ended[-1] = 1
    advantages, _ = gae(
        rewards * settings.reward_scale, values[:-1], values[1:], ended * terminated,
        ended * (not terminated), settings.gamma, settings.gae_lambda)
    for step, advantage in zip(steps, advantages[:, 0].tolist()):
        step["advantage"] = advantage


def data_url(picture) -> str:
    """A picture (H, W, 3) uint8 as a PNG in a URL."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
