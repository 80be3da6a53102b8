"""Self-imitation: after each update a run learns its own won games again. Ours, off by default.

    won = WonGames(len(games))
    won.add(rollout)                                                # after it was played
    imitate(policy, optimizer, won, games[0], settings, generator)  # after its update
    kl_since(policy, rollout, settings)                             # how far all steps have gone

PPO looks at an answer during one update and then throws it away. Where wins are rare and a deal
comes back seldom (Points24: 566 sets of numbers that have a solution, some 1,600 games a run), what
once won may be forgotten before it is met again. So the answers of won games are kept, and drawn
from at random; the loss is supervised learning's. After Oh et al., arXiv 1806.05635, whose weight
max(0, return − V) is left out: what is kept was won. Does not handle: lost games, which only PPO
learns from; the value head, which does not learn here.
"""

from collections import deque
from dataclasses import replace

import torch

import parallel
from parse import make_prompt
from ppo import kl_estimate, prepare_step
from rollout import score_rollout

KEPT = 32_768       # answers, the newest; 15,000 steps of Points24 win with some 5,000


class WonGames:
    """The answers of games that reached their goal: (the game's state before it, its token ids).

    A goal whatever it cost: eval.py's goal_rate, not its success. All is plain JSON.

    waiting: of each game in play its answers so far, for an episode may span rollouts. Not kept are
    steps with a negative reward (a number that is on no card) and answers that named no action: the
    game was won in spite of them.
    """

    def __init__(self, games: int):
        self.waiting, self.kept = [[] for _ in range(games)], deque(maxlen=KEPT)

    def add(self, rollout):
        """Take in a played rollout.Rollout, with the states of its games."""
        L, N = rollout.rewards.shape
        for t in range(L):
            for n in range(N):
                sample, reward = t * N + n, rollout.rewards[t, n]
                if reward >= 0 and rollout.choices[sample].named:
                    answer = [rollout.states[sample], rollout.responses[sample]]
                    self.waiting[n].append(answer)
                if rollout.terminated[t, n] or rollout.truncated[t, n]:
                    if rollout.terminated[t, n] and reward > 0:
                        self.kept.extend(self.waiting[n])
                    self.waiting[n] = []

    def get_state(self):
        return {"waiting": self.waiting, "kept": list(self.kept)}

    def set_state(self, state):
        self.waiting = state["waiting"]
        self.kept = deque(state["kept"], maxlen=KEPT)


def imitate(policy, optimizer, won, game, settings, generator: torch.Generator) -> dict:
    """Take up to settings.imitation steps on minibatches of kept answers; return their mean loss.

    The loss is −log π(answer) a token, at the policy's temperature. optimizer: not PPO's, whose
    momentum would go on with PPO's last steps. target_kl does not limit these steps; kl_since
    counts them. game: a game of the run's task, to draw the kept states with; its own state is as
    before afterwards. No answer comes twice in one call, and only whole minibatches are taken, the
    same number by all processes. FloatingPointError where a loss or a gradient is not finite.
    """
    size = settings.minibatch_size // parallel.size()
    fewest = parallel.concat(torch.tensor([len(won.kept) // size])).min().item()
    most = min(settings.imitation, fewest)
    before, kept, losses = game.get_state(), list(won.kept), []
    drawn = torch.randperm(len(kept), generator=generator)[:most * size]
    for batch in drawn.view(most, size).tolist():
        optimizer.zero_grad(set_to_none=True)
        answers = [kept[i][1] for i in batch]
        tokens, total = sum(map(len, answers)), torch.zeros(1)
        for k in range(0, size, settings.micro_batch_size):
            group = batch[k:k + settings.micro_batch_size]
            states = [_observed(game, kept[i][0], settings.cot) for i in group]
            prompts = policy.encode(*zip(*states))
            logp, _ = policy.logprobs(prompts, answers[k:k + settings.micro_batch_size])
            loss = -logp.sum() / tokens
            loss.backward()
            total += loss.detach().cpu()
        prepare_step(optimizer, total, settings)
        optimizer.step()
        losses.append(total.item())
    optimizer.zero_grad(set_to_none=True)
    game.set_state(before)
    return {
        "won_answers": len(kept),
        "imitation_loss": sum(losses) / most if most else None,
    }


def kl_since(policy, rollout, settings) -> float:
    """The KL as approx_kl has it, of a whole rollout after all steps, PPO's and these."""
    again = replace(rollout)            # a copy, to be scored anew
    score_rollout(policy, again, settings)
    return kl_estimate(parallel.concat(again.old_logp - rollout.old_logp)).item()


def _observed(game, state, cot):
    """(picture, prompt) of a kept state."""
    game.set_state(state)
    picture, info = game.observe()
    return picture, make_prompt(game, info, cot)
