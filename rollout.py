"""A rollout: the policy plays, its answers are scored, each one gets an advantage.

    rollout = collect(policy, games, settings, sampling, fallback)  # prompts, answers, rewards
    score_rollout(policy, rollout, settings)        # log π and V of the policy that answered
    add_advantages(policy, rollout, settings)       # A_t and returns, by ppo.gae

Differs from the published code: a step's prompt is stored with it and scored as stored (on the
formula games it changes every step), and an episode that ran out of time is worth V of its own last
observation. Does not handle: learning (ppo.py), held-out games (eval.py).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

import parallel
from games.statistics import reads_right
from parse import choose, json_closed, make_prompt
from ppo import answer_logprob, explained_variance, gae


# ---- one step ----------------------------------------------------------------------------------
class Choice(NamedTuple):
    """What became of one answer."""

    action: str                 # what is played
    index: int                  # its place in the game's legal_actions()
    named: bool = True          # whether the text named it; if not, it is a uniform draw
    text: str = None            # v_out; None for a player that says nothing
    action_start: int = None    # the token where the action part begins


def encode_states(policy, games, pictures, infos, cot=True):
    """policy.encode's Prompts of the games' present states: each one's picture and its text."""
    texts = [make_prompt(game, info, cot) for game, info in zip(games, infos)]
    return policy.encode(pictures, texts)


def act(policy, games: list, pictures, infos: list[dict], generator: torch.Generator,
        fallback: np.random.Generator, cot=True, max_new_tokens=256, greedy=False, batch_size=64):
    """Let the policy answer in one state of each of several games, `batch_size` at a time.

    generator: torch.Generator for the tokens; fallback: numpy Generator for answers that name no
    legal action. Returns (prompts, responses, Choices), each as long as games.
    """
    prompts = encode_states(policy, games, pictures, infos, cot)
    responses = []              # lists of token ids, the very ones that were sampled
    for k in range(0, len(prompts), batch_size):
        responses += policy.generate(
            prompts[k:k + batch_size], generator, max_new_tokens, json_closed, greedy)
    choices = []
    for game, response in zip(games, responses):
        text, legal = policy.decode(response), game.legal_actions()
        index, named, start = choose(text, legal, fallback)
        action_start = policy.action_start(response, start)
        choices.append(Choice(legal[index], index, named, text, action_start))
    return prompts, responses, choices


# ---- why the ratio is 1 before the first step --------------------------------------------------
class Shape(NamedTuple):
    """What a micro-batch is padded to."""

    rows: int       # samples; rows that are missing are filled
    length: int     # of prompt and response together
    response: int   # T


