"""Clipped PPO where one action is a whole written answer (RL4VLM, section 4.3; arXiv 1707.06347).

    log π(a|o, v_in) ← λ · log π(v_tht|o, v_in) + log π(v_act|o, v_in, v_tht)      sums over tokens

Differs from the textbook: the ratio belongs to the answer, not to a token; the thoughts' share of
it is weighted with λ (`cot_lambda`, not to be mixed up with `gae_lambda`). Differs from the
published code: truncation bootstraps, each value belongs to its own observation and prompt, answers
are scored under the prompt that they were sampled under. Ours: V's loss sends no gradient into the
model (policy.ValueHead). Does not handle: playing (rollout.py), scoring tokens (policy.py),
recurrent policies.
"""

import math

import torch

import parallel


def gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv 1506.02438, equation 16): (advantages, returns).

    All arguments and results (L, N): L steps of N games. next_values[t] is V of the observation
    that step t led to: where an episode was truncated that of its last observation, not of the next
    game's first. Termination has no future; truncation has one, of which V is the guess; both cut
    the sum over later δ.

    Two steps, r = (0, 1), V = (0.5, 0.5), the second terminal, γ = 0.9, gae_lambda = 1:
    δ = (0.9·0.5 − 0.5, 1 − 0.5) = (−0.05, 0.5); A = (−0.05 + 0.9·0.5, 0.5) = (0.4, 0.5);
    returns (0.9, 1.0).
    """
    # δ_t = r_t + γ V(s_{t+1}) (1 − terminated_t) − V(s_t)
    delta = rewards + gamma * next_values * (1 - terminated) - values
    ended = torch.maximum(terminated, truncated)        # (L, N)
    advantages = torch.zeros_like(delta)                # (L, N)
    following = torch.zeros_like(delta[0])              # (N,) A_{t+1}, 0 beyond the last step
    for t in reversed(range(len(delta))):
        # A_t = δ_t + γ gae_lambda (1 − ended_t) A_{t+1}
        following = delta[t] + gamma * gae_lambda * (1 - ended[t]) * following
        advantages[t] = following
    return advantages, advantages + values              # returns R_t = A_t + V(s_t)


def answer_logprob(logp, action_starts, cot_lambda):
    """(B,) λ-weighted log-probability of answers from their tokens' logp (B, T), 0 where padded.

    action_starts (B,): index of the first action token. λ = 1 is the plain sum, λ = 0 ignores the
    thoughts.

    >>> answer_logprob(torch.tensor([[-1., -2., -3.]]), torch.tensor([2]), cot_lambda=0.5)
    tensor([-4.5000])
    """
    places = torch.arange(logp.shape[1], device=logp.device)
    is_thought = places < action_starts[:, None]                                # (B, T)
    # log π(a) = λ Σ log π(v_tht) + Σ log π(v_act)
    return (logp * torch.where(is_thought, cot_lambda, 1.0)).sum(1)


def policy_loss(logp, old_logp, advantages, clip_coef):
    """Return (loss, approximate KL, clip fraction), scalars.

    logp, old_logp (answer_logprob's, so the KL is that of λ-weighted answers) and advantages: each
    (B,).
    """
    ratio = (logp - old_logp).exp()                     # (B,) ρ, one an answer
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    # L = −E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)]
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages).mean()
    with torch.no_grad():
        clipped = ((ratio - 1).abs() > clip_coef).float().mean()
    return loss, kl_estimate(logp - old_logp), clipped


@torch.no_grad()
def kl_estimate(log_ratio):
    """E[ρ − 1 − log ρ], k3 of joschu.net/blog/kl-approx: KL(old ‖ new) by samples of the old."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def kl_penalty(answer_logp, start_logp):
    """½ E[(log π − log π_start)²] of whole answers, both (B,): a loss whose gradient is KL's.

    Averaged over samples of π its gradient is E[(log π − log π_start) ∇ log π], which is that of
    KL(π ‖ π_start). GRPO's k3 estimates the same KL, but its gradient is not that KL's. In later
    minibatches the samples are π_old's, a little off, as in all of PPO.
    """
    return 0.5 * ((answer_logp - start_logp) ** 2).mean()


def value_loss(values, returns):
    """½ E[(V − R)²] of values and returns, both (B,)."""
    return 0.5 * ((values - returns) ** 2).mean()


def explained_variance(values, returns) -> float | None:
    """1 − Var(R − V) / Var(R): 1 is a perfect value function, 0 no better than a constant.

    None where R is constant.
    """
    variance = returns.var()                            # over the rollout, (S,)
    # not quite 0 where R is constant: R = (R − V) + V was rounded
    if variance.sqrt() <= 1e-6 * max(1.0, returns.abs().max().item()):
        return None
    return (1 - (returns - values).var() / variance).item()


def minibatches(samples, size, epochs, generator) -> list[list[int]]:
    """Lists of `size` of the indices 0 … samples − 1; each epoch has all of them in a new order.

    Somewhat smaller where it does not divide them: a last one of two answers would be a step too.
    """
    count = math.ceil(samples / size)
    bounds = [samples * k // count for k in range(count + 1)]
    orders = [torch.randperm(samples, generator=generator).tolist() for _ in range(epochs)]
    return [order[low:high] for order in orders for low, high in zip(bounds, bounds[1:])]


def ppo_update(policy, optimizer, rollout, settings, generator: torch.Generator) -> dict:
    """Improve the policy on one rollout; return diagnostics, means over its minibatches.

    policy: anything with `logprobs(prompts, responses, shape) → (logp, value)`,
    `prompt_hidden` and `value_head`, such as policy.Policy. optimizer: its first group of
    parameters is the policy's, its second the value head's. rollout: rollout.Rollout, scored and
    with advantages. generator: a CPU one, for the order of samples. Under torchrun every process
    passes its own samples, 1/size of each minibatch. Raises FloatingPointError where a loss or a
    gradient is not finite.
    """
    names = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "answer_kl")
    history = []            # each minibatch's diagnostics: those, then the gradients' norm
    ratio_error = 0.0       # the first minibatch's max |ρ − 1|: no step was taken, so it is to be 0
    batches = minibatches(len(rollout.responses), settings.minibatch_size // parallel.size(),
                          settings.update_epochs, generator)
    for number, batch in enumerate(batches):            # batch: sample indices
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(names))
        for group, prompts, responses, shape in rollout.micro_batches(batch):
            logp, values = policy.logprobs(prompts, responses, shape)   # (B, T), (B,)
            starts, old_logp, old_answer_logp, advantages, returns = (  # each (B,)
                column[group].to(logp.device) for column in (
                    rollout.action_starts, rollout.old_logp, rollout.old_answer_logp,
                    rollout.advantages, rollout.returns))
            new_logp = answer_logprob(logp, starts, settings.cot_lambda)
            if number == 0:
                error = ((new_logp - old_logp).exp() - 1).abs().max().item()
                ratio_error = max(ratio_error, error)
            p_loss, kl, clipped = policy_loss(new_logp, old_logp, advantages, settings.clip_coef)
            v_loss = value_loss(values, returns)        # no gradient into the model: ValueHead
            answer_logp = answer_logprob(logp, starts, cot_lambda=1.0)
            answer_kl = kl_estimate(answer_logp - old_answer_logp)
            loss = p_loss + v_loss
            if settings.kl_coef:        # off by default
                start_logp = rollout.start_logp[group].to(logp.device)
                loss = loss + settings.kl_coef * kl_penalty(answer_logp, start_logp)
            share = len(group) / len(batch)     # subtle: micro-batches add up to the batch's mean
            (share * loss).backward()
            found = torch.stack([p_loss.detach(), v_loss.detach(), kl, clipped, answer_kl])
            sums += share * found.cpu()
        norms = prepare_step(optimizer, sums, settings)     # norms: before clipping
        history.append([*sums.tolist(), norms[0].item()])
        approx_kl = sums[names.index("approx_kl")]          # by now the mean over the processes
        if settings.target_kl and approx_kl > settings.target_kl:
            # too far from the policy that sampled: no further step of it
            learn_values(policy, optimizer, rollout, settings, batches[number:])
            break
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)       # the next rollout has the memory
    # an update that stopped early has means over the minibatches that it looked at
    means = dict(zip((*names, "grad_norm"), torch.tensor(history).mean(0).tolist()))
    ratio_error = parallel.concat(torch.tensor([ratio_error])).max().item()
    return {**means, "minibatches": len(history), "ratio_error": ratio_error}


