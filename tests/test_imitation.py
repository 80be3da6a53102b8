"""Self-imitation, which is ours and off by default."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

import imitation
import parallel
import ppo
import train
from plumbing import checkpoint
from tests.common import make_run, play_out, run_metrics, stop_at


def imitate(run):
    return imitation.imitate(run.policy, run.optimizers["imitation"], run.imitation_buffer, run.games[0], run.settings,
                             run.shuffling)


def test_what_is_kept_of_won_games():
    """Two games over two rollouts, by hand: one is won across both, without its punished step; one lost, then won,
    without its answer that named no action."""
    won = imitation.WonGames(2)
    rewards = [torch.tensor([[0.0, 0.0], [-1.0, -1.0]]), torch.tensor([[10.0, 0.0], [0.0, 10.0]])]
    ended = [torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])]
    for r in range(2):
        names = [f"rollout {r} step {t} game {n}" for t in range(2) for n in range(2)]
        choices = [SimpleNamespace(named=name != "rollout 1 step 0 game 1") for name in names]
        won.add(SimpleNamespace(rewards=rewards[r], terminated=ended[r], truncated=torch.zeros(2, 2),
                                states=names, responses=names, choices=choices))
        if r == 0:
            assert not won.kept and [len(waiting) for waiting in won.waiting] == [1, 0]
            again = imitation.WonGames(2)
            again.set_state(json.loads(json.dumps(won.get_state())))            # as through a checkpoint
            assert again.get_state() == won.get_state() and again.kept.maxlen == imitation.KEPT
    assert [state for state, _ in won.kept] == ["rollout 0 step 0 game 0", "rollout 1 step 0 game 0",
                                                "rollout 1 step 1 game 1"]
    assert won.waiting == [[["rollout 1 step 1 game 0"] * 2], []]
    won.add(SimpleNamespace(rewards=torch.ones(1, 2), terminated=torch.zeros(1, 2), truncated=torch.ones(1, 2),
                            states=["a", "b"], responses=["a", "b"], choices=choices))
    assert len(won.kept) == 3 and won.waiting == [[], []]                       # time was up: not won


def test_imitation_makes_won_answers_likelier(shipped, monkeypatch):
    """By transformers' own loss as well; V, its optimiser and the games stay as they are."""
    run = make_run(shipped, "ezpoints", imitation=2, minibatch_size=8, num_steps=6, total_timesteps=96)
    none = imitate(run)
    assert none == {"won_answers": 0, "imitation_loss": None}
    rollout = play_out(run)
    run.imitation_buffer.add(rollout)
    kept = [rollout.states.index(state) for state, _ in run.imitation_buffer.kept]
    assert 16 <= len(kept) < len(rollout.states) and all(rollout.rewards.view(-1)[i] >= 0 for i in kept)
    score = lambda: run.policy.logprobs([rollout.prompts[i] for i in kept],
                                        [rollout.responses[i] for i in kept])[0].sum().item()
    before, states = score(), [game.get_state() for game in run.games]
    head = copy.deepcopy(run.policy.value_head.state_dict())
    some = [kept[i] for i in torch.randperm(len(kept), generator=torch.Generator().set_state(run.shuffling.get_state()))
            .tolist()[:16]]                                             # two minibatches of 8, drawn
    first = [rollout.responses[i] for i in some[:8]]
    expected = -run.policy.logprobs([rollout.prompts[i] for i in some[:8]], first)[0].sum().item()
    losses, prepare = [], imitation.prepare_step
    monkeypatch.setattr(imitation, "prepare_step", lambda optimizer, loss, settings: (
        losses.append(loss.item()), prepare(optimizer, loss, settings)))
    found = imitate(run)
    assert losses[0] == pytest.approx(expected / sum(map(len, first)), rel=1e-4)              # a token
    assert found["imitation_loss"] == pytest.approx(sum(losses) / 2) and len(losses) == 2
    assert found["won_answers"] == len(kept) and found["imitation_loss"] > 0 and score() > before
    assert [game.get_state() for game in run.games] == states
    assert all(torch.equal(head[name], now) for name, now in run.policy.value_head.state_dict().items())
    assert not any(run.optimizer.state[p] for p in run.optimizer.param_groups[1]["params"])


