"""Writing answers a token at a time: prompts are read once, then each step adds a token to a cache.

    cache = open_cache(policy, positions, max_new_tokens)   # for B prompts
    logp = cache.read(prompts, ids, mask, positions)        # (B, W) of each answer's first token
    logp = cache.step(drawn)                                # (B, W) of the next; drawn: (B, 1)

Two caches give the same distribution. The one that grows is transformers' own and serves every
model. The fixed one is for a GPU: a step of a large model is some 1,700 small kernels, which a
program launches more slowly than the GPU runs them, so one step is captured as a CUDA graph and
replayed as a whole. Such a step must find everything at the addresses that it was captured with,
and must not wait for the CPU: keys and values lie in a fixed number of slots, and a mask tells
which of them hold a token. Does not handle: drawing, and when to stop (policy.py).
"""

import math
import warnings

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, StaticLayer

# A forward pass of so many tokens keeps a GPU busy.
PASS_TOKENS = 4096
# A fixed cache's slots are a multiple of this, so that it serves prompts that are a little longer.
SLOTS = 64


def open_cache(policy, positions, max_new_tokens):
    """The cache that a policy decodes with; a fixed one is used again while its kind stays.

    positions: the prompts', (B, P) or (3, B, P).
    """
    if policy.decoding == "growing":
        return GrowingCache(policy)
    slots = math.ceil((positions.shape[-1] + max_new_tokens) / SLOTS) * SLOTS
    kind = positions.shape[-2], slots, policy.decoding
    if policy.cache is None or policy.cache.kind != kind:
        policy.cache = None             # its memory first
        policy.cache = FixedCache(policy, positions, kind)
    return policy.cache


class GrowingCache:
    """A token's keys and values are put behind the others': any family, any machine.

    All prompts are read at once.
    """

    def __init__(self, policy):
        self.policy, self.inner = policy, None      # inner: transformers' own cache

    def read(self, prompts, ids, mask, positions):
        self.mask, self.position = mask, positions[..., -1:]
        return self._forward(ids, positions, self.policy.image_features(prompts))

    def step(self, drawn):
        self.mask, self.position = F.pad(self.mask, (0, 1), value=1), self.position + 1
        return self._forward(drawn, self.position)

    def _forward(self, ids, positions, features=None):
        output = self.policy.body(ids, self.mask, positions, features, self.inner, use_cache=True)
        self.inner = output.past_key_values
        return self.policy.log_softmax(output.last_hidden_state[:, -1])


class FixedLayer(StaticLayer):
    """A layer's keys and values, (B, heads, slots, head size) each; all layers share one `slot`.

    transformers' own count of the tokens stays 0: positions and mask are told to every pass.
    """

    def __init__(self, slots, slot):
        super().__init__(slots)
        self.slot = slot            # (1,) where the newest token lies

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values


class FixedCache:
    """Keys and values of B rows in a fixed number of slots; the step is captured where it can be.

    kind: (B, slots, policy.decoding). All that a step reads and writes is made here, once, and
    written over from then on. Prompts are read in groups of PASS_TOKENS.
    """

    def __init__(self, policy, positions, kind):
        self.policy, self.kind = policy, kind
        (rows, slots, decoding), device, dtype = kind, policy.device, policy.model.dtype
        text = policy.model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.inner = Cache([FixedLayer(slots, self.slot) for _ in range(text.num_hidden_layers)])
        self.inner.early_initialization(rows, heads, size, dtype, device)
        # what attention adds to its scores: 0 where a slot holds a token, else −∞
        self.mask = torch.full((rows, 1, 1, slots), -torch.inf, dtype=dtype, device=device)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)      # the one just drawn
        self.position = torch.zeros_like(positions[..., -1:])
        self.graph = None
        if decoding == "captured":
            try:
                self.graph = self._capture()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:       # what torch raises of a GPU
                policy.decoding = "fixed"
                self.kind = rows, slots, policy.decoding        # of this kind from now on
                warnings.warn(
                    f"no decoding step could be captured, so decoding is slower: {error}",
                    stacklevel=2)

    def _capture(self):
        # Some steps come first, on a stream of its own, for all that is made at a first call. They
        # leave tokens in the slots; `read` comes after and writes over all of it.
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):         # is left even where capturing fails
            for _ in range(3):
                self._step()
            with torch.cuda.graph(graph, stream=stream):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        return graph

    def read(self, prompts, ids, mask, positions):
        (B, P), ends = ids.shape, []
        size = max(1, PASS_TOKENS // P)
        for rows in (slice(k, k + size) for k in range(0, B, size)):
            output = self.policy.body(
                ids[rows], mask[rows], positions[..., rows, :],
                self.policy.image_features(prompts[rows]), use_cache=True)
            ends.append(output.last_hidden_state[:, -1].clone())        # not a view of all of it
            for own, layer in zip(self.inner.layers, output.past_key_values.layers):
                own.keys[rows, :, :P], own.values[rows, :, :P] = layer.keys, layer.values
                layer.keys = layer.values = None        # the next group has the memory
        self.slot.fill_(P - 1)
        self.mask.fill_(-torch.inf)
        self.mask[:, 0, 0, :P].masked_fill_(mask > 0, 0)
        self.position.copy_(positions[..., -1:])
        return self.policy.log_softmax(torch.cat(ends))

    def step(self, drawn):
        self.token.copy_(drawn)
        if self.graph:
            self.graph.replay()
        else:
            self._step()
        return self.policy.log_softmax(self.hidden)

    def _step(self):
        """The part of a step that is captured: up to the token's last hidden state (B, D)."""
        self.position += 1
        self.slot += 1
        self.mask.index_fill_(-1, self.slot, 0)
        # subtle: a mask of four dimensions is taken as it is. Into one of two transformers would
        # look, which waits for the GPU.
        output = self.policy.body(
            self.token, self.mask, self.position, cache=self.inner, use_cache=True)
        self.hidden = output.last_hidden_state[:, -1]
