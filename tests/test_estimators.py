"""Advantages without V, and the KL to where RL began: ours, off by default."""

import copy
import json

import pytest
import torch

import groups
import lora
import ppo
import rollout as playing
import train
from env import make_game
from plumbing import checkpoint
from plumbing.adapters import load_adapters, save_adapters
from policy import Policy
from tests.common import make_run, run_metrics, samples_of, shake, stop_at


def group_rollout(shipped, task="blackjack", **changes):
    run = make_run(shipped, task, **({"advantage": "rloo", "group_size": 4, "minibatch_size": 8} | changes))
    rollout = groups.collect_groups(run.policy, run.games, run.settings, run.sampling, run.fallback)
    playing.score_rollout(run.policy, rollout, run.settings, run.start)
    groups.add_group_advantages(run.policy, rollout, run.settings)
    return run, rollout


def test_group_advantages_by_hand():
    returns = torch.tensor([[1.0, 0.0, -1.0, 1.0], [10.0, 10.0, 10.0, 10.0]])
    for row, own in zip(returns.tolist(), groups.group_advantages(returns).tolist()):
        for i, value in enumerate(row):                                     # RLOO: the mean of the others
            others = row[:i] + row[i + 1:]
            assert own[i] == pytest.approx(value - sum(others) / 3, abs=1e-6)
    divided = groups.group_advantages(returns, divide=True)
    # of 1, 0, −1, 1: mean 0.25, variance (0.5625 · 2 + 0.0625 + 1.5625) / 3 = 0.9167
    assert divided[0].tolist() == pytest.approx([0.75 / 0.9576, -0.25 / 0.9576, -1.25 / 0.9576, 0.75 / 0.9576], abs=2e-3)
    assert divided[1].tolist() == [0, 0, 0, 0]                              # all alike: nothing to learn


def test_minibatches_are_of_about_one_size():
    generator = torch.Generator().manual_seed(0)
    sizes = [len(batch) for batch in ppo.minibatches(514, 128, 2, generator)]
    assert sizes == 2 * [102, 103, 103, 103, 103]                           # not 128, 128, 128, 128, 2
    assert sorted(sum(ppo.minibatches(514, 128, 1, generator), [])) == list(range(514))
    assert [len(batch) for batch in ppo.minibatches(3, 8, 1, generator)] == [3]


