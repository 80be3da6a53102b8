"""One held-out game as a web page: what was seen, written and played, and what each token and each step was worth.

    python eval.py --task ezpoints --run runs/ezpoints-seed1 --episodes 1 --render game.html
    python eval.py --task ezpoints --model pocket --beside runs/ezpoints-seed1 --episodes 1 --render before-after.html

One file without network, to be sent or put anywhere: the figures as JSON in a hand-written page (viewer.html,
viewer.js), which opens at step 2 as game.html#2. A model plays the game here once more, by itself; with --episodes 1 it
draws the same answers as in the evaluation. Of a player without a model the page shows what it did there.
Does not handle: GIF and PNG (film.py), making the two players (eval.py); both models are in memory at once.
"""

import argparse
import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from env import make_game
from games.expert import best_actions
from parse import make_prompt, parse
from players import scripted_player
from plumbing.checkpoint import checkpoints
from plumbing.settings import WORLD, Settings, with_task_defaults
from ppo import answer_logprob, gae
from rollout import act

HERE = Path(__file__).parent


class Page:
    """Takes note of an evaluation's first episode (evaluate's `watch`); save() writes the page.

    sides: one or two (Policy or None, name, settings), as eval.find_policy returns them. Of the first without a policy
    the episode that was watched is shown; the second without one is a scripted player of that name.
    """

    def __init__(self, task: str, seed: int, greedy: bool, sides: list):
        self.task, self.seed, self.greedy, self.sides = task, seed, greedy, sides
        self.watched = []                                       # the first episode's Choices

    def __call__(self, picture, choice, episode):
        if episode == 0 and choice:
            self.watched.append(choice)

    def data(self) -> dict:
        """All that the page shows, as plain values: {"task", "goal", "seed", "sides": [a dict of play_side each]}."""
        played = []
        for position, (policy, name, settings) in enumerate(self.sides):
            others = [other for _, _, other in self.sides if other is not settings]
            # a plain model has no λ of its own: the other side's, or the default
            default = with_task_defaults(Settings, {"task": self.task}).cot_lambda
            cot_lambda = next((own["cot_lambda"] for own in (settings, *others) if "cot_lambda" in own), default)
            if policy:
                choose = model_chooser(policy, self.seed, self.greedy, settings, cot_lambda)
            elif position == 0:
                watched = iter(self.watched)
                choose = lambda game, picture, info, watched=watched: (next(watched), {})
            else:
                player = scripted_player(name, self.task, self.seed)
                choose = lambda game, picture, info, player=player: (*player([game], [picture], [info]), {})
            shown = Path(name).name if Path(name).is_absolute() else name       # not where somebody's folders are
            played.append({"name": shown, "lambda": cot_lambda} | play_side(self.task, self.seed, policy, settings,
                                                                           choose))
        goals = [side.pop("goal") for side in played]               # the same on both sides
        return {"task": self.task, "goal": goals[0], "seed": self.seed, "sides": played}

    def save(self, path):
        page, script = ((HERE / name).read_text(encoding="utf-8") for name in ("viewer.html", "viewer.js"))
        page = page.replace("{{script}}", script).replace("{{data}}", embed(self.data()))       # a model's words last
        Path(path).write_text(page, encoding="utf-8")


def asked_beside(options, given, settings):
    """eval.find_policy's (options, given) for the second player, which --beside names: a run, a model or a script.

    A model plays as the first player's settings say (temperature, chain of thought); a run has its own.
    """
    try:
        scripted_player(options.beside, options.task, options.seed)
        kind = "policy"
    except ValueError:
        kind = "run" if checkpoints(options.beside) else "model"
    given = {key: value for key, value in given.items() if key not in ("temperature", "cot", "bits")}
    given |= {key: settings[key] for key in WORLD}              # both play the same house
    if kind == "model":
        given |= {key: settings[key] for key in ("temperature", "cot") if key in settings}
    nobody = dict.fromkeys(("run", "model", "policy", "endpoint"))
    return argparse.Namespace(**{**vars(options), **nobody, kind: options.beside}), given


