"""A rollout: the policy plays, its answers are scored, each one gets an advantage.

    rollout = collect(policy, games, settings, sampling, fallback)        # prompts, answers, rewards
    score_rollout(policy, rollout, settings)                              # log π and V of the policy that answered
    add_advantages(policy, rollout, settings)                             # A_t and returns, by ppo.gae

Differs from the published code: a step's prompt is stored with it and scored as stored (on the formula games it changes
every step), and an episode that ran out of time is worth V of its own last observation.
Does not handle: learning (ppo.py), held-out games (eval.py).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from games.expert import reads_right
from games.statistics import count_endings
from parse import choose, json_closed, make_prompt
from plumbing import parallel
from ppo import answer_logprob, explained_variance, gae


class Choice(NamedTuple):
    """What became of one answer."""
    action: str                 # what is played
    index: int                  # its place in the game's legal_actions()
    named: bool = True          # whether the text named it; if not, it is a uniform draw
    text: str = None            # v_out; None for a player that says nothing
    action_start: int = None    # the token where the action part begins


def encode_states(policy, games, pictures, infos, cot=True):
    """policy.encode's Prompts of the games' present states: each one's picture and its text (parse.make_prompt)."""
    return policy.encode(pictures, [make_prompt(game, info, cot) for game, info in zip(games, infos)])


def act(policy, games: list, pictures, infos: list[dict], generator: torch.Generator, fallback: np.random.Generator,
        cot=True, max_new_tokens=256, greedy=False, batch_size=64):
    """Let the policy answer in one state of each of several games, `batch_size` answers at a time.

    generator: torch.Generator for the tokens; fallback: numpy Generator for answers that name no legal action.
    Returns (prompts, responses, Choices), each as long as games.
    """
    prompts = encode_states(policy, games, pictures, infos, cot)
    responses = []
    for k in range(0, len(prompts), batch_size):
        responses += policy.generate(prompts[k:k + batch_size], generator, max_new_tokens, json_closed, greedy)
    choices = []
    for game, response in zip(games, responses):
        text, legal = policy.decode(response), game.legal_actions()
        index, named, start = choose(text, legal, fallback)
        choices.append(Choice(legal[index], index, named, text, policy.action_start(response, start)))
    return prompts, responses, choices


class Shape(NamedTuple):
    """What a micro-batch is padded to."""
    rows: int                   # samples; rows that are missing are filled
    prompt: int                 # P
    response: int               # T


@dataclass
class Rollout:
    """S = L × N samples in the order of play: all games' first step, all games' second, …

    collect fills the first block, score_rollout the second, add_advantages the third.
    """
    rewards: torch.Tensor               # (L, N), the games', and Game.unnamed_reward for an answer that named no action
    terminated: torch.Tensor            # (L, N) 1 where the step ended its episode
    truncated: torch.Tensor             # (L, N) 1 where time ran out before the episode had ended
    prompts: list = field(default_factory=list)         # S policy.Prompt: what was put in
    responses: list = field(default_factory=list)       # S lists of token ids: what was sampled
    choices: list = field(default_factory=list)         # S Choice: how they were read
    infos: list = field(default_factory=list)           # S dicts: what the games knew of their states
    states: list = field(default_factory=list)          # S dicts: the states themselves, for imitation.py alone
    cut_off: list = field(default_factory=list)         # (t, n, Prompt of the last observation) of truncated episodes
    last_prompts: list = field(default_factory=list)    # N Prompts: the states after the last step
    episodes: list = field(default_factory=list)        # (return, whether it is a success) of those that ended
    action_starts: torch.Tensor = None  # (S,) the token where the action part begins
    shapes: list = field(default_factory=list)          # S Shapes: what each sample is scored in, see padded_shapes

    old_logp: torch.Tensor = None       # (S,) λ-weighted
    old_values: torch.Tensor = None     # (S,)
    part_logp: torch.Tensor = None      # (2,) sums over answers of the thoughts' and the action parts' log-probability

    advantages: torch.Tensor = None     # (S,) normalised, and weighed where below 0
    returns: torch.Tensor = None        # (S,)

    def micro_batches(self, indices):
        """Yield (group, shape): the samples of these indices in micro-batches of their own shapes."""
        for shape in sorted({self.shapes[i] for i in indices}):
            members = [i for i in indices if self.shapes[i] == shape]
            for k in range(0, len(members), shape.rows):
                yield members[k:k + shape.rows], shape

    def columns(self, indices, device):
        """action_starts, old_logp, advantages and returns of some samples, each (B,)."""
        return [column[indices].to(device)
                for column in (self.action_starts, self.old_logp, self.advantages, self.returns)]


