"""LoRA: small trainable matrices beside frozen linear layers (arXiv 2106.09685).

    layers = add_lora(model, rank=128, alpha=256, target_modules=("language",), generator=generator)

Differs from PEFT, which the tests hold it against: no dropout, and B A x is added into W x by the
matrix product itself. Does not handle: files of adapters (plumbing/adapters.py).
"""

import contextlib
import math

import torch
from torch import nn

from families import part_of_path


class LoRALinear(nn.Module):
    """y = W x + (α/r) B A x  with W frozen; arXiv 2106.09685, equation 3.

    W is an nn.Linear or bitsandbytes' Linear4bit: only the layer's output is corrected. A (r, in)
    starts random, B (out, r) at zero, so the adapted layer starts as the layer it adapts. Both are
    kept in fp32, whatever W is in, and used in x's type.
    """

    copies = None       # (A, B) in the model's type, cast once for a batch of answers (generate)

    def __init__(self, base, rank, alpha, generator):
        super().__init__()
        self.base, self.scale = base, alpha / rank          # W stays where and what it is
        bound = 1 / math.sqrt(base.in_features)
        A = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(base.weight.device))    # the CPU's draw, on any device
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    # some modules read these themselves: SigLIP's pooling head to multiply, others for their type
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        own = self.lora_A, self.lora_B
        pair = own if torch.is_grad_enabled() else self.copies or own   # copies would learn nothing
        A, B = (weight.to(x.dtype) for weight in pair)
        rows = x.reshape(-1, x.shape[-1])                               # (tokens, in)
        # W x + (α/r) (x Aᵀ) Bᵀ, added in place: one kernel fewer, and no second output
        y = self.base(rows).addmm_(rows @ A.T, B.T, alpha=self.scale)   # (tokens, out)
        return y.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def cast(self, dtype):
        """Have A and B in a type: themselves, or copies that stay in place (decode.FixedCache)."""
        if self.copies is None or self.lora_A.dtype == dtype:
            self.copies = self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype)
        else:
            for copy, weight in zip(self.copies, (self.lora_A, self.lora_B)):
                copy.copy_(weight)


class FrozenCopy:
    """Adapters as they were: where RL began, for --kl-coef. With B = 0 that is the base model."""

    def __init__(self, layers: dict[str, LoRALinear]):
        self.layers = layers
        self.weights = [weight.detach().clone() for weight in self._own()]

    def _own(self):
        return [weight for layer in self.layers.values() for weight in (layer.lora_A, layer.lora_B)]

    @contextlib.contextmanager
    def in_place(self):
        """Let the policy be what it was, for as long as nothing learns."""
        now = [weight.data for weight in self._own()]
        try:
            self._put(self.weights)
            yield
        finally:
            self._put(now)

    def _put(self, tensors):
        for weight, tensor in zip(self._own(), tensors):
            weight.data = tensor


def add_lora(model, rank, alpha, target_modules, generator) -> dict[str, LoRALinear]:
    """Give every linear layer of target_modules (keys of PARTS, or layers' own paths) an adapter.

    All else is frozen, the output head too: it is in no part. Returns {module path: LoRALinear}.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = {}
    for path, module in list(model.named_modules()):        # a list: the tree changes below
        if {path, part_of_path(path)} & {*target_modules} and isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            layers[path] = LoRALinear(module, rank, alpha, generator)       # Linear4bit is one too
            setattr(model.get_submodule(parent), name, layers[path])
    return layers