def embed(data) -> str:
    """JSON that is safe inside a <script>: an answer may hold "</script>", or what JavaScript takes for a line's end.

    >>> embed({"text": "</script>&"})
    '{"text": "\\\\u003c/script\\\\u003e\\\\u0026"}'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
                          | {surrogate: "\ufffd" for surrogate in range(0xd800, 0xe000)})       # which no file holds


# ---- playing and scoring --------------------------------------------------------------------------------------------
def play_side(task, seed, policy, settings, choose) -> dict:
    """Play the episode of this seed; return its steps and its end as plain values.

    choose(game, picture, info) → (Choice, what the policy says of it). Values and advantages are None without a value
    head that has learned; advantages are those of ppo.gae, before they are normalised over a rollout.
    """
    world = {"split": "held out"} | {name: settings[name] for name in WORLD} if task == "alfworld" else {}
    game, steps, terminated, truncated = make_game(task, **world), [], False, False
    picture, info = game.reset(seed=seed)
    while not (terminated or truncated):
        choice, scores = choose(game, picture, info)
        step = {"picture": data_url(picture), "info": info, "expert": best_actions(task, info), "action": choice.action,
                "named": choice.named, "text": choice.text, **scores}
        if choice.text is not None:
            step |= {"prompt": make_prompt(game, info, settings["cot"]),
                     "action_character": parse(choice.text, game.legal_actions())[1]}
        picture, reward, terminated, truncated, info = game.step(choice.index)
        unnamed_reward = 0 if choice.named else game.unnamed_reward         # ALFWorld: PPO sees it, the return does not
        steps.append(step | {"reward": reward, "unnamed_reward": unnamed_reward, "return": game.episode_return})
    end = {"picture": data_url(picture), "info": info, "return": game.episode_return, "truncated": truncated,
           "success": bool(info["is_success"])}
    learned = bool(policy and policy.value_head.fitted) and "gamma" in settings
    if learned:
        if truncated:
            [prompt] = policy.encode([picture], [make_prompt(game, info, settings["cot"])])
            end["value"] = policy.value([prompt]).item()
        add_advantages(steps, end.get("value", 0.0), terminated, settings)
    goal = f"Your task is to: {info['task']}" if task == "alfworld" else game.unwrapped.description
    return {"goal": goal, "cot": settings["cot"], "learned": learned, "steps": steps, "end": end,
            **{key: settings.get(key) for key in ("gamma", "gae_lambda", "reward_scale")},
            "temperature": policy.temperature if policy else None}


def model_chooser(policy, seed, greedy, settings, cot_lambda):
    """choose for play_side: the policy answers, drawing as players.model_player does, and its answer is scored."""
    generator, fallback = torch.Generator(policy.device).manual_seed(seed), np.random.default_rng(seed)

    @torch.no_grad()
    def choose(game, picture, info):
        [prompt], [response], [choice] = act(policy, [game], [picture], [info], generator, fallback, settings["cot"],
                                             settings["max_new_tokens"], greedy)
        logp, mask, value = policy.logprobs([prompt], [response])               # (1, T), (1, T), (1,)
        start = torch.tensor([choice.action_start], device=logp.device)
        action, weighted = (answer_logprob(logp, mask, start, weight).item() for weight in (0.0, cot_lambda))
        return choice, {"tokens": pieces(policy, response), "logp": logp[0].tolist(), "action_token": start.item(),
                        "thought_logp": logp[0, :start].sum().item(), "action_logp": action, "weighted_logp": weighted,
                        "value": value.item() if policy.value_head.fitted else None}

    return choose


def pieces(policy, response: list[int]) -> list[str]:
    """The text that each token adds; together they are the answer. "" for the end, and within a character."""
    found, shown = [], ""
    for length in range(1, len(response) + 1):
        text = policy.decode(response[:length])
        if text.endswith("\ufffd") and length < len(response):      # subtle: a character's first bytes, not a sign yet
            text = shown
        found.append(text[len(shown):])
        shown = text
    return found


def add_advantages(steps, last_value, terminated, settings):
    """Fill in each step's advantage; last_value: V of the last observation, where the episode was truncated."""
    def column(numbers):
        return torch.tensor(numbers, dtype=torch.float64)[:, None]              # (L, 1)

    ended = [0.0] * (len(steps) - 1) + [1.0]
    values = [step["value"] for step in steps]
    rewards = [(step["reward"] + step["unnamed_reward"]) * settings["reward_scale"] for step in steps]
    advantages, _ = gae(column(rewards), column(values), column([*values[1:], last_value]),
                        column(ended) * terminated, column(ended) * (not terminated), settings["gamma"],
                        settings["gae_lambda"])
    for step, advantage in zip(steps, advantages[:, 0].tolist()):
        step["advantage"] = advantage


def data_url(picture) -> str:
    """A picture (H, W, 3) uint8 as a PNG in a URL."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
