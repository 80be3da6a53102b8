"""The paper's baseline without a language model: frozen vision features, an MLP over the game's actions, the same PPO.

    python -m extras.features --task numberline
    python -m extras.features --task ezpoints --taught 100 --out runs/taught       # from a few noisy labels

`FeaturePolicy` has the face of policy.Policy that train.py, rollout.py and ppo.py use: its "answer" is one token, the
action's number, and its text the JSON that names the action. The features are the pocket model's vision tower and
projector as supervised fine-tuning left them, so its eyes can read cards; all else starts from nothing.
Does not handle: words; what is not in the picture (all four games show their state).
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from env import GAMES
from plumbing.errors import in_words
from plumbing.manifest import weights_hash
from plumbing.settings import Settings, fill_in, fixed, read_settings, setting
from policy import Prompt, ValueHead
from sft import demonstrations, mixed
from train import launch
from vlm.families import base_view, encode_images
from vlm.loading import POCKET, load_model


@dataclass
class FeatureSettings(Settings):
    """Those of train.py, without what only a language model has."""
    task: str = setting(None, "the game (needed; --resume knows it)", choices=tuple(GAMES))
    taught: int = setting(0, "batches of 128 labels, 60 % of them random, to start from; RL needs a first success")
    model: str = fixed("features")
    bits: str = fixed("32")
    rank: int = fixed(None)
    target_modules: tuple = fixed(None)
    cot: bool = fixed(False)
    cot_lambda: float = fixed(1.0)
    temperature: float = fixed(1.0)
    temperature_end: float = fixed(1.0)
    imitation: int = fixed(0)
    negative_weight: float = fixed(1.0)
    gradient_checkpointing: int = fixed(0)
    max_new_tokens: int = fixed(1)
    sft_steps: int = fixed(0)
    houses: str = fixed("small")
    receptacles: int = fixed(5)
    objects: int = fixed(4)
    scene_text: bool = fixed(True)
    all_commands: bool = fixed(False)
    variant = "-features"

    def problem(self):
        return "--taught must not be negative" if self.taught < 0 else super().problem()


class FeaturePolicy(nn.Module):
    """Standardised features (I·D,) → 512 → the actions' logits, all 0 at the start; the value head reads the same.

    see: a function of pictures that gives their features (B, I, D).
    """

    def __init__(self, see, size, actions, seed=0):
        super().__init__()
        self.see, self.actions = see, list(actions)
        generator = torch.Generator().manual_seed(seed)
        self.wide = nn.utils.skip_init(nn.Linear, size, 512)
        self.narrow = nn.utils.skip_init(nn.Linear, 512, len(actions))
        # subtle: logits of 0, whatever goes in: the inputs are fitted when the first rollout has been sampled
        with torch.no_grad():
            self.wide.weight.uniform_(-size ** -0.5, size ** -0.5, generator=generator)
            for zero in (self.wide.bias, self.narrow.weight, self.narrow.bias):
                zero.zero_()
        self.value_head = ValueHead(size, generator)
        self.device, self.base_hash = torch.device("cpu"), weights_hash(POCKET)

    def trainable(self):
        """[(name, parameter)] that learn: all of them."""
        return list(self.named_parameters())

    @torch.no_grad()
    def encode(self, pictures, texts):
        """A Prompt for each picture (H, W, 3) uint8, its features with it; of the texts, nothing but how many."""
        return [Prompt(None, [0], features) for features, _ in zip(self.see(pictures), texts)]

    def prompt_hidden(self, prompts):
        """What the value head and the MLP read: (B, I·D)."""
        return torch.stack([prompt.features.flatten() for prompt in prompts])

    @torch.no_grad()
    def value(self, prompts):
        return self.value_head(self.prompt_hidden(prompts))

    def _log_softmax(self, hidden):
        wide = self.wide(self.value_head.standardised(hidden)).relu()
        return self.narrow(wide).log_softmax(-1)                        # (B, number of actions)

    def logprobs(self, prompts, responses, _shape=None):
        """As Policy.logprobs: logp (B, 1), mask (B, 1), value (B,)."""
        hidden = self.prompt_hidden(prompts)
        logp = self._log_softmax(hidden).gather(1, torch.tensor(responses))
        return logp, torch.ones_like(logp), self.value_head(hidden)

    @torch.no_grad()
    def generate(self, prompts, generator, *_):
        """An answer of one token, the action's number, for each prompt: no limit of length ever matters."""
        return torch.multinomial(self._log_softmax(self.prompt_hidden(prompts)).exp(), 1, generator=generator).tolist()

    def decode(self, response):
        return json.dumps({"action": self.actions[response[0]]})

    def action_start(self, *_):
        """The one token is the action's."""
        return 0

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()},
                  Path(folder) / "mlp.safetensors")

    def load(self, folder):
        self.load_state_dict(load_file(Path(folder) / "mlp.safetensors"))


def pocket_eyes():
    """(a function of pictures that gives the pocket model's image features (B, I, D), I·D)."""
    model, processor = load_model(str(POCKET))
    vision = model.config.vision_config
    size = (vision.image_size // vision.patch_size) ** 2 * model.config.text_config.hidden_size
    return lambda pictures: encode_images(model, base_view(pictures, processor, vision.image_size)), size


def make_features(settings, checkpoint=None):
    """train.make_policy's counterpart: a FeaturePolicy for the settings' game, taught where that is asked for."""
    fill_in(settings, small=True)
    policy = FeaturePolicy(*pocket_eyes(), GAMES[settings.task]().legal_actions(), settings.seed)
    if settings.taught and checkpoint is None:
        teach(policy, settings.task, settings.taught)
    return policy


def teach(policy, task, steps, label_noise=0.6, batch_size=128, seed=11):
    """Supervised learning of noisy labels, so that RL has a first success (results/README.md)."""
    writes = [parameter for name, parameter in policy.trainable() if not name.startswith("value_head")]
    optimizer = torch.optim.Adam(writes, lr=1e-3)
    source = demonstrations(task, seed, label_noise, cot=False)
    for batch in itertools.islice(mixed([source], batch_size, np.random.default_rng(seed)), steps):
        prompts = policy.encode([d.picture for d in batch], [d.prompt for d in batch])
        if not policy.value_head.fitted:
            policy.value_head.fit(policy.prompt_hidden(prompts))       # what standardises the MLP's inputs too
        labels = [[policy.actions.index(json.loads(d.answer)["action"])] for d in batch]
        loss = -policy.logprobs(prompts, labels)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(arguments=None):
    with in_words():
        settings, resume = read_settings(FeatureSettings, __doc__, arguments)
    launch(settings, resume, make_features)


if __name__ == "__main__":
    main()