def learn_values(policy, optimizer, rollout, settings, batches):
    """The rest of an update that target_kl has stopped: the value head learns on alone.

    The policy moves no more, so one look at each prompt, without gradients, serves all the
    minibatches that are left.
    """
    size = settings.micro_batch_size
    hidden = torch.cat([                                                        # (S, D)
        policy.prompt_hidden(rollout.prompts[k:k + size])
        for k in range(0, len(rollout.prompts), size)])
    for batch in batches:
        # subtle: no gradient at all for the policy. With one of zero, Adam's momentum would still
        # move it.
        optimizer.zero_grad(set_to_none=True)
        values, returns = policy.value_head(hidden[batch]), rollout.returns[batch]      # (B,)
        loss = value_loss(values, returns.to(hidden.device))
        loss.backward()
        prepare_step(optimizer, loss.detach().cpu(), settings)
        optimizer.step()


def prepare_step(optimizer, numbers, settings):
    """Average gradients over processes, clip each group's alone; return the groups' norms.

    numbers (n,): losses and the like, averaged in place. FloatingPointError where one of them, or a
    norm, is not finite.
    """
    # the mean first, so that every process clips the same gradients and takes the same step
    parallel.average([p for group in optimizer.param_groups for p in group["params"]], numbers)
    # apart: V's errors are large at first, and would shrink the policy's step
    norms = [
        torch.nn.utils.clip_grad_norm_(group["params"], settings.max_grad_norm)
        for group in optimizer.param_groups]
    if not (numbers.isfinite().all() and all(norm.isfinite() for norm in norms)):
        raise FloatingPointError(
            f"losses {numbers.flatten()[:2].tolist()}, norms of the gradients "
            f"{[norm.item() for norm in norms]}: no step was taken on this minibatch and the last "
            "checkpoint is intact; start a new run (--out) with a smaller --lr or --bits 32")
    return norms