def padded_shapes(prompts, responses, settings) -> list[Shape]:
    """The Shape in which each sample is scored, before learning and in every minibatch alike.

    subtle: a matrix product may round otherwise in a batch of another size, for which a machine has
    another kernel. At depth in bf16 such differences have moved ratios by 0.3, and PPO clips at
    0.1; in batches of one size the ratio before the first step is 1 exactly. Usually there is one
    shape. Where the longest samples are more than a tenth longer there are two: full micro-batches
    for the 95 % shortest, smaller ones for the rest.
    """
    lengths = [len(prompt.ids) + len(response) for prompt, response in zip(prompts, responses)]
    short, long = sorted(lengths)[len(lengths) * 95 // 100], max(lengths)
    if long <= 1.1 * short:
        short = long
    # a process's part of a minibatch: more rows would be filling
    own = settings.minibatch_size // parallel.size()
    T = max(len(response) for response, length in zip(responses, lengths) if length <= short)
    usual = Shape(min(settings.micro_batch_size, own), short, T)
    # a minibatch has some 5 % of long samples: a sixteenth of its rows, and no more tokens
    few = max(1, min(math.ceil(own / 16), usual.rows * short // long))
    wide = Shape(few, long, max(map(len, responses)))
    return [wide if length > short else usual for length in lengths]


# ---- many steps --------------------------------------------------------------------------------
@dataclass
class Rollout:
    """S = L × N samples in the order of play: all games' first step, all games' second, …

    collect fills the first block, score_rollout the second, add_advantages the third (or
    groups.py the first and the third: there S is what it comes to, and rewards are (S, 1)).
    """

    # rewards are the games', and Game.unnamed_reward more for an answer that named no action
    rewards: torch.Tensor       # (L, N)
    terminated: torch.Tensor    # (L, N) 1 where the step ended its episode
    truncated: torch.Tensor     # (L, N) 1 where time ran out before the episode had ended
    prompts: list = field(default_factory=list)         # S policy.Prompt: what was put in
    responses: list = field(default_factory=list)       # S lists of token ids: what was sampled
    choices: list = field(default_factory=list)         # S Choice: how they were read
    infos: list = field(default_factory=list)           # S dicts: what the games knew
    states: list = field(default_factory=list)          # S games' states, for imitation.py alone
    cut_off: list = field(default_factory=list)         # (t, n, Prompt of the last observation)
    last_prompts: list = field(default_factory=list)    # N Prompts: the states after the last step
    episode_of: torch.Tensor = None     # (S,) each answer's episode, in groups.py alone
    episodes: list = field(default_factory=list)        # (return, success) of those that ended
    action_starts: torch.Tensor = None  # (S,) the token where the action part begins
    shapes: list = field(default_factory=list)          # S Shapes (padded_shapes)

    old_logp: torch.Tensor = None       # (S,) λ-weighted
    old_answer_logp: torch.Tensor = None    # (S,) of the whole answers, unweighted
    old_values: torch.Tensor = None     # (S,)
    part_logp: torch.Tensor = None      # (2,) sums over answers: of the thoughts, of the actions
    start_logp: torch.Tensor = None     # (S,) old_answer_logp by RL's start, with --kl-coef

    advantages: torch.Tensor = None     # (S,) normalised
    returns: torch.Tensor = None        # (S,)

    def micro_batches(self, indices):
        """Yield (group, prompts, responses, shape): these samples, those of one shape together."""
        for shape in sorted({self.shapes[i] for i in indices}):
            members = [i for i in indices if self.shapes[i] == shape]
            for k in range(0, len(members), shape.rows):
                group = members[k:k + shape.rows]
                prompts = [self.prompts[i] for i in group]
                responses = [self.responses[i] for i in group]
                yield group, prompts, responses, shape


def collect(policy, games: list, settings, sampling, fallback, progress=lambda steps: None):
    """Play num_steps of every game; return the Rollout. sampling, fallback: act's generators."""
    L, N = settings.num_steps, len(games)
    # subtle: a rollout begins where the last one ended; a game is reset when its episode is over
    rollout = Rollout(torch.zeros(L, N), torch.zeros(L, N), torch.zeros(L, N))
    observations = [game.observe() for game in games]
    for t in range(L):
        if settings.imitation:
            rollout.states += [game.get_state() for game in games]
        steps = play_step(policy, games, observations, rollout, settings, sampling, fallback)
        for n, (game, step) in enumerate(zip(games, steps)):
            picture, rollout.rewards[t, n], terminated, truncated, info = step
            rollout.terminated[t, n], rollout.truncated[t, n] = terminated, truncated
            if truncated:
                # subtle: a truncated episode is worth V of its own last state, which the next
                # reset throws away
                [prompt] = encode_states(policy, [game], [picture], [info], settings.cot)
                rollout.cut_off.append((t, n, prompt))
            if terminated or truncated:
                picture, info = game.reset()
            observations[n] = picture, info
        progress(settings.num_envs)

    rollout.last_prompts = encode_states(policy, games, *zip(*observations), settings.cot)
    complete(rollout, settings)
    return rollout


def play_step(policy, games, observations, rollout, settings, sampling, fallback):
    """An answer and a step of each game, added to the rollout; return what Game.step returned."""
    pictures, infos = zip(*observations)
    prompts, responses, choices = act(
        policy, games, pictures, infos, sampling, fallback, settings.cot,
        settings.max_new_tokens, batch_size=settings.play_batch_size)
    rollout.prompts += prompts
    rollout.responses += responses
    rollout.choices += choices
    rollout.infos += infos
    steps = []
    for game, choice in zip(games, choices):
        picture, reward, terminated, truncated, info = game.step(choice.index)
        # ALFWorld punishes an answer that names no action
        reward += 0 if choice.named else game.unnamed_reward
        steps.append((picture, reward, terminated, truncated, info))
        if terminated or truncated:
            rollout.episodes.append((game.episode_return, info["is_success"]))
    return steps


def complete(rollout, settings):
    """Fill in action_starts and shapes, when all is played."""
    rollout.action_starts = torch.tensor([choice.action_start for choice in rollout.choices])
    rollout.shapes = padded_shapes(rollout.prompts, rollout.responses, settings)


@torch.no_grad()
def score_rollout(policy, rollout: Rollout, settings, start=None):
    """Fill in old_logp, old_answer_logp, old_values and part_logp, by the policy that answered.

    A run's first rollout also fits the value head's inputs. start: lora.FrozenCopy of the adapters
    that RL began from, for start_logp.
    """
    if not policy.value_head.fitted:
        hidden = _in_batches(policy.prompt_hidden, rollout.prompts, settings.micro_batch_size)
        policy.value_head.fit(parallel.concat(hidden.float()))
    S = len(rollout.responses)                                          # L × N
    rollout.old_logp, rollout.old_answer_logp, rollout.old_values = torch.zeros(3, S)
    rollout.part_logp = torch.zeros(2)
    for group, prompts, responses, shape in rollout.micro_batches(range(S)):
        logp, values = policy.logprobs(prompts, responses, shape)       # (B, T), (B,)
        starts = rollout.action_starts[group].to(logp.device)           # (B,)
        rollout.old_logp[group] = answer_logprob(logp, starts, settings.cot_lambda).cpu()
        rollout.old_values[group] = values.cpu()
        # for the metrics: with λ = 1 the whole answers, with 0 their action parts
        rollout.old_answer_logp[group] = answer_logprob(logp, starts, cot_lambda=1.0).cpu()
        action = answer_logprob(logp, starts, cot_lambda=0.0).sum()
        rollout.part_logp += torch.tensor([(logp.sum() - action).item(), action.item()])
    if start:
        rollout.start_logp = torch.zeros(S)
        with start.in_place():
            for group, prompts, responses, shape in rollout.micro_batches(range(S)):
                logp, _ = policy.logprobs(prompts, responses, shape)
                rollout.start_logp[group] = logp.sum(1).cpu()


def add_advantages(policy, rollout: Rollout, settings):
    """Fill in advantages and returns: GAE over each game's steps, normalised over the rollout."""
    size = settings.micro_batch_size
    values = rollout.old_values.view_as(rollout.rewards)                            # (L, N)
    after_last = _in_batches(policy.value, rollout.last_prompts, size)              # (N,)
    next_values = torch.cat([values[1:], after_last[None]])                         # (L, N)
    if rollout.cut_off:         # where time ran out V belongs to the state that was left
        when, which, prompts = zip(*rollout.cut_off)
        next_values[when, which] = _in_batches(policy.value, prompts, size)
    advantages, returns = gae(
        rollout.rewards * settings.reward_scale, values, next_values, rollout.terminated,
        rollout.truncated, settings.gamma, settings.gae_lambda)

    # The paper's code normalises over the rollout, not over the minibatch. subtle: where nearly
    # every episode succeeds, what is left is the value's error. Divided by its own small spread it
    # would push good answers down and apart; advantage_floor limits that.
    all_advantages = parallel.concat(advantages.flatten())
    spread = max(all_advantages.std().item() + 1e-8, settings.advantage_floor)
    rollout.advantages = (advantages.flatten() - all_advantages.mean()) / spread
    rollout.returns = returns.flatten()


def _in_batches(function, prompts, size):
    """A function of prompts, `size` of them at a time; its results on the CPU."""
    return torch.cat([function(prompts[k:k + size]).cpu() for k in range(0, len(prompts), size)])


# ---- what a rollout shows ----------------------------------------------------------------------
def rollout_metrics(rollout: Rollout, settings, game) -> dict:
    """What the rollout shows of the policy, as plain values, over all processes.

    game: one of those that were played. Their meanings: results/README.md, "Metrics".
    """
    def gather(numbers):
        return parallel.concat(torch.tensor(numbers, dtype=torch.float64)).numpy()

    def mean(numbers):
        numbers = gather(numbers)
        return float(np.mean(numbers)) if len(numbers) else None

    returns, successes = zip(*rollout.episodes) if rollout.episodes else ((), ())
    read = []
    if settings.cot:
        read = reads_right(
            game, [(choice.text, info) for choice, info in zip(rollout.choices, rollout.infos)])
    answers = parallel.concat(torch.tensor([len(rollout.responses)])).sum()
    parts = parallel.concat(rollout.part_logp[None]).sum(0) / answers
    kl = {}
    if settings.kl_coef:
        kl["kl_to_start"] = mean((rollout.old_answer_logp - rollout.start_logp).tolist())
    return {
        "episodes": len(gather(returns)),
        # None where the game cannot tell
        "success": mean([success for success in successes if success is not None]),
        "return_mean": mean(returns),
        "parse_rate": mean([choice.named for choice in rollout.choices]),
        "reading_rate": mean(read),
        "response_tokens": mean([len(response) for response in rollout.responses]),
        **kl,
        "thought_logp": parts[0].item(),
        "action_logp": parts[1].item(),
        "explained_variance": explained_variance(
            parallel.concat(rollout.old_values), parallel.concat(rollout.returns)),
    }
