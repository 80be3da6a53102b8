"""decode.py: both caches draw the same tokens, a step can be captured, and what is cast for playing follows what learns."""

import contextlib
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import decode
import families
from env import GAMES
from lab.bench import decoding
from lab.shapes import byte_processor, llava_7b_config
from parse import make_prompt
from policy import Policy, load_model
from tests import tiny as tiny_models
from tests.common import family_agent, mistral_model, mixed_prompts, samples_of, shake, states_of

FIXED = [kind for kind in tiny_models.KINDS if families.FAMILIES[kind].fixed_cache]
# what makes a program wait for a GPU, or look at its numbers
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "unique", "masked_select", "bincount")


def test_the_families_that_keep_the_growing_cache_are_named():
    assert set(tiny_models.KINDS) - set(FIXED) == {"gemma3", "qwen3_5"}


@pytest.mark.parametrize("kind", FIXED)
def test_both_caches_draw_the_same_tokens(tiny_families, kind, monkeypatch):
    """Prompts of three lengths, read at once or one by one; a cache that is used again; adapters that have learned."""
    agent = family_agent(tiny_families[kind])
    prompts, _, _ = mixed_prompts(agent)
    caches = []
    for shaken, group in ((1, 8192), (2, 1)):
        shake(agent, seed=shaken, size=0.1)
        monkeypatch.setattr(decode, "PASS_TOKENS", group)
        answers = {}
        for agent.decoding in ("growing", "fixed"):
            steps, plain = [], agent.log_softmax
            agent.log_softmax = lambda hidden, plain=plain, steps=steps: steps.append(plain(hidden)) or steps[-1]
            answers[agent.decoding] = agent.generate(prompts, torch.Generator().manual_seed(0), 20)
            del agent.log_softmax
        assert answers["growing"] == answers["fixed"]
        caches.append(agent.cache)
    assert caches[0] is caches[1] and agent.cache.kind[0] == 3 and agent.cache.kind[1] % decode.SLOTS == 0
    logp, _ = agent.logprobs(prompts, answers["fixed"])
    for row, response in enumerate(answers["fixed"]):
        decoded = torch.stack([steps[t][row, token] for t, token in enumerate(response)])
        torch.testing.assert_close(logp[row, :len(response)], decoded, atol=2e-6, rtol=1e-5)
    assert agent.cache is None and agent.fp32_head is None              # learning has the memory


class Operations(TorchDispatchMode):
    """The names of all that is computed."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        self.names.append(str(function))
        return function(*arguments, **(more or {}))


@pytest.mark.parametrize("kind", FIXED)
def test_a_step_waits_for_nothing_and_stays_where_it_is(tiny_families, kind, monkeypatch):
    """So it can be captured: no number of it is looked at, and its tensors keep their addresses."""
    agent = family_agent(tiny_families[kind])
    prompts, _, _ = mixed_prompts(agent)
    agent.decoding = "fixed"
    agent.generate(prompts, torch.Generator().manual_seed(0), 2)
    cache = agent.cache

    def addresses():
        tensors = [cache.token, cache.slot, cache.mask, cache.position]
        tensors += [tensor for layer in cache.inner.layers for tensor in (layer.keys, layer.values)]
        return [tensor.data_ptr() for tensor in tensors], [tensor.shape for tensor in tensors]

    before, slot = addresses(), cache.slot.item()
    for name in ("tolist", "numpy", "cpu", "item", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the step looks at a number"))
    with torch.no_grad(), Operations() as found:
        cache.step(torch.ones(3, 1, dtype=torch.long))
    monkeypatch.undo()
    assert not [name for name in found.names if any(wait in name for wait in WAITS)]
    assert addresses() == before and cache.slot.item() == slot + 1


def test_a_growing_cache_is_found_to_wait(agent):
    """The test above can fail: transformers looks into a mask of two dimensions."""
    prompts, _ = samples_of(agent, 1, ("blackjack",), tokens=2)
    with Operations() as found:
        agent.generate(prompts, torch.Generator().manual_seed(0), 2)
    assert [name for name in found.names if any(wait in name for wait in WAITS)]


def test_a_decoding_step_at_true_depth_has_1800_kernels_at_most():
    """32 layers with all their adapters; widths, which change no count, are tiny."""
    model = mistral_model(llava_7b_config(byte_processor()), layers=32, side=56).to(torch.bfloat16)
    agent = Policy(model, byte_processor(), rank=4)
    prompts, _, _ = mixed_prompts(agent)
    _, growing = decoding(agent, prompts, tokens=4)
    agent.decoding = "fixed"
    _, fixed = decoding(agent, prompts, tokens=4)
    assert fixed <= 1800 < growing <= 1900


def test_a_gpu_that_captures_nothing_goes_on_and_says_so_once(agent, monkeypatch):
    prompts, _ = samples_of(agent, 1, ("blackjack", "points24"), tokens=2)
    expected = agent.generate(prompts, torch.Generator().manual_seed(0), 12)

    def fails(cache):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode.FixedCache, "_capture", fails)
    agent.decoding = "captured"
    with pytest.warns(UserWarning, match="no decoding step could be captured.*not permitted"):
        assert agent.generate(prompts, torch.Generator().manual_seed(0), 12) == expected
    cache = agent.cache
    assert agent.generate(prompts, torch.Generator().manual_seed(0), 12) == expected and agent.cache is cache
    agent.logprobs(prompts, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agent.generate(prompts, torch.Generator().manual_seed(0), 12) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_captured_step_draws_the_same_tokens(shipped):
    """On a GPU, in the pocket model's own type; a second call replays the same graph."""
    agent = Policy(copy.deepcopy(shipped[0]).cuda(), shipped[1], rank=8, seed=3)
    with torch.no_grad():
        for layer in agent.lora.values():
            layer.lora_B.fill_(0.02)
    states = [state for task in GAMES for state in states_of(task, 2)]
    prompts = agent.encode([picture for _, picture, _ in states], [make_prompt(game, info) for game, _, info in states])
    found = {}
    for agent.decoding in ("growing", "fixed", "captured", "captured"):
        answers = agent.generate(prompts, torch.Generator("cuda").manual_seed(0), 40)
        assert found.setdefault(0, answers) == answers, agent.decoding
    assert agent.decoding == "captured" and agent.cache.graph


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_step_that_cannot_be_captured_is_taken_plainly(shipped, monkeypatch):
    """On a GPU: a step that looks at a number breaks the capture; the answers are those without one."""
    agent = Policy(copy.deepcopy(shipped[0]).cuda(), shipped[1], rank=8, seed=3)
    prompts, _, _ = mixed_prompts(agent)
    agent.decoding = "growing"
    expected = agent.generate(prompts, torch.Generator("cuda").manual_seed(0), 12)
    plain = decode.FixedCache._step
    monkeypatch.setattr(decode.FixedCache, "_step", lambda cache: (cache.slot.item(), plain(cache)))
    agent.decoding = "captured"
    with pytest.warns(UserWarning, match="no decoding step could be captured"):
        assert agent.generate(prompts, torch.Generator("cuda").manual_seed(0), 12) == expected
    assert agent.decoding == "fixed" and torch.cuda.current_stream() == torch.cuda.default_stream()


