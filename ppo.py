"""Clipped PPO where one action is a whole written answer (RL4VLM, section 4.3; PPO: arXiv 1707.06347).

    log π(a|o, v_in) ← λ · log π(v_tht|o, v_in) + log π(v_act|o, v_in, v_tht)          sums over tokens

Differs from the textbook: the ratio belongs to the answer, not to a token; the thoughts' share of it is weighted with
λ (`cot_lambda`, not to be mixed up with `gae_lambda`). Differs from the published code: truncation bootstraps, each
value belongs to its own observation and prompt, answers are scored under the prompt that they were sampled under.
Does not handle: playing (train.py), scoring tokens (policy.py), several optimisers, recurrent policies.
"""

from dataclasses import dataclass, field

import torch

import parallel


@dataclass
class PPOSettings:
    gamma: float = 0.9              # discount; the paper's
    gae_lambda: float = 0.95        # the paper's
    cot_lambda: float = 0.5         # weight of the thoughts' log-probability; the paper's for the card games
    ratio: str = "answer"           # what has a ratio of its own: the λ-weighted "answer", or every "token"
    clip: float = 0.1               # ε of the policy's ratio; the paper's
    epochs: int = 4                 # passes over a rollout; the paper's
    minibatch: int = 128            # answers per optimiser step; the paper's
    micro_batch: int = None         # answers per forward pass: memory only, the gradients are the minibatch's
    target_kl: float = None         # beyond this approximate KL of a minibatch only V learns on; 0: no such limit
    advantage_floor: float = None   # advantages are divided by their standard deviation, but by no less than this
    max_grad_norm: float = 1.0      # the policy's gradients, and V's, are each scaled down to this norm; ours


@dataclass
class Rollout:
    """S = steps × games samples, in the order of play (all games' first step, all games' second, …)."""
    prompts: list = field(default_factory=list)         # S policy.Prompt: what was put in
    responses: list = field(default_factory=list)       # S lists of token ids: what was sampled
    action_starts: list = field(default_factory=list)   # S token indices: where the action part begins
    old_logp: torch.Tensor = None       # (S, U) of the policy that sampled; U ratios an answer, see ratio_units
    old_values: torch.Tensor = None     # (S,)
    advantages: torch.Tensor = None     # (S,) not normalised
    returns: torch.Tensor = None        # (S,)


def gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv 1506.02438, equation 16): return (advantages, returns), both (L, N).

    All arguments (L, N): L steps of N games. next_values[t] is V of the observation that step t led to: where an
    episode was truncated that of its last observation, not of the next game's first. Termination has no future;
    truncation has one, of which V is the guess; both cut the sum over later δ.

    Two steps, r = (0, 1), V = (0.5, 0.5), the second terminal, γ = 0.9, gae_lambda = 1:
    δ = (0.9·0.5 − 0.5, 1 − 0.5) = (−0.05, 0.5); A = (−0.05 + 0.9·0.5, 0.5) = (0.4, 0.5); returns (0.9, 1.0).
    """
    # δ_t = r_t + γ V(s_{t+1}) (1 − terminated_t) − V(s_t)
    delta = rewards + gamma * next_values * (1 - terminated) - values
    ended = torch.maximum(terminated, truncated)
    advantages = torch.zeros_like(delta)
    following = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        # A_t = δ_t + γ gae_lambda (1 − ended_t) A_{t+1}
        following = delta[t] + gamma * gae_lambda * (1 - ended[t]) * following
        advantages[t] = following
    return advantages, advantages + values


def answer_logprob(logp, mask, action_starts, cot_lambda):
    """(B,) λ-weighted log-probability of answers from their tokens' logp (B, T) and mask (B, T).

    action_starts (B,): index of the first action token. λ = 1 is the plain sum, λ = 0 ignores the thoughts.

    >>> answer_logprob(torch.tensor([[-1., -2., -3.]]), torch.ones(1, 3), torch.tensor([2]), 0.5)
    tensor([-4.5000])
    """
    is_thought = torch.arange(logp.shape[1], device=logp.device) < action_starts[:, None]      # (B, T)
    # log π(a) = λ Σ log π(v_tht) + Σ log π(v_act)
    return (logp * mask * torch.where(is_thought, cot_lambda, 1.0)).sum(1)


def ratio_units(logp, mask, action_starts, settings):
    """What has a ratio of its own in PPO: return (log-probabilities, their shares of an answer), both (B, U).

    "answer", the paper's: U = 1, the λ-weighted sum. "token", for comparison (as VL-DAC, arXiv 2508.04280): U = T,
    every token alone with the answer's advantage and an equal share; λ plays no part. Arguments as in answer_logprob.
    """
    if settings.ratio == "token":
        return logp * mask, mask / mask.sum(1, keepdim=True)
    weighted = answer_logprob(logp, mask, action_starts, settings.cot_lambda)[:, None]
    return weighted, torch.ones_like(weighted)


def policy_loss(logp, old_logp, shares, advantages, clip):
    """Return (loss, approximate KL, clip fraction), scalars, of logp, old_logp, shares (B, U) and advantages (B,).

    The KL is of whole answers, λ-weighted where they are; the clip fraction is of what has a ratio.
    """
    log_ratio = logp - old_logp
    ratio, A = log_ratio.exp(), advantages[:, None]
    # L = −E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)]
    loss = -(shares * torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)).sum(1).mean()
    with torch.no_grad():
        whole = log_ratio.sum(1)
        kl = (whole.exp() - 1 - whole).mean()       # Schulman's k3, joschu.net/blog/kl-approx
        clipped = (shares * ((ratio - 1).abs() > clip)).sum(1).mean()
    return loss, kl, clipped


def explained_variance(values, returns):
    """1 − Var(R − V) / Var(R): 1 is a perfect value function, 0 no better than a constant; None if R is constant."""
    variance = returns.var()
    return None if variance == 0 else (1 - (returns - values).var() / variance).item()


def by_length(prompts, responses, size, indices=None):
    """Split sample indices into groups of `size` of similar length, longest first: less padding, same sums."""
    indices = range(len(prompts)) if indices is None else indices
    order = sorted(indices, key=lambda i: (-len(prompts[i].ids) - len(responses[i]), i))
    return [order[k:k + size] for k in range(0, len(order), size)]


@torch.no_grad()
def score_rollout(policy, rollout, settings):
    """Fill old_logp and old_values by `policy.logprobs`; return two diagnostics.

    They are the (thoughts', action part's) log-probability: summed over tokens, mean over answers, not λ-weighted.
    """
    S = len(rollout.responses)
    units = max(map(len, rollout.responses)) if settings.ratio == "token" else 1
    rollout.old_logp, rollout.old_values = torch.zeros(S, units), torch.zeros(S)
    sums = torch.zeros(2)
    for group in by_length(rollout.prompts, rollout.responses, settings.micro_batch):
        logp, mask, value = policy.logprobs(*_gather(rollout, group))
        starts = _starts(rollout, group, logp.device)
        action = answer_logprob(logp, mask, starts, 0.0)
        sums += torch.tensor([(logp.sum() - action.sum()).item(), action.sum().item()])
        old = ratio_units(logp, mask, starts, settings)[0].cpu()
        rollout.old_logp[group, :old.shape[1]] = old
        rollout.old_values[group] = value.cpu()
    return (parallel.add(sums) / (S * parallel.size())).tolist()


def ppo_update(policy, optimizer, rollout, settings, generator):
    """Improve the policy on one rollout; return a dict of diagnostics: means up to the minibatch that target_kl stops.

    policy: anything with `logprobs(prompts, responses) → (logp, mask, value)` and `trainable() → [(name, tensor)]`.
    optimizer: its first group of parameters is the policy's, a second V's: beyond target_kl only the second goes on.
    generator: torch.Generator on the CPU, for the order of samples. Raises FloatingPointError on a non-finite loss.
    Under torchrun every process draws the same order of all processes' samples and takes its own in each minibatch.
    """
    S = len(rollout.responses)
    first, total = S * parallel.rank(), S * parallel.size()
    parameters = [parameter for _, parameter in policy.trainable()]
    # The paper's code normalises over the rollout, not over the minibatch. subtle: where nearly every episode succeeds,
    # what is left is the value's error; divided by its own small spread it would push good answers down and apart.
    everyones = parallel.concat(rollout.advantages)
    spread = max(everyones.std().item() + 1e-8, settings.advantage_floor or 0.0)
    advantages = (rollout.advantages - everyones.mean()) / spread
    names = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "grad_norm")
    orders = [torch.randperm(total, generator=generator).tolist() for _ in range(settings.epochs)]
    batches = [order[k:k + settings.minibatch] for order in orders for k in range(0, total, settings.minibatch)]
    history, moving = [], True
    for number, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4)
        own = [i - first for i in batch if first <= i < first + S]
        for group in by_length(rollout.prompts, rollout.responses, settings.micro_batch, own):
            logp, mask, values = policy.logprobs(*_gather(rollout, group))
            device = logp.device
            new, shares = ratio_units(logp, mask, _starts(rollout, group, device), settings)
            old = rollout.old_logp[group, :new.shape[1]].to(device)
            p_loss, kl, clipped = policy_loss(new, old, shares, advantages[group].to(device), settings.clip)
            v_loss = 0.5 * ((values - rollout.returns[group].to(device)) ** 2).mean()
            # V sends no gradient into what writes the answers, so it can learn on when they have moved far enough
            loss = p_loss + v_loss if moving else v_loss
            if not torch.isfinite(loss):
                bad = [i for i, fine in zip(group, ((new - old).sum(1) + values).isfinite().tolist()) if not fine]
                _not_finite(f"loss is {loss.item()}", number, [first + i for i in bad or group])
            # subtle: weighted by its share, so that micro-batches and processes add up to the minibatch's mean
            share = len(group) / len(batch)
            (loss * share).backward()
            sums += share * torch.stack([p_loss.detach(), v_loss.detach(), kl, clipped]).cpu()
        parallel.add(sums)
        parallel.add_gradients(parameters)
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], settings.max_grad_norm)
                 for group in optimizer.param_groups]
        if not all(norm.isfinite() for norm in norms):
            _not_finite(f"gradient's norm is {[norm.item() for norm in norms]}", number, batch)
        if moving:
            history.append([*sums.tolist(), norms[0].item()])
        if settings.target_kl and sums[2].item() > settings.target_kl:
            moving = False                                  # too far from the policy that sampled: no further step
        if not moving:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = None                       # none, not zero: Adam's momentum would go on
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)                   # the next rollout has the memory
    means = torch.tensor(history).mean(0).tolist()
    return {**dict(zip(names, means)), "minibatches": len(history),
            "explained_variance": explained_variance(parallel.concat(rollout.old_values),
                                                     parallel.concat(rollout.returns))}


def _not_finite(what, number, samples):
    raise FloatingPointError(f"the {what} in minibatch {number} of the update, samples {samples[:8]}: the last "
                             "checkpoint is intact; start a new run (--out) with a smaller --lr or --bits 32")


def _gather(rollout, group):
    return [rollout.prompts[i] for i in group], [rollout.responses[i] for i in group]


def _starts(rollout, group, device):
    return torch.tensor([rollout.action_starts[i] for i in group], device=device)
