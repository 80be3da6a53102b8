"""The policy beside its main claims: value head, frozen towers, checkpointing, a model that has diverged."""

import copy
import shutil

import pytest
import torch

import families
import parse
import ppo
import sft
from env import GAMES
from policy import Policy, ValueHead
from tests.common import family_agent, mixed_prompts, samples_of, shake, states_of


def test_a_frozen_vision_tower_looks_once_at_a_picture(shipped):
    looks = []
    agent = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2, target_modules=("language",))
    agent.model.model.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    prompts, responses = samples_of(agent, 1, ("blackjack",), tokens=5)
    first = agent.logprobs(prompts, responses)[0]
    once = len(looks)
    again = agent.logprobs(prompts[::-1], responses[::-1])[0].flip(0)
    assert once == len(looks) == 1 and (first.exp() < 1).any()
    learns = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2)      # where it learns, nothing is kept
    torch.testing.assert_close(learns.logprobs(prompts, responses)[0], first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)
    agent.logprobs(prompts, responses)[0].sum().backward()
    assert all(layer.lora_A.grad is not None for layer in agent.lora.values())
    prompts, responses = samples_of(learns, 1, ("blackjack",), tokens=5)
    learns.logprobs(prompts, responses)
    assert all(prompt.features is None for prompt in prompts)


def test_last_hidden_states_are_nearly_alike_and_yet_tell_the_state(shipped):
    """What V reads on NumberLine: a spread of less than a tenth, from which a least-squares fit reads both numbers."""
    agent = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=1)
    states = states_of("numberline", 200)
    prompts = agent.encode([picture for _, picture, _ in states],
                           [parse.make_prompt(game, info) for game, _, info in states])
    hidden = agent.prompt_hidden(prompts)
    assert 0.05 < hidden.std(0).mean() / hidden.abs().mean() < 0.08                # README: a fifteenth
    agent.value_head.fit(hidden[:150])
    inputs = torch.cat([agent.value_head.standardised(hidden), torch.ones(200, 1)], 1)
    for name in ("target", "current"):
        numbers = torch.tensor([[float(info[name])] for *_, info in states])
        found = inputs @ torch.linalg.lstsq(inputs[:150], numbers[:150]).solution
        assert ppo.explained_variance(found[150:], numbers[150:]) > 0.95


def test_an_input_that_first_varies_after_the_first_rollout_moves_v_as_any_other():
    head = ValueHead(8, torch.Generator().manual_seed(1))
    states = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    states[:, 3] = 1
    head.fit(states)
    moved = states.clone()
    moved[:, 3] += 2**-7                                                # one step of bfloat16
    torch.testing.assert_close(head(moved), head(states), atol=0.01, rtol=0)


