"""The policy: a vision-language model with LoRA adapters and a value head, which writes answers.

    model, processor = load_model("llava-hf/llava-v1.6-mistral-7b-hf", bits=4, device="cuda")
    policy = Policy(model, processor, rank=128, temperature=0.2)
    prompts   = policy.encode(pictures, texts)              # what the model gets, kept for scoring
    responses = policy.generate(prompts, generator)         # the very token ids that were sampled
    logp, value = policy.logprobs(prompts, responses)       # (B, T), (B,)

Alphabet of shapes, in all files: B samples, I image tokens, P prompt tokens (image tokens among
them), T response tokens, D hidden size, W vocabulary, N games, L steps of each, S = L × N samples
of a rollout. "levels" is 1; more where deeper layers get picture features too (Qwen3-VL).

Differs from the published code: one function scores old, new and supervised answers; transformers'
own models, shown one view of the picture (I = 576 for LLaVA-1.6, as there); no dropout anywhere.
Does not handle: adapters (lora.py), the cache that decoding goes by (decode.py), what differs
between models (families.py), finding them and files of adapters (plumbing/), what the text means
(parse.py), learning (ppo.py, sft.py).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from decode import open_cache
from families import PARTS, Family, load_processor, part_of_path, takes_fixed_cache
from lora import add_lora


# ---- the model ---------------------------------------------------------------------------------
def load_model(name: str, bits=32, device="cpu"):
    """Return (model, processor) of a hub name or a folder, in 4, 16 (bfloat16) or 32 bits.

    4 bits are NF4 with double quantisation (QLoRA, arXiv 2305.14314): frozen weights are stored in
    4 bits and multiplied in bfloat16, on a CPU in fp32. Raises what transformers raises, ValueError
    where a weight is missing. No code that comes with a model is run, and no pickle is read.
    """
    if bits not in (4, 16, 32):
        raise ValueError(f"bits must be 4, 16 or 32, not {bits}")
    in_fp32 = bits == 32 or (bits == 4 and device == "cpu")
    dtype = torch.float32 if in_fp32 else torch.bfloat16    # what is computed in
    quantisation = None
    if bits == 4:
        # On a CPU bitsandbytes misses an optional kernel, says so, and does as well without it.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
    # torch's fused attention in bf16 takes a CPU four times as long to learn through
    attention = "eager" if device == "cpu" and dtype == torch.bfloat16 else None
    processor = load_processor(name)
    model, report = AutoModelForImageTextToText.from_pretrained(
        name, dtype=dtype, quantization_config=quantisation, device_map={"": device},
        attn_implementation=attention, trust_remote_code=False, use_safetensors=True,
        output_loading_info=True)
    # transformers would fill what is missing with random numbers
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    return model, processor


# ---- the value head ----------------------------------------------------------------------------
class ValueHead(nn.Module):
    """The paper's MLP, D → 1024 → 512 → 1 with ReLU, in fp32, on standardised inputs (ours).

    A language model's last hidden states are nearly the same vector in every state of a game (the
    pocket model's vary by a fifteenth of their size). An MLP on them learns the mean return and
    little else, and a baseline that does not know the state calls the best play of a hard state
    bad. subtle: it reads the hidden states and sends no gradient into them (as VL-DAC, arXiv
    2508.04280): its errors, large at first, would move the adapters that write the answers.
    """

    def __init__(self, size: int, generator: torch.Generator):
        super().__init__()
        layers = []
        for wide, narrow in ((size, 1024), (1024, 512), (512, 1)):
            linear = nn.utils.skip_init(nn.Linear, wide, narrow)    # no global generator
            bound = 1 / math.sqrt(wide)     # torch's own start, biases apart, from the run's seed
            with torch.no_grad():
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.zero_()
            layers += [linear, nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])      # no ReLU after the last
        self.register_buffer("mean", torch.zeros(size))             # buffers: saved, not learned
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("fitted", torch.tensor(False))

    def fit(self, hidden):
        """Take each input's mean and spread from the first rollout's (S, D); fixed from then on."""
        self.mean.copy_(hidden.mean(0))
        spread = hidden.std(0)
        # an input that has not varied yet may do so later: as it is, not a million times as much
        self.std.copy_(torch.where(spread > 1e-6, spread, 1.0))
        self.fitted.fill_(True)

    def standardised(self, hidden):
        return (hidden.detach().float() - self.mean) / self.std     # detach: no gradient goes in

    def forward(self, hidden):
        """(B, D) in any type → (B,) fp32."""
        return self.mlp(self.standardised(hidden)).squeeze(-1)


# ---- the policy --------------------------------------------------------------------------------
def _padded(rows, length, left=False):
    """Lists of token ids as ids and mask (B, length), 0 where padded: any id will do there."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        begin = length - len(tokens) if left else 0
        ids[row, begin:begin + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, begin:begin + len(tokens)] = 1
    return ids, mask


