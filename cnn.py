"""The paper's baseline without a language model: frozen vision features, an MLP over the game's actions, the same PPO.

    python train.py --task numberline --model cnn --no-cot

`FeaturePolicy` has the face of policy.Policy that train.py, eval.py and ppo.py use: its "answer" is one token, the
action's number, and its text the JSON that names the action. The features are the pocket model's vision tower and
projector as supervised fine-tuning left them, so its eyes can read cards; all else starts from nothing.
Does not handle: words; what is not in the picture (all four games show their state).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loading import POCKET, load_model
from policy import Policy, Prompt, ValueHead


class FeaturePolicy(nn.Module):
    """Standardised features (I·D,) → 512 → the logits of A actions, all 0 at the start; V reads the same features."""

    def __init__(self, actions, seed=0):
        super().__init__()
        model, processor = load_model(str(POCKET))
        eyes = Policy(model, processor, rank=1, parts=("language",))    # so that it looks once at a picture
        self._eyes, self.actions = [eyes], list(actions)                # subtle: in a list: no parameters of this one
        size = eyes.image_tokens * model.config.text_config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        self.wide = nn.utils.skip_init(nn.Linear, size, 512)
        self.narrow = nn.utils.skip_init(nn.Linear, 512, len(actions))
        # subtle: logits of 0, whatever goes in: the inputs are fitted when the first rollout has been sampled
        with torch.no_grad():
            self.wide.weight.uniform_(-size ** -0.5, size ** -0.5, generator=generator)
            for zero in (self.wide.bias, self.narrow.weight, self.narrow.bias):
                zero.zero_()
        self.value_head = ValueHead(size, generator)
        self.device = torch.device("cpu")

    def trainable(self):
        """[(name, parameter)] that learn: all that are its own."""
        return list(self.named_parameters())

    @torch.no_grad()
    def encode(self, pictures, texts):
        """A Prompt for each picture (H, W, 3) uint8, its features with it; the texts are not read."""
        prompts = [Prompt(pixels, [0]) for pixels in self._eyes[0]._pixels(pictures)]
        self._eyes[0].image_features(prompts)                           # kept in the prompts
        return prompts

    def states(self, prompts):
        """What V and the MLP read: (B, I·D)."""
        return torch.stack([prompt.features.flatten() for prompt in prompts])

    def value(self, prompts):
        with torch.no_grad():
            return self.value_head(self.states(prompts))

    def _log_softmax(self, states):
        hidden = self.wide(self.value_head.standardised(states)).relu()
        return self.narrow(hidden).log_softmax(-1)                      # (B, A)

    def logprobs(self, prompts, responses):
        """As Policy.logprobs: logp (B, 1), mask (B, 1), value (B,)."""
        states = self.states(prompts)
        logp = self._log_softmax(states).gather(1, torch.tensor(responses))
        return logp, torch.ones_like(logp), self.value_head(states)

    @torch.no_grad()
    def generate(self, prompts, generator, max_new_tokens=1, finished=None, greedy=False):
        """An answer of one token, the action's number, for each prompt."""
        logp = self._log_softmax(self.states(prompts))
        drawn = logp.argmax(-1, keepdim=True) if greedy else torch.multinomial(logp.exp(), 1, generator=generator)
        return drawn.tolist()

    def decode(self, response):
        return json.dumps({"action": self.actions[response[0]]})

    def action_start(self, response, start):
        return 0

    def save(self, folder, base_name):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "mlp.safetensors")

    def load(self, folder, value=True):
        """Read what save wrote; V reads the same standardised features, so it comes along in any case."""
        self.load_state_dict(load_file(Path(folder) / "mlp.safetensors"))