def test_values_of_states_that_are_nearly_the_same_vector():
    """States vary by 5 % around a large common part: on standardised inputs V tells them apart, on raw ones not."""
    generator = torch.Generator().manual_seed(0)
    states = 10 + 0.05 * torch.randn(256, 32, generator=generator)
    returns, explained = 5 * (states[:, 0] - 10), {}
    for fitted in (False, True):
        head = ValueHead(32, torch.Generator().manual_seed(1))
        if fitted:
            head.fit(states)
            inputs = (states - head.mean) / head.std
            torch.testing.assert_close(inputs.std(0), torch.ones(32))
            torch.testing.assert_close(inputs.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
        for _ in range(60):
            optimizer.zero_grad()
            (0.5 * (head(states) - returns) ** 2).mean().backward()
            optimizer.step()
        explained[fitted] = ppo.explained_variance(head(states).detach(), returns)
    assert explained[True] > 0.9 and explained[False] < 0.3
    assert head(states.bfloat16()).dtype == torch.float32


def test_a_model_that_has_diverged_draws_no_answer(agent):
    """Not the first token, as argmax of nan is, nor torch's own error: a sentence. Nor does sft.py take a bad step."""
    game = GAMES["numberline"]()
    picture, info = game.reset(seed=0)
    prompts = agent.encode([picture], [parse.make_prompt(game, info)])
    learns = next(parameter for name, parameter in agent.trainable() if "lora_B" in name)
    optimizer = torch.optim.Adam([learns], lr=1e-3)
    hook = learns.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    one = sft.Demonstration(picture, parse.make_prompt(game, info), parse.make_answer("I choose +.", "+"))
    with pytest.raises(FloatingPointError, match="norm inf|norm nan"):
        sft.step(agent, [learns], optimizer, [one], 1)
    hook.remove()
    assert learns.isfinite().all() and not optimizer.state
    shake(agent, size=1e30)
    for greedy in (False, True):
        with pytest.raises(FloatingPointError, match="has diverged.*smaller --lr"):
            agent.generate(prompts, torch.Generator().manual_seed(0), 8, greedy=greedy)


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_changes_nothing(agent, shipped, every):
    """Although it needs train mode: whatever dropout a model's configuration brought is off."""
    model = copy.deepcopy(shipped[0])
    dropping = [module for module in model.modules() if isinstance(getattr(module, "dropout", None), float)]
    for module in dropping:
        module.dropout = 0.1
    saving = Policy(model, shipped[1], rank=8, seed=3, gradient_checkpointing=every)
    assert dropping
    shake(agent), shake(saving)
    prompts, responses = samples_of(agent, 1)
    for one in (agent, saving):
        logp, value = one.logprobs(prompts, responses)
        (logp.sum() + value.sum()).backward()
    for (name, a), (_, b) in zip(agent.trainable(), saving.trainable()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_modes_that_somebody_else_sets_are_set_again(shipped):
    saving = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2, seed=3, gradient_checkpointing=1)
    prompts, responses = samples_of(saving, 1, ("blackjack",))
    for module in (saving, saving.model):
        module.train()                              # checkpointing would take the cache away
        assert saving.generate(prompts, torch.Generator().manual_seed(0), 60, parse.json_closed) == responses
        saving.logprobs(prompts, responses)
        module.eval()
        saving.logprobs(prompts, responses)
        assert saving.model.training                # with gradients: checkpointing is on


def test_scoring_is_repeatable_and_leaves_the_global_generator_alone(agent):
    prompts, responses = samples_of(agent, 1)
    before = torch.get_rng_state()
    first, second = agent.logprobs(prompts, responses)[0], agent.logprobs(prompts, responses)[0]
    agent.generate(prompts, torch.Generator().manual_seed(0), 3)
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())


def test_pixels_are_the_processors_base_view(agent):
    pictures = [picture for _, picture, _ in states_of("blackjack", 3)]
    theirs = agent.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"][:, 0]
    torch.testing.assert_close(families.base_view(pictures, agent.processor, 120), theirs, atol=2e-6, rtol=0)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler")
def test_compiled_layers_score_as_they_learn(tiny_families):
    """One program for all layers and shapes; ratios of exactly 1, gradients to tolerance, and playing left as it was."""
    plain, compiled = (family_agent(tiny_families["llava"]) for _ in range(2))
    for agent in (plain, compiled):
        shake(agent, size=0.1)
    prompts, _, _ = mixed_prompts(plain)
    before = compiled.generate(prompts, torch.Generator().manual_seed(0), 12)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_layers()
    assert compiled.generate(prompts, torch.Generator().manual_seed(0), 12) == before
    for responses in ([[5, 6]] * 3, [[7] * 9, [8] * 2, [9]]):
        with torch.no_grad():
            old, _ = compiled.logprobs(prompts, responses)
            assert not old.requires_grad
        new, value = compiled.logprobs(prompts, responses)
        expected, expected_value = plain.logprobs(prompts, responses)
        assert torch.equal(old, new)
        torch.testing.assert_close(new, expected, atol=1e-5, rtol=1e-5)
        (new.sum() + value.sum()).backward()
        (expected.sum() + expected_value.sum()).backward()
    torch.testing.assert_close(compiled.value(prompts), value, atol=1e-5, rtol=1e-5)
    assert not compiled.prompt_hidden(prompts).requires_grad
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for (name, a), (_, b) in zip(compiled.trainable(), plain.trainable()):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)
    assert compiled.generate(prompts, torch.Generator().manual_seed(0), 12) == before