def collect(policy, games: list, settings, sampling, fallback, progress=lambda steps: None) -> Rollout:
    """Play num_steps of every game and return the Rollout. sampling, fallback: act's two generators."""
    L, N = settings.num_steps, len(games)
    rollout = Rollout(rewards=torch.zeros(L, N), terminated=torch.zeros(L, N), truncated=torch.zeros(L, N))
    observations = [game.observe() for game in games]
    for t in range(L):
        pictures, infos = zip(*observations)
        prompts, responses, choices = act(policy, games, pictures, infos, sampling, fallback, settings.cot,
                                          settings.max_new_tokens, batch_size=settings.play_batch_size)
        rollout.prompts += prompts
        rollout.responses += responses
        rollout.choices += choices
        rollout.infos += infos
        rollout.states += [game.get_state() for game in games] if settings.imitation else []
        for n, (game, choice) in enumerate(zip(games, choices)):
            picture, reward, terminated, truncated, info = game.step(choice.index)
            rollout.rewards[t, n] = reward + (0 if choice.named else game.unnamed_reward)       # ALFWorld: −1
            rollout.terminated[t, n], rollout.truncated[t, n] = terminated, truncated
            if truncated:
                # subtle: a truncated episode is worth V of its own last state, which the next reset throws away
                rollout.cut_off.append((t, n, encode_states(policy, [game], [picture], [info], settings.cot)[0]))
            if terminated or truncated:
                rollout.episodes.append((game.episode_return, info["is_success"]))
                picture, info = game.reset()
            observations[n] = picture, info
        progress(settings.num_envs)
    rollout.last_prompts = encode_states(policy, games, *zip(*observations), settings.cot)
    rollout.action_starts = torch.tensor([choice.action_start for choice in rollout.choices])
    rollout.shapes = padded_shapes(rollout.prompts, rollout.responses, settings)
    return rollout