@dataclass
class Prompt:
    """What the model gets in one state of a game: stored when it is answered, scored as stored."""

    images: dict        # the picture as the vision tower takes it, a batch of one, on the CPU
    ids: list[int]      # P token ids, I image tokens among them
    features: torch.Tensor = None   # (I, levels, D), kept where tower and projector are frozen


class Policy(nn.Module):
    """See the file's header.

    target_modules: what gets adapters (add_lora), of rank r and α = 2 r; all else is frozen. () is
    no adapters, all weights learn. temperature divides the logits, in sampling and in scoring
    alike. gradient_checkpointing: 0 for none, n for every n-th layer.
    """

    def __init__(
        self, model, processor, rank=32, alpha=None, target_modules=tuple(PARTS), temperature=1.0,
        seed=0, gradient_checkpointing=0):
        super().__init__()
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.temperature, self.rank, self.alpha = temperature, rank, alpha or 2 * rank

        # what learns: adapters and value head, from the run's own seed
        generator = torch.Generator().manual_seed(seed)
        self.lora = {}                                  # {module path: LoRALinear}
        if target_modules:
            self.lora = add_lora(model, rank, self.alpha, target_modules, generator)
        learning = {part_of_path(path) for path in self.lora} or {*PARTS}
        self.vision_frozen = not learning & {"vision", "projector"}
        hidden_size = model.config.get_text_config().hidden_size
        self.value_head = ValueHead(hidden_size, generator).to(model.device)

        # how the model runs. playing: _set_mode's, None where nothing is known; cache (decode.py's)
        # and fp32_head (the output head's weights) are there while it plays
        self.playing = self.cache = self.fp32_head = None
        self.compiled = False
        self.gradient_checkpointing = bool(gradient_checkpointing)
        if gradient_checkpointing:                      # memory for time
            model.activation_checkpointing_enable(
                {"use_reentrant": False}, every_n_layers=int(gradient_checkpointing))
        self._disable_dropout()

        self.family = Family(model, processor)
        # decode.py's cache: "growing", "fixed", or "captured" (fixed, its step a CUDA graph)
        captured = model.device.type == "cuda" and takes_fixed_cache(model.config)
        self.decoding = "captured" if captured else "growing"

        # which tokens end an answer, may close its JSON, are never sampled
        self.end_tokens = self.family.end_tokens()
        pieces = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        self.may_close = {token for token, piece in enumerate(pieces) if "}" in piece}
        vocabulary = model.get_output_embeddings().weight.shape[0]
        suppress_tokens = torch.arange(vocabulary) >= len(self.tokenizer)       # rows of no token
        suppress_tokens[self.family.suppressed_tokens()] = True                 # image, padding, …
        suppress_tokens = suppress_tokens.to(model.device)                      # (W,) bool
        self.register_buffer("suppress_tokens", suppress_tokens, persistent=False)

    def _disable_dropout(self):
        """Old and new log-probabilities need the same network, in train mode too."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0                          # whatever the configuration says
            for name in ("attention_dropout", "dropout"):       # attention's are plain numbers
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

    def _set_mode(self, playing=False):
        """Ready the model to play, to score or to learn; nothing is done where it is, for speed."""
        # without dropout, train mode only turns checkpointing on, and with it the cache off
        train = self.gradient_checkpointing and torch.is_grad_enabled() and not playing
        if (self.playing, self.model.training) == (playing, train):
            return
        self.playing = playing
        if not playing:         # learning has the memory
            self.cache = self.fp32_head = None
            for layer in self.lora.values():
                layer.copies = None
        self.model.train(train)
        for module in self.model.modules():
            if type(module).__name__ == "Linear4bit":   # by name: to import it takes seconds
                module.train()      # subtle: its eval mode's CPU kernel passes no gradient on

    def train(self, mode=True):
        self.playing = None     # somebody else has set the mode
        return super().train(mode)

    def compile_layers(self):
        """Fuse what lies between a layer's matrix products, in scoring and learning."""
        self.compiled = True
        self.playing = None     # the mode is set anew
        for layer in self.model.get_decoder().layers:
            layer.compile(dynamic=True)         # one program for all layers

    @property
    def device(self):
        return self.suppress_tokens.device

    def trainable(self):
        """[(name, parameter)] that learn: adapters (or all weights), then the value head."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    # -- in: pictures and texts to tensors
    def encode(self, pictures, texts: list[str]) -> list[Prompt]:
        """A Prompt for each picture (H, W, 3) uint8 and user text, in the model's chat template."""
        return [Prompt(images, ids) for images, ids in self.family.encode(pictures, texts)]

    def encode_answers(self, texts: list[str]) -> list[list[int]]:
        """Token ids of written answers, EOS at the end: the responses of supervised learning."""
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]      # the prompt has BOS
        return [list(row) + [self.tokenizer.eos_token_id] for row in ids]

    def _side_by_side(self, prompts, texts, length=None, left=False):
        """Texts of the prompts' pictures (lists of token ids, the prompt first) as one batch.

        Returns ids and mask (B, length), and positions (the same, or (3, B, length) with M-RoPE).
        Padded on the right, or on the left: then all texts end together, and go on together.
        """
        ids, mask = _padded(texts, length or max(map(len, texts)), left)
        positions = self.family.positions([prompt.images for prompt in prompts], ids, mask)
        return ids.to(self.device), mask.to(self.device), positions.to(self.device)

    # -- through: the model's body
    def image_features(self, prompts):
        """[(I, levels, D)] of the pictures; computed once where tower and projector are frozen."""
        new = [p for p in prompts if not self.vision_frozen or p.features is None]
        counts = [p.ids.count(self.family.image_token) for p in new]
        found = self.family.image_features([p.images for p in new], counts) if new else []
        if not self.vision_frozen:
            return found
        for prompt, features in zip(new, found):
            prompt.features = features.cpu()        # a rollout's are too many for a GPU
        return [prompt.features.to(self.device) for prompt in prompts]

    def body(self, ids, mask, positions, features=None, cache=None, use_cache=False):
        """transformers' own model up to the last hidden states (B, length, D), plus its cache."""
        images = {} if features is None else self.family.image_inputs(ids, features)
        return self.model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=use_cache, **images)

    def log_softmax(self, hidden):
        """(…, D) → (…, W) fp32: the one distribution that is sampled from and scored."""
        # subtle: in fp32 from the head on. A bf16 logit of 20 is off by up to 0.06, which at
        # temperature 0.2 is 0.3 nats.
        head = self.fp32_head
        if head is None:
            head = self.model.get_output_embeddings().weight.float()
        logits = F.linear(hidden.float(), head) / self.temperature
        return logits.masked_fill(self.suppress_tokens, -torch.inf).log_softmax(-1)

    def logprobs(self, prompts: list[Prompt], responses: list[list[int]], shape=None):
        """Score responses: the single function for old, new and supervised answers.

        shape: (rows, length, T) that the batch is padded to (rollout.padded_shapes); without one,
        to its own longest. Returns logp (B, T) fp32, the log-probability of each response token
        given all before it, 0 where padded; value (B,) fp32, read at the last prompt token (before
        any response token, so it cannot see what was answered).
        """
        B = len(prompts)
        rows, length, T = shape or (B, None, max(map(len, responses)))
        # missing rows are copies of the first, dropped below
        prompts = [*prompts, *prompts[:1] * (rows - B)]
        responses = [*responses, *responses[:1] * (rows - B)]
        texts = [prompt.ids + response for prompt, response in zip(prompts, responses)]
        hidden = self._read(prompts, texts, T, length)[:B]                  # (B, T, D)
        tokens, mask = (one.to(self.device) for one in _padded(responses[:B], T))   # (B, T)
        value = self.value_head(hidden[:, 0])                               # (B,)
        # the hidden state at a place predicts the token of the next
        logp = self.log_softmax(hidden).gather(-1, tokens[..., None]).squeeze(-1)   # (B, T)
        return torch.where(mask > 0, logp, 0.0), value

    def _read(self, prompts, texts, T=1, length=None):
        """Hidden states at T places (B, T, D), the first of them each prompt's last token.

        subtle: padded on the right and without a mask. No token sees what comes after it (Gemma's
        pictures apart), so padding is seen by none that counts, and a GPU's attention has its
        fastest kernels.
        """
        ids, _, positions = self._side_by_side(prompts, texts, length)
        # subtle: with gradients and without it is compiled to two programs, which may round
        # differently: what is learned from is scored by the one that learns
        with torch.set_grad_enabled(self.compiled or torch.is_grad_enabled()):
            self._set_mode()
            output = self.body(ids, None, positions, self.image_features(prompts))
        ends = torch.tensor([len(prompt.ids) - 1 for prompt in prompts])[:, None]
        # beyond a text's end it does not matter what is read: it is masked
        places = (ends + torch.arange(T)).clamp(max=ids.shape[1] - 1).to(self.device)   # (B, T)
        return output.last_hidden_state.take_along_dim(places[..., None], 1)

    @torch.no_grad()
    def prompt_hidden(self, prompts):
        """What the value head reads: hidden states (B, D) at the prompts' last tokens."""
        return self._read(prompts, [prompt.ids for prompt in prompts])[:, 0]

    @torch.no_grad()
    def value(self, prompts):
        """V(o, v_in) of the prompts, (B,) fp32, without any response."""
        return self.value_head(self.prompt_hidden(prompts))             # (B, D) → (B,)

    # -- out: answers
    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")       # prompts and single tokens are not compiled
    def generate(
        self, prompts: list[Prompt], generator: torch.Generator, max_new_tokens=256,
        stopping_criterion: Callable[[str], bool] = None, greedy=False) -> list[list[int]]:
        """Sample an answer for each prompt; return the sampled ids, EOS included if it was drawn.

        generator: on the policy's device. stopping_criterion: whether an answer is whole, asked of
        its text after each token with a "}" (parse.json_closed). greedy: the likeliest token, not a
        draw. Raises FloatingPointError where the model's log-probabilities are not finite.
        """
        self._set_mode(playing=True)
        # once for all tokens: adapters in the model's type, the head in fp32
        for layer in self.lora.values():
            layer.cast(self.model.dtype)
        self.fp32_head = None               # its memory first
        self.fp32_head = self.model.get_output_embeddings().weight.detach().float()

        texts = [prompt.ids for prompt in prompts]
        ids, mask, positions = self._side_by_side(prompts, texts, left=True)    # (B, P)
        cache = open_cache(self, positions, max_new_tokens)
        logp = cache.read(prompts, ids, mask, positions)                        # (B, W)
        responses = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))           # rows; all go on until none is left
        for length in range(1, max_new_tokens + 1):
            drawn = self._draw(logp, generator, greedy)         # (B, 1)
            tokens = drawn[:, 0].tolist()                       # a step's one wait for a GPU
            if -1 in tokens:
                self.cache = None       # a fixed one would keep the nan
                raise FloatingPointError(
                    "the model's log-probabilities are not finite: its files are damaged, or it "
                    "has diverged; then start a new run (--out) with a smaller --lr or --bits 32")
            for row, token in enumerate(tokens):
                if row not in unfinished:
                    continue                            # drawn for nothing
                responses[row].append(token)            # the end token too: it is scored
                closed = stopping_criterion and token in self.may_close and stopping_criterion(
                    self.decode(responses[row]))
                if closed or token in self.end_tokens:
                    unfinished.discard(row)
            if not unfinished or length == max_new_tokens:
                break
            logp = cache.step(drawn)        # only the new token goes through the model
        return responses

    def _draw(self, logp, generator, greedy):
        """A token for each row of log-probabilities (B, W): (B, 1); -1 where they are nan."""
        broken = logp.isnan().any(-1, keepdim=True)
        if greedy:
            drawn = logp.argmax(-1, keepdim=True)
        else:
            # no draw from what is not finite: on a GPU it would end the program
            drawn = torch.multinomial(
                logp.exp().masked_fill(broken, 1), 1, generator=generator)
        return drawn.masked_fill(broken, -1)

    def decode(self, response: list[int]) -> str:
        """Text of a response, without special tokens, not tidied up."""
        return self.tokenizer.decode(
            response, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def action_start(self, response: list[int], start: int) -> int:
        """The index of the first token that reaches beyond character `start` of the decoded text.

        Found by halving on decoded prefixes: the ids of `"action"` differ by tokenizer and by the
        character before it. subtle: a token that straddles the boundary belongs to the action.
        For tokens `{"`, `a`, `": "` and start 3 it is 2: the first two tokens end at character 3.
        """
        low, high = 0, len(response)
        while low < high:
            middle = (low + high) // 2
            # subtle: halving needs lengths that only grow, and a character's first bytes are shown
            # as up to three signs, the whole of it as one
            if len(self.decode(response[:middle + 1]).rstrip("\ufffd")) > start:
                high = middle
            else:
                low = middle + 1
        return low
