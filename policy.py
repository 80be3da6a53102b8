"""The policy: a vision-language model, LoRA adapters, a value head; it writes answers and scores them.

    model, processor = load_model("llava-hf/llava-v1.6-mistral-7b-hf", bits=4, device="cuda")
    policy = Policy(model, processor, rank=128, temperature=0.2)
    prompts   = policy.encode(pictures, texts)              # what the model gets, kept to be scored again
    responses = policy.generate(prompts, generator)         # the very token ids that were sampled
    logp, mask, value = policy.logprobs(prompts, responses) # (B, T), (B, T), (B,)

Alphabet of shapes, in all files: B samples, I image tokens, P prompt tokens (image tokens among them), T response
tokens, D hidden size, V vocabulary, N games, L steps of each, S = L × N samples of a rollout.

Differs from the published code: one function scores old, new and supervised answers; one view of the picture goes in
(I = 576 for LLaVA-1.6, as there), but through transformers' own models; no dropout anywhere, so that rollout and update
see the same network. Does not handle: what differs between models (vlm/families.py), loading them (vlm/loading.py), the
adapters themselves (vlm/lora.py), what the text means (parse.py), learning (ppo.py, sft.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from plumbing.errors import foreign
from vlm.families import PARTS, Family
from vlm.lora import add_lora, load_adapters, save_adapters

PREFILL_TOKENS = 8192       # prompts are read in groups of at most so many tokens, for memory; decoding takes them all


# ---- the value head -------------------------------------------------------------------------------------------------
class ValueHead(nn.Module):
    """The paper's MLP, D → 1024 → 512 → 1 with ReLU, in fp32 and seeded; on standardised inputs, which is ours.

    A language model's last hidden states are nearly the same vector in every state of a game (the pocket model's vary
    by a fifteenth of their size): an MLP on them learns the mean return and little else, and a baseline that does not
    know the state calls the best play of a hard state bad. subtle: it reads the hidden states and sends no gradient
    into them (as VL-DAC, arXiv 2508.04280): its errors, large at first, would move the adapters that write the answers.
    """

    def __init__(self, size: int, generator: torch.Generator):
        super().__init__()
        layers = []
        for wide, narrow in ((size, 1024), (1024, 512), (512, 1)):
            linear = nn.utils.skip_init(nn.Linear, wide, narrow)                  # no draw from the global generator
            bound = 1 / math.sqrt(wide)
            with torch.no_grad():
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.zero_()
            layers += [linear, nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("fitted", torch.tensor(False))

    def fit(self, hidden):
        """Take mean and spread of each input from the hidden states (S, D) of the first rollout; fixed from then on."""
        self.mean.copy_(hidden.mean(0))
        self.std.copy_(hidden.std(0).clamp(min=1e-6))
        self.fitted.fill_(True)

    def standardised(self, hidden):
        return (hidden.detach().float() - self.mean) / self.std

    def forward(self, hidden):
        """(B, D) in any type → (B,) fp32."""
        return self.mlp(self.standardised(hidden)).squeeze(-1).float()


@dataclass
class Prompt:
    """What the model gets in one state of a game: stored when it is answered, scored as stored."""
    images: dict                    # the picture as the vision tower takes it, a batch of one, on the CPU
    ids: list[int]                  # P token ids, I image tokens among them
    # (I, levels, D) on the CPU, kept where vision tower and projector are frozen; more than one level: Qwen3-VL
    features: torch.Tensor = None


# ---- the policy -----------------------------------------------------------------------------------------------------
class Policy(nn.Module):
    """See the file's header.

    target_modules: the parts (of vlm.families.PARTS) that get adapters of rank r and α = 2 r while all else is frozen;
    () is no adapters, all weights learn. temperature divides the logits in sampling and in scoring alike.
    gradient_checkpointing: 0 for none, n for every n-th layer.
    base_name, base_hash: the model that saved adapters are made for, and a hash of its weights.
    """

    def __init__(self, model, processor, rank=32, alpha=None, target_modules=tuple(PARTS), temperature=1.0, seed=0,
                 gradient_checkpointing=0, base_name="pocket", base_hash=None):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.temperature, self.rank, self.alpha = temperature, rank, alpha or 2 * rank
        self.base_name, self.base_hash = base_name, base_hash
        generator = torch.Generator().manual_seed(seed)
        self.lora = add_lora(model, rank, self.alpha, target_modules, generator) if target_modules else {}
        self.vision_frozen = bool(target_modules) and not {"vision", "projector"} & set(target_modules)
        self.value_head = ValueHead(model.config.get_text_config().hidden_size, generator).to(model.device)
        self.gradient_checkpointing = bool(gradient_checkpointing)
        if gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=int(gradient_checkpointing))
        self._disable_dropout()

        self.family = Family(model, processor)
        self.end_tokens = self.family.end_tokens()
        # Never sampled, and out of the scored distribution too.
        suppress_tokens = torch.arange(model.get_output_embeddings().weight.shape[0]) >= len(self.tokenizer)
        with foreign("the tokenizer, which does not fit the model,"):
            suppress_tokens[self.family.suppressed_tokens()] = True
        self.register_buffer("suppress_tokens", suppress_tokens.to(model.device), persistent=False)        # (V,) bool
        pieces = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        self.may_close = {token for token, piece in enumerate(pieces) if "}" in piece}

    def _disable_dropout(self):
        """Old and new log-probabilities need the same network, in train mode too."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout"):           # attention's are plain numbers
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

    def _set_mode(self, train):
        """Without dropout, train mode only turns gradient checkpointing on, and with it the cache off."""
        self.model.train(train)
        for module in self.model.modules():
            if type(module).__name__ == "Linear4bit":       # by name: bitsandbytes is not imported without need
                module.train()      # subtle: its eval mode takes a CPU kernel that passes no gradient on

    @property
    def device(self):
        return self.suppress_tokens.device

    def trainable(self):
        """[(name, parameter)] that learn, in a fixed order: the adapters (without any: all weights), the value head."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    # -- in: pictures and texts to tensors
    def encode(self, pictures, texts: list[str]) -> list[Prompt]:
        """Return a Prompt for each picture (H, W, 3) uint8 and user text, in the model's own chat template."""
        return [Prompt(images, ids) for images, ids in self.family.encode(pictures, texts)]

    def encode_answers(self, texts: list[str]) -> list[list[int]]:
        """Token ids of written answers, EOS at the end: the responses of supervised learning."""
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [list(row) + [self.tokenizer.eos_token_id] for row in ids]

    def _collate(self, prompts, responses=None, shape=None):
        """Left-pad the prompts to P, right-pad the responses to T; return ids, mask, positions, P, T.

        ids, mask: (B, P+T); positions: the same, or (3, B, P+T) where the family has M-RoPE.

        Every prompt ends at P-1 and every response begins at P, whatever their lengths. shape: (rows, P, T) to pad to;
        without one, to the batch's own longest.
        """
        responses = responses or [[] for _ in prompts]
        _, P, T = shape or (None, max(len(p.ids) for p in prompts), max(len(r) for r in responses))
        ids = torch.zeros(len(prompts), P + T, dtype=torch.long)                  # 0 under a mask of 0 is any id
        mask = torch.zeros_like(ids)
        for row, (prompt, response) in enumerate(zip(prompts, responses)):
            ids[row, P - len(prompt.ids):P] = torch.tensor(prompt.ids)
            ids[row, P:P + len(response)] = torch.tensor(response, dtype=torch.long)
            mask[row, P - len(prompt.ids):P + len(response)] = 1
        positions = self.family.positions([prompt.images for prompt in prompts], ids, mask)
        return ids.to(self.device), mask.to(self.device), positions.to(self.device), P, T

    # -- through: the model's body
    def image_features(self, prompts):
        """[(I, levels, D)] of the prompts' pictures; seen once where vision tower and projector are frozen."""
        if not self.vision_frozen:
            return self.family.see([prompt.images for prompt in prompts])
        if new := [prompt for prompt in prompts if prompt.features is None]:
            for prompt, features in zip(new, self.family.see([prompt.images for prompt in new])):
                prompt.features = features.cpu()
        return [prompt.features.to(self.device) for prompt in prompts]

    def _body(self, ids, mask, positions, features=None, cache=None, use_cache=False):
        """transformers' own model up to the last hidden states (B, length, D), plus its cache."""
        images = self.family.image_inputs(ids, features) if features is not None else {}
        return self.model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                use_cache=use_cache, **images)

    def _log_softmax(self, hidden):
        """(…, D) → (…, V) fp32: the one distribution that is sampled from and scored."""
        # subtle: in fp32 from the head on: a bf16 logit of 20 is off by up to 0.06, at temperature 0.2 by 0.3 nats
        logits = F.linear(hidden.float(), self.model.get_output_embeddings().weight.float()) / self.temperature
        return logits.masked_fill(self.suppress_tokens, -torch.inf).log_softmax(-1)

    def logprobs(self, prompts: list[Prompt], responses: list[list[int]], shape=None):
        """Score responses: the single function for old, new and supervised answers.

        shape: (rows, P, T) that the batch is padded to (rollout.padded_shapes); without one, to its own longest.
        Returns logp (B, T) fp32, the log-probability of each response token given all before it, 0 where padded;
        mask (B, T) float, 1 on response tokens; value (B,) fp32, read at the last prompt token (before any response
        token, so it cannot see what was answered).
        """
        B = len(prompts)
        if shape:                                           # missing rows are copies of the first; dropped below
            prompts, responses = ([*part, *part[:1] * (shape[0] - B)] for part in (prompts, responses))
        ids, mask, positions, P, T = self._collate(prompts, responses, shape)
        self._set_mode(train=self.gradient_checkpointing and torch.is_grad_enabled())
        hidden = self._body(ids, mask, positions, self.image_features(prompts)).last_hidden_state[:B]
        ids, mask = ids[:B], mask[:B]
        value = self.value_head(hidden[:, P - 1])                                 # (B,)
        logp = self._log_softmax(hidden[:, P - 1:P + T - 1])                      # position t-1 predicts token t
        logp = logp.gather(-1, ids[:, P:, None]).squeeze(-1)                      # (B, T)
        mask = mask[:, P:].float()
        return torch.where(mask > 0, logp, 0.0), mask, value

    @torch.no_grad()
    def prompt_hidden(self, prompts):
        """What the value head reads: the hidden states (B, D) at the last prompt tokens, without any response."""
        ids, mask, positions, P, _ = self._collate(prompts)
        self._set_mode(train=False)
        return self._body(ids, mask, positions, self.image_features(prompts)).last_hidden_state[:, P - 1]

    @torch.no_grad()
    def value(self, prompts):
        """V(o, v_in) of the prompts, (B,) fp32, without any response."""
        return self.value_head(self.prompt_hidden(prompts))

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], generator: torch.Generator, max_new_tokens=256,
                 stopping_criterion: Callable[[str], bool] = None, greedy=False) -> list[list[int]]:
        """Sample an answer for each prompt; return the sampled ids, EOS included where it was drawn.

        generator: on the policy's device. stopping_criterion: a function of the text so far that ends an answer, asked
        after each token that has a "}" in it (parse.json_closed). greedy=True: the likeliest token, not a draw.
        Raises FloatingPointError where the model's log-probabilities are not finite.
        """
        ids, mask, positions, _, _ = self._collate(prompts)
        self._set_mode(train=False)
        hidden, cache = self._prefill(ids, mask, positions, self.image_features(prompts))
        position = positions[..., -1:]
        responses = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))
        for length in range(1, max_new_tokens + 1):
            logp = self._log_softmax(hidden)                                      # (B, V)
            if logp.isnan().any():
                raise FloatingPointError("the model's log-probabilities are not finite: its files are damaged, or it "
                                         "has diverged; then start a new run (--out) with a smaller --lr or --bits 32")
            if greedy:
                drawn = logp.argmax(-1, keepdim=True)
            else:
                drawn = torch.multinomial(logp.exp(), 1, generator=generator)     # (B, 1)
            for row, token in enumerate(drawn[:, 0].tolist()):
                if row not in unfinished:
                    continue
                responses[row].append(token)
                closed = stopping_criterion and token in self.may_close and stopping_criterion(
                    self.decode(responses[row]))
                if closed or token in self.end_tokens:
                    unfinished.discard(row)
            if not unfinished or length == max_new_tokens:
                break
            mask, position = F.pad(mask, (0, 1), value=1), position + 1
            hidden = self._body(drawn, mask, position, cache=cache, use_cache=True).last_hidden_state[:, -1]
        return responses

    def _prefill(self, ids, mask, positions, features):
        """Read prompts, PREFILL_TOKENS at most at a time: the hidden states at their ends (B, D), and one cache."""
        size = max(1, PREFILL_TOKENS // ids.shape[1])
        ends, caches = [], []
        for k in range(0, len(ids), size):
            rows = slice(k, k + size)
            output = self._body(ids[rows], mask[rows], positions[..., rows, :], features[rows], use_cache=True)
            ends.append(output.last_hidden_state[:, -1])
            caches.append(output.past_key_values)
        if len(caches) == 1:
            return ends[0], caches[0]
        for first, *others in zip(*(cache.layers for cache in caches)):
            for name in ("keys", "values"):
                setattr(first, name, torch.cat([getattr(layer, name) for layer in (first, *others)]))
                for layer in others:
                    setattr(layer, name, None)              # its memory, a layer at a time
        return torch.cat(ends), caches[0]

    def decode(self, response: list[int]) -> str:
        """Text of a response, without special tokens, not tidied up."""
        return self.tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def action_start(self, response: list[int], start: int) -> int:
        """The index of the first token that reaches beyond character `start` of the decoded response.

        Found by halving on decoded prefixes, so it holds for any tokenizer: ids of `"action"` differ by tokenizer and
        by the character before it. subtle: a token that straddles the boundary belongs to the action.

        For tokens `{"`, `a`, `": "` and start 3 it is 2: the first two tokens end at character 3.
        """
        low, high = 0, len(response)
        while low < high:
            middle = (low + high) // 2
            if len(self.decode(response[:middle + 1])) > start:
                high = middle
            else:
                low = middle + 1
        return low

    # -- to disk and back
    def save(self, folder):
        """Write the adapters in PEFT's file format, the value head beside them (value_head.safetensors)."""
        save_adapters(self.lora, folder, self.base_name, self.rank, self.alpha)
        head = {name: tensor.cpu().contiguous() for name, tensor in self.value_head.state_dict().items()}
        save_file(head, Path(folder) / "value_head.safetensors")

    def load_adapters(self, folder):
        """Read adapters that save wrote, or PEFT on every linear layer of the same parts; the value head stays."""
        with foreign(Path(folder) / "adapter_model.safetensors"):
            load_adapters(self.lora, folder)

    def load(self, folder):
        """Read all that save wrote."""
        self.load_adapters(folder)
        self.load_value_head(folder)

    def load_value_head(self, folder):
        """Read the value head that save wrote; ModelError where it is damaged, or another model's."""
        head = Path(folder) / "value_head.safetensors"
        with foreign(head):
            stored, own = load_file(head), self.value_head.state_dict()
            if {name: tensor.shape for name, tensor in stored.items()} != {name: own[name].shape for name in own}:
                raise ValueError("not a value head of this version and model")
            self.value_head.load_state_dict(stored)