def padded_shapes(prompts, responses, settings) -> list[Shape]:
    """The Shape in which each sample is scored, before learning and in every minibatch, whoever it is scored with.

    subtle: in bf16 a log-probability depends on the padding, the mask and the size of its batch. At 16 layers the
    ratio before the first step is off by up to 0.3 where these differ, and PPO clips at 0.1; where they are the same it
    is 1 exactly. Usually there is one shape. Where the longest answers would make it more than a tenth longer there are
    two: full micro-batches for the 95 % shortest answers, small ones for the rest. One column of padding is always
    there: without any, transformers takes another attention kernel.
    """
    P = 1 + max(len(prompt.ids) for prompt in prompts)
    lengths = sorted(len(response) for response in responses)
    short, long = lengths[len(lengths) * 95 // 100], lengths[-1]
    if P + long <= 1.1 * (P + short):
        short = long
    own = settings.minibatch_size // parallel.size()                        # of a minibatch; more would be filling
    shapes = (Shape(min(settings.micro_batch_size, own), P, short),
              Shape(min(settings.micro_batch_size, math.ceil(own / 16)), P, long))
    return [shapes[len(response) > short] for response in responses]


@torch.no_grad()
def score_rollout(policy, rollout: Rollout, settings):
    """Fill in old_logp, old_values and part_logp; fit the value head's inputs on a run's first rollout."""
    if not policy.value_head.fitted:
        policy.value_head.fit(parallel.concat(_batched(policy.prompt_hidden, rollout.prompts, settings).float()))
    S = len(rollout.responses)
    rollout.old_logp, rollout.old_values, rollout.part_logp = torch.zeros(S), torch.zeros(S), torch.zeros(2)
    for group, shape in rollout.micro_batches(range(S)):
        logp, mask, values = policy.logprobs([rollout.prompts[i] for i in group],           # (B, T), (B, T), (B,)
                                             [rollout.responses[i] for i in group], shape)
        starts = rollout.action_starts[group].to(logp.device)
        rollout.old_logp[group] = answer_logprob(logp, mask, starts, settings.cot_lambda).cpu()
        rollout.old_values[group] = values.cpu()
        action = answer_logprob(logp, mask, starts, cot_lambda=0.0).sum()                   # the action parts alone
        rollout.part_logp += torch.tensor([(logp.sum() - action).item(), action.item()])


def add_advantages(policy, rollout: Rollout, settings):
    """Fill in advantages and returns, by GAE over each game's steps; advantages are normalised over the rollout.

    Those below 0 are then multiplied by negative_weight.
    """
    values = rollout.old_values.view_as(rollout.rewards)                                    # (L, N)
    next_values = torch.cat([values[1:], _batched(policy.value, rollout.last_prompts, settings)[None]])
    if rollout.cut_off:
        when, which, prompts = zip(*rollout.cut_off)
        next_values[when, which] = _batched(policy.value, prompts, settings)
    advantages, returns = gae(rollout.rewards * settings.reward_scale, values, next_values, rollout.terminated,
                              rollout.truncated, settings.gamma, settings.gae_lambda)
    rollout.advantages, rollout.returns = advantages.flatten(), returns.flatten()
    # The paper's code normalises over the rollout, not over the minibatch. subtle: where nearly every episode succeeds,
    # what is left is the value's error; divided by its own small spread it would push good answers down and apart.
    everyones = parallel.concat(rollout.advantages)
    spread = max(everyones.std().item() + 1e-8, settings.advantage_floor)
    advantages = (rollout.advantages - everyones.mean()) / spread
    rollout.advantages = torch.where(advantages < 0, settings.negative_weight * advantages, advantages)


def play_metrics(rollout: Rollout, settings) -> dict:
    """What the rollout shows of the policy, as plain values (README of results/, "Metrics"), over all processes."""
    def everyones(numbers):
        return parallel.concat(torch.tensor(numbers, dtype=torch.float64)).numpy()

    def mean(numbers):
        return float(np.mean(numbers)) if len(numbers) else None

    returns = everyones([total for total, _ in rollout.episodes])
    read = [reads_right(settings.task, choice.text, info)
            for choice, info in zip(rollout.choices, rollout.infos)] if settings.cot else []
    thought_logp, action_logp = (parallel.concat(rollout.part_logp[None]).sum(0) / settings.batch_size).tolist()
    found = {"episodes": len(returns), "success": mean(everyones([success for _, success in rollout.episodes])),
             "return_mean": mean(returns),
             "parse_rate": mean(everyones([choice.named for choice in rollout.choices])),
             "reading_rate": mean(everyones(read)),
             "response_tokens": mean(everyones([len(response) for response in rollout.responses])),
             "thought_logp": thought_logp, "action_logp": action_logp}
    if settings.cot and "formula" in rollout.infos[0]:
        won, unfollowed, wrong = everyones([count_endings(settings.task, rollout)]).sum(0)
        found |= {"lost_plan_not_followed": unfollowed / max(1, won + unfollowed + wrong),
                  "lost_wrong_plan": wrong / max(1, won + unfollowed + wrong)}
    return found


def value_metrics(rollout):
    return {"explained_variance": explained_variance(parallel.concat(rollout.old_values),
                                                     parallel.concat(rollout.returns))}


def _batched(function, prompts, settings):
    """A function of prompts, in micro-batches; its results on the CPU."""
    size = settings.micro_batch_size
    return torch.cat([function(prompts[k:k + size]).cpu() for k in range(0, len(prompts), size)])