def test_imitation_does_not_go_on_with_ppos_momentum(shipped, monkeypatch):
    """After an update of PPO, steps without a gradient move nothing, and PPO's moments stay as they are."""
    run = make_run(shipped, "ezpoints", imitation=2, minibatch_size=8, num_steps=6, total_timesteps=96)
    rollout = play_out(run)
    ppo.ppo_update(run.policy, run.optimizer, rollout, run.settings, run.shuffling)
    run.imitation_buffer.add(rollout)
    before = [p.detach().clone() for _, p in run.policy.trainable()]
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])

    def silent(optimizer, loss, settings):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.zero_()

    with monkeypatch.context() as control:
        control.setattr(imitation, "prepare_step", silent)
        assert imitate(run)["won_answers"] >= 16
    assert all(torch.equal(old, p) for old, (_, p) in zip(before, run.policy.trainable()))
    found = train.imitate_own_wins(run, rollout)
    assert any(not torch.equal(old, p) for old, (_, p) in zip(before, run.policy.trainable()))
    assert all(torch.equal(old[key], moments_now[key]) for old, moments_now in zip(
        moments.values(), run.optimizer.state_dict()["state"].values()) for key in old)
    # its KL counts all steps: every sample scored again, by hand
    total = 0.0
    for group, prompts, responses, shape in rollout.micro_batches(range(len(rollout.responses))):
        with torch.no_grad():
            logp, _ = run.policy.logprobs(prompts, responses, shape)
        new = ppo.answer_logprob(logp, rollout.action_starts[group], run.settings.cot_lambda)
        d = new - rollout.old_logp[group]
        total += (d.exp() - 1 - d).sum().item()
    assert found["kl_after_imitation"] == pytest.approx(total / len(rollout.responses), rel=1e-4) and total > 0


def test_processes_imitate_equally_often(shipped, monkeypatch):
    """Each takes as many steps as the one that has kept the fewest; a minibatch is shared out among them."""
    run, asked, scored = make_run(shipped, "numberline", imitation=3, minibatch_size=8), [], []
    logprobs = run.policy.logprobs
    monkeypatch.setattr(run.policy, "logprobs", lambda prompts, answers, *shape: (
        scored.append(len(answers)), logprobs(prompts, answers, *shape))[1])
    rollout = play_out(run)
    scored.clear()
    run.imitation_buffer.kept.extend(zip(rollout.states, rollout.responses))
    monkeypatch.setattr(run.policy, "encode_answers", None)             # sampled ids are learned, not the text's
    monkeypatch.setattr(run.optimizers["imitation"], "step", lambda: asked.append(0))
    for other, steps in ((None, 3), (0, 0), (2, 2)):
        if other is not None:
            monkeypatch.setattr(parallel, "size", lambda: 2)
            monkeypatch.setattr(parallel, "concat", lambda mine, other=other: torch.cat([mine, torch.tensor([other])]))
            monkeypatch.setattr(parallel, "average", lambda parameters, losses: None)
        imitate(run)
        assert len(asked) == steps and sum(scored) == steps * (8 if other is None else 4)
        asked.clear()
        scored.clear()


def test_a_run_that_imitates_itself_goes_on_as_if_never_stopped(tmp_path, monkeypatch):
    command = ["--task", "numberline", "--model", "pocket", "--num-envs", "8", "--num-steps", "4", "--rank", "2",
               "--total-timesteps", "64", "--minibatch-size", "4", "--update-epochs", "1", "--eval-episodes", "0",
               "--max-new-tokens", "80", "--imitation", "1"]
    train.main([*command, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(1, checkpoint.save))
        with pytest.raises(SystemExit, match="--resume"):
            train.main([*command, "--out", str(tmp_path / "stopped")])
    train.main([*command, "--out", str(tmp_path / "stopped"), "--resume"])
    one, other = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped"))
    assert one == other
    rows = run_metrics(tmp_path / "whole")
    assert rows[-1]["won_answers"] > rows[0]["won_answers"] >= 4 and rows[-1]["imitation_loss"] > 0
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "imitation.safetensors", "process0.json"):
        one, other = ((checkpoint.newest_checkpoint(tmp_path / name) / file).read_bytes()
                      for name in ("whole", "stopped"))
        assert one == other