def test_what_is_cast_for_playing_follows_the_adapters(tmp_path):
    """In bf16, where adapters and head are copies: what learned since is played, as by a policy made anew."""
    tiny_models.make("llava", tmp_path)
    agents = [Policy(*load_model(str(tmp_path), bits=16), rank=2, temperature=0.7) for _ in range(2)]
    prompts, _, _ = mixed_prompts(agents[0])
    for agent in agents:
        agent.decoding = "fixed"
    before = agents[0].generate(prompts, torch.Generator().manual_seed(0), 20)
    layer = next(iter(agents[0].lora.values()))
    places = [tensor.data_ptr() for tensor in layer.copies]
    assert layer.copies[0].dtype == torch.bfloat16 and agents[0].fp32_head.dtype == torch.float32
    for agent in agents:
        shake(agent, size=0.3)
        with torch.no_grad():
            agent.model.get_output_embeddings().weight.mul_(1.5)
    # where gradients are wanted the copies are passed by: they would learn nothing
    agents[0].model.model(input_ids=torch.tensor([[5, 6]])).last_hidden_state.sum().backward()
    assert layer.copies is not None and next(layer.lora_B.grad for path, layer in agents[0].lora.items()
                                              if "language" in path).abs().sum() > 0
    after = [agent.generate(prompts, torch.Generator().manual_seed(0), 20) for agent in agents]
    assert after[0] == after[1] != before
    assert places == [tensor.data_ptr() for tensor in layer.copies]
    names = {name for name, _ in agents[0].named_parameters()}
    assert "fp32_head" not in names and not any("playing" in name for name in names)
    agents[0].value(prompts)
    assert layer.copies is None and agents[0].fp32_head is None


class Graph:
    """Stands in for a CUDA graph on a CPU: what is captured is the step, and to replay it is to do it again."""

    def __init__(self):
        self.played = 0

    def replay(self):
        self.played += 1
        self.step()


def test_the_steps_before_a_capture_leave_no_trace(agent, monkeypatch):
    """With stand-ins for CUDA's streams and graphs: the same tokens, one graph for many calls, another for other
    sizes, none kept when scoring has the memory."""
    prompts, _ = samples_of(agent, 2, tokens=2)
    shake(agent)
    made = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    steps = []
    plain = decode.FixedCache._step
    monkeypatch.setattr(decode.FixedCache, "_step", lambda cache: (
        steps.append(1), [setattr(graph, "step", lambda: plain(cache)) for graph in made[-1:]], plain(cache)))
    expected = [agent.generate(prompts[k:], torch.Generator().manual_seed(k), 20) for k in (0, 0, 3)]
    agent.decoding = "fixed"                                                # a cache without a graph
    agent.generate(prompts, torch.Generator().manual_seed(0), 20)
    steps.clear()
    agent.decoding = "captured"
    first, second = (agent.generate(prompts, torch.Generator().manual_seed(0), 20) for _ in range(2))
    assert len(made) == 1 and made[0].played > 10 and len(steps) == 4       # three to warm up, one that is captured
    third = agent.generate(prompts[3:], torch.Generator().manual_seed(3), 20)
    assert len(made) == 2 and [first, second, third] == expected
    agent.temperature = 0.4                                                 # is no part of what is captured
    cooler = agent.generate(prompts[3:], torch.Generator().manual_seed(3), 20)
    agent.decoding = "growing"
    assert len(made) == 2 and cooler == agent.generate(prompts[3:], torch.Generator().manual_seed(3), 20) != third
    agent.value(prompts[:1])
    assert agent.cache is None