@pytest.mark.parametrize("task", ["blackjack", "ezpoints"])
def test_episodes_of_a_deal_are_played_to_their_ends(shipped, task):
    run, rollout = group_rollout(shipped, task, reward_scale=1.0)
    S, k = len(rollout.responses), run.settings.group_size
    assert S >= run.settings.batch_size and len(rollout.episodes) % k == 0
    by_episode = {}
    for sample, episode in enumerate(rollout.episode_of.tolist()):
        by_episode.setdefault(episode, []).append(sample)
    assert sorted(by_episode) == list(range(len(rollout.episodes)))         # each ended, and has a number
    returns = {episode: rollout.rewards[samples].sum().item() for episode, samples in by_episode.items()}
    assert sorted(returns.values()) == sorted(value for value, _ in rollout.episodes)
    for episode, samples in by_episode.items():
        # a deal's episodes begin alike, and an episode has one advantage: its return against the others' of the deal
        group = range(episode // k * k, episode // k * k + k)
        first = {name: value for name, value in rollout.infos[samples[0]].items() if name != "is_success"}
        assert all(first.items() <= rollout.infos[by_episode[other][0]].items() for other in group)
        others = [returns[other] for other in group if other != episode]
        expected = returns[episode] - sum(others) / (k - 1)
        assert rollout.advantages[samples].tolist() == pytest.approx([expected] * len(samples), abs=1e-5)
        to_go = [rollout.rewards[samples[k:]].sum().item() for k in range(len(samples))]
        assert rollout.returns[samples].tolist() == pytest.approx(to_go)
    assert len({str(rollout.infos[by_episode[e][0]]) for e in range(0, len(by_episode), k)}) > 1     # other deals
    assert all(game.over for game in run.games)


def test_a_deals_episodes_have_the_same_chance_in_store(shipped):
    """Whoever hits gets the same card, so the others' mean takes the luck of the draw out as well."""
    run, rollout = group_rollout(shipped, num_steps=8, total_timesteps=128)
    drawn = {}
    for sample, episode in enumerate(rollout.episode_of.tolist()):
        drawn.setdefault(episode // 4, set()).add(tuple(rollout.infos[sample]["hand"]))
    for hands in drawn.values():
        assert all(long[:len(short)] == short for short in hands for long in hands if len(short) <= len(long))


def test_the_start_is_what_the_adapters_were(agent, shipped, tmp_path):
    """By a second policy that reads them from a folder, also after the first has learned."""
    shake(agent)
    save_adapters(agent.lora, tmp_path, "pocket", agent.rank, agent.alpha)
    start, (prompts, responses) = lora.FrozenCopy(agent.lora), samples_of(agent, 1)
    again = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=8, seed=9)
    load_adapters(again.lora, tmp_path)
    shake(agent, seed=5)
    with torch.no_grad():
        moved = agent.logprobs(prompts, responses)[0]
        expected = again.logprobs(prompts, responses)[0]
        with start.in_place():
            assert torch.equal(agent.logprobs(prompts, responses)[0], expected)
        assert torch.equal(agent.logprobs(prompts, responses)[0], moved) and not torch.equal(moved, expected)
        with pytest.raises(RuntimeError, match="in between"), start.in_place():
            raise RuntimeError("in between")
        assert torch.equal(agent.logprobs(prompts, responses)[0], moved)


def test_the_kl_penaltys_gradient_is_the_divergences():
    """Of all two-token answers over three tokens, weighted as π samples them; k3's gradient is another."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)
    parameters = [first.requires_grad_(), second.requires_grad_()]
    start = torch.log_softmax(torch.randn(9, generator=generator), 0)

    def answers():                                                          # (9,) log π of each answer
        return (first.log_softmax(0)[:, None] + second.log_softmax(1)).flatten()

    logp = answers()
    exact = torch.autograd.grad((logp.exp() * (logp - start)).sum(), parameters)
    logp = answers()
    chances = logp.exp().detach()
    ours = torch.autograd.grad(
        sum(p * ppo.kl_penalty(logp[[i]], start[[i]]) for i, p in enumerate(chances)), parameters)
    logp = answers()
    k3 = torch.autograd.grad((chances * ((start - logp).exp() - 1 - (start - logp))).sum(), parameters)
    for one, other, third in zip(exact, ours, k3):
        assert torch.allclose(one, other, atol=1e-6) and not torch.allclose(one, third, atol=1e-2)


def test_a_kl_penalty_leads_back(shipped):
    """Where there is no advantage it alone pulls: after an update the policy is nearer to its start."""
    run = make_run(shipped, "numberline", kl_coef=1.0, minibatch_size=16, lr=3e-4)
    shake(run.policy, size=0.1)

    def rollout():
        found = playing.collect(run.policy, run.games, run.settings, run.sampling, run.fallback)
        playing.score_rollout(run.policy, found, run.settings, run.start)
        playing.add_advantages(run.policy, found, run.settings)
        found.advantages = torch.zeros_like(found.advantages)
        return found, playing.rollout_metrics(found, run.settings, run.games[0])["kl_to_start"]

    one, before = rollout()
    by_hand = (one.old_answer_logp - one.start_logp).mean()
    assert before == pytest.approx(by_hand.item(), rel=1e-5) and before > 0.05
    for _ in range(3):
        ppo.ppo_update(run.policy, run.optimizer, one, run.settings, run.shuffling)
        one, after = rollout()
    assert after < 0.7 * before


def test_a_run_in_groups_goes_on_as_if_never_stopped(tiny, tmp_path, monkeypatch):
    """With its start, which are adapters that were taught: the plain model is another place."""
    import sft
    sft.main(["--task", "numberline", "--model", str(tiny), "--rank", "2", "--steps", "2", "--batch-size", "4",
              "--lr", "0.01", "--out", str(tmp_path / "taught")])
    command = ["--task", "numberline", "--model", str(tmp_path / "taught"), "--advantage", "rloo", "--group-size", "2",
               "--kl-coef", "0.1", "--num-envs", "4", "--num-steps", "4", "--total-timesteps", "160",
               "--max-new-tokens", "4", "--minibatch-size", "8", "--eval-episodes", "0", "--lr", "1e-3"]
    train.main([*command, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(1, checkpoint.save))
        with pytest.raises(SystemExit):
            train.main([*command, "--out", str(tmp_path / "cut")])
    train.main(["--out", str(tmp_path / "cut"), "--resume"])
    whole, cut = run_metrics(tmp_path / "whole"), run_metrics(tmp_path / "cut")
    assert whole == cut and len(whole) > 2 and whole[0]["kl_to_start"] == 0 < whole[-1]["kl_to_start"]
    # steps are counted as they were played, and the run ends when there are enough
    assert all(row["env_steps"] > 16 * row["update"] for row in whole)
    assert whole[-2]["env_steps"] < 160 <= whole[-1]["env_steps"]


@pytest.mark.parametrize("flags, message", [
    (["--advantage", "rloo", "--group-size", "5"], "divide --num-envs"),
    (["--advantage", "grpo", "--group-size", "1"], "2 or more"),
    (["--advantage", "rloo", "--imitation", "2"], "gae alone"), (["--kl-coef", "-1"], "not be negative")])
def test_what_does_not_go_together_is_said(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train.main(["--task", "blackjack", "--model", "pocket", *flags, "--out", str(tmp_path / "x")])


def test_withheld_deals_never_come_in_training_and_all_do_in_evaluation():
    for name, deals, withheld in (("NumberLine", 30, 5), ("EZPoints", 304, 64)):
        task = f"examples/withheld.py:{name}"
        game, held_out = make_game(task), make_game(task, withhold=False)
        dealt = {game.kind for seed in range(300) if game.reset(seed=seed)}
        assert dealt == {"seen"} and {held_out.kind for seed in range(300) if held_out.reset(seed=seed)} == {
            "seen", "withheld"}
        kinds = [deal["kind"] for _, deal in game.all_deals()]
        assert len(kinds) == deals and kinds.count("withheld") == withheld
        state = json.loads(json.dumps(held_out.get_state()))
        make_game(task).set_state(state)
    game = make_game("examples/withheld.py:NumberLine")
    # nor on the way: a state's target is its deal's
    for _, deal in game.all_deals():
        if deal["kind"] == "seen":
            game.reset(seed=0, options={"deal": deal})
            assert game._kind(vars(game)) == "seen"
