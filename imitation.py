"""Self-imitation: after each update a run learns its own won games again. Ours; by default on pocket's Points24 alone.

    won = WonGames(len(games))
    won.add(rollout)                                        # after it was played
    imitate(policy, optimizer, won, games[0], settings, generator)      # after its update

PPO looks at an answer during one update and then throws it away. Where wins are rare and a deal comes back seldom
(Points24: 566 sets of numbers that have a solution, some 1,600 games a run), what once won may be forgotten before it
is met again. So the answers of won games are kept, and drawn from at random; the loss is supervised learning's. After
Oh et al., arXiv 1806.05635, whose weight max(0, return − V) is left out: what is kept was won. What it is worth is
measured in results/README.md, "Points24: what was in the way".
Does not handle: lost games, which only PPO learns from; the value head, which does not learn here.
"""

from collections import deque

import torch

from parse import make_prompt
from plumbing import parallel
from ppo import prepare_step

KEPT = 32_768               # answers, the newest: a run of 15,000 steps on Points24 wins with some 5,000


class WonGames:
    """The answers of won games, each (the game's state before it, its token ids); plain JSON, so a checkpoint has it.

    waiting: of each game in play its answers so far, for an episode may span rollouts. Not kept: steps with a negative
    reward (a number that is on no card) and answers that named no action; the game was won in spite of them.
    """

    def __init__(self, games: int):
        self.waiting, self.kept = [[] for _ in range(games)], deque(maxlen=KEPT)

    def add(self, rollout):
        """Take in a played rollout.Rollout, with the states of its games."""
        L, N = rollout.rewards.shape
        for t in range(L):
            for n in range(N):
                if rollout.rewards[t, n] >= 0 and rollout.choices[t * N + n].named:
                    self.waiting[n].append([rollout.states[t * N + n], rollout.responses[t * N + n]])
                if rollout.terminated[t, n] or rollout.truncated[t, n]:
                    if rollout.terminated[t, n] and rollout.rewards[t, n] > 0:
                        self.kept.extend(self.waiting[n])
                    self.waiting[n] = []

    def get_state(self):
        return {"waiting": self.waiting, "kept": list(self.kept)}

    def set_state(self, state):
        self.waiting = state["waiting"]
        self.kept = deque(state["kept"], maxlen=KEPT)


def imitate(policy, optimizer, won, game, settings, generator: torch.Generator) -> dict:
    """Take up to settings.imitation steps on minibatches of kept answers; return their mean loss, None without one.

    The loss is −log π(answer) a token, at the policy's temperature; the optimiser is PPO's, with its moments and rate;
    target_kl does not limit it. game: a game of the run's task, to draw the kept states with; its own state is as
    before afterwards. No answer comes twice in one call, and only whole minibatches are taken, the same number by all
    processes. FloatingPointError where a loss or a gradient is not finite.
    """
    size = settings.minibatch_size // parallel.size()
    most = min(settings.imitation, parallel.concat(torch.tensor([len(won.kept) // size])).min().item())
    before, kept, losses = game.get_state(), list(won.kept), []
    for batch in torch.randperm(len(kept), generator=generator)[:most * size].view(most, size).tolist():
        # subtle: no gradient, not one of zero, with which Adam's momentum would still move the value head
        optimizer.zero_grad(set_to_none=True)
        answers = [kept[i][1] for i in batch]
        tokens, total = sum(map(len, answers)), torch.zeros(1)
        for k in range(0, size, settings.micro_batch_size):
            pictures, texts = zip(*(_shown(game, kept[i][0], settings) for i in batch[k:k + settings.micro_batch_size]))
            logp, _, _ = policy.logprobs(policy.encode(pictures, texts), answers[k:k + settings.micro_batch_size])
            loss = -logp.sum() / tokens
            loss.backward()
            total += loss.detach().cpu()
        prepare_step(optimizer, total, settings)
        optimizer.step()
        losses.append(total.item())
    optimizer.zero_grad(set_to_none=True)
    game.set_state(before)
    return {"won_answers": len(kept), "imitation_loss": sum(losses) / most if most else None}


def _shown(game, state, settings):
    """(picture, prompt) of a kept state."""
    game.set_state(state)
    picture, info = game.observe()
    return picture, make_prompt(game, info, settings.cot)
