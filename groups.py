"""Advantages without V: several episodes of each deal, compared. Ours, off by default.

    rollout = collect_groups(policy, games, settings, sampling, fallback)   # as rollout.collect
    add_group_advantages(policy, rollout, settings)                 # as rollout.add_advantages

group_size games begin with the same deal and are played to their ends. An episode's return minus
the mean of the others' is the advantage of all its answers: RLOO (arXiv 2402.14740), `--advantage
rloo`. GRPO (arXiv 2402.03300) takes the group's mean, and divides by its standard deviation. The
update is ppo.py's. Returns are not discounted, advantages not normalised over the rollout, and an
episode that ran out of time counts as it ended: gamma, gae_lambda and advantage_floor have no
effect. V has none either: it learns the rewards to come, so that explained_variance is reported.
Does not handle: several processes, whose rollouts would differ in length.
"""

import itertools

import torch

from rollout import Rollout, complete, play_step


def group_advantages(returns, divide=False):
    """An episode's return against those of the same deal's other episodes: RLOO; divided, GRPO.

    returns and the result (G, k): k episodes of each of G deals.

    >>> group_advantages(torch.tensor([[1., 0., 0., 0.]]))
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    k = returns.shape[1]
    centred = returns - returns.mean(1, keepdim=True)
    if divide:          # where all episodes end alike there is nothing to learn: 0 / 1e-4
        return centred / (returns.std(1, keepdim=True) + 1e-4)
    return centred * k / (k - 1)                        # R_i − mean of the k − 1 others


def collect_groups(policy, games, settings, sampling, fallback, progress=lambda steps: None):
    """Play whole episodes, group_size games of each deal side by side; return the Rollout.

    A group that has finished gets a new deal until there are settings.batch_size answers; then the
    others play to their ends.
    """
    k, numbers, rewards, episode_of = settings.group_size, itertools.count(), [], []
    rollout, playing = Rollout(None, None, None), {}        # {game: the number of its episode}
    while playing or len(rewards) < settings.batch_size:
        for group in (games[n:n + k] for n in range(0, len(games), k)):
            if len(rewards) < settings.batch_size and playing.keys().isdisjoint(group):
                group[0].reset()
                deal = group[0].get_state()     # and what chance has in store for it
                for game in group:
                    game.set_state(deal)
                    playing[game] = next(numbers)
        observations = [game.observe() for game in playing]
        steps = play_step(
            policy, [*playing], observations, rollout, settings, sampling, fallback)
        rewards += [reward for _, reward, *_ in steps]
        episode_of += playing.values()
        playing = {game: number for game, number in playing.items() if not game.over}
        progress(len(steps))
    rollout.rewards, rollout.episode_of = torch.tensor(rewards)[:, None], torch.tensor(episode_of)
    complete(rollout, settings)
    return rollout


def add_group_advantages(policy, rollout, settings):
    """Fill in advantages, one for all answers of an episode, and returns, what is still to come."""
    own = rollout.episode_of                                                # (S,)
    rewards = rollout.rewards.flatten() * settings.reward_scale             # (S,)
    episodes, rollout.returns = torch.zeros(own.max() + 1), torch.zeros_like(rewards)
    for i in reversed(range(len(own))):
        episodes[own[i]] += rewards[i]                  # in the end the episodes' whole returns
        rollout.returns[i] = episodes[own[i]]
    by_deal = episodes.view(-1, settings.group_size)                        # (G, k)
    advantages = group_advantages(by_deal, divide=settings.advantage == "grpo")
    rollout.advantages = advantages.flatten()[own]                          # (S,)
