"""The paper's baseline without a language model: frozen vision features, an MLP, the same PPO.

    python -m lab.features --task numberline

`FeaturePolicy` has the face of policy.Policy that train.py, rollout.py and ppo.py use: its "answer"
is one token, the action's number, and its text the JSON that names the action. The features are the
pocket model's vision tower and projector as supervised fine-tuning left them, so its eyes can read
cards; all else starts from nothing.
Does not handle: words; what is not in the picture (all four games show their state).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from env import GAMES, make_game
from families import base_view, encode_images
from plumbing.loading import POCKET
from plumbing.manifest import hashes
from plumbing.settings import Settings, setting
from policy import Prompt, ValueHead, load_model
from train import launch


def fixed(default):
    """A field that is no flag: what only a language model could choose."""
    return setting(default, help=None)


@dataclass(frozen=True)
class FeatureSettings(Settings):
    """Those of train.py, without what only a language model has."""

    task: str = setting(None, "the game (needed; --resume knows it)", choices=tuple(GAMES))
    # the pocket model lends its eyes
    model: str = fixed("pocket")
    bits: str = fixed("32")
    device: str = fixed("cpu")
    rank: int = fixed(1)
    target_modules: tuple = fixed(())
    cot: bool = fixed(False)
    cot_lambda: float = fixed(1.0)
    temperature: float = fixed(1.0)
    imitation: int = fixed(0)
    kl_coef: float = fixed(0.0)
    gradient_checkpointing: int = fixed(0)
    compile: bool = fixed(False)
    max_new_tokens: int = fixed(1)
    sft_steps: int = fixed(0)

    folder_suffix = "-features"


class FeaturePolicy(nn.Module):
    """Standardised features (I·D,) → 512 → the actions' logits; the value head reads the same.

    see: a function of pictures that gives their features (B, I, D).
    """

    def __init__(self, see, size, actions, seed=0):
        super().__init__()
        self.see, self.actions, self.device = see, list(actions), torch.device("cpu")
        generator = torch.Generator().manual_seed(seed)
        self.wide = nn.utils.skip_init(nn.Linear, size, 512)
        self.narrow = nn.utils.skip_init(nn.Linear, 512, len(actions))
        # subtle: logits of 0, whatever goes in: the inputs are fitted when the first rollout has
        # been sampled
        with torch.no_grad():
            self.wide.weight.uniform_(-size ** -0.5, size ** -0.5, generator=generator)
            for zero in (self.wide.bias, self.narrow.weight, self.narrow.bias):
                zero.zero_()
        self.value_head = ValueHead(size, generator)

    def trainable(self):
        """[(name, parameter)] that learn: all of them."""
        return list(self.named_parameters())

    # -- in
    @torch.no_grad()
    def encode(self, pictures, texts):
        """A Prompt with its features for each picture; the texts are not looked at."""
        return [Prompt(None, [0], features) for features in self.see(pictures)]

    def prompt_hidden(self, prompts):
        """What the value head and the MLP read: (B, I·D)."""
        return torch.stack([prompt.features.flatten() for prompt in prompts])

    # -- through
    @torch.no_grad()
    def value(self, prompts):
        return self.value_head(self.prompt_hidden(prompts))

    def log_softmax(self, hidden):
        """(B, I·D) → (B, number of actions)."""
        wide = self.wide(self.value_head.standardised(hidden)).relu()
        return self.narrow(wide).log_softmax(-1)

    def logprobs(self, prompts, responses, _shape=None):
        """As Policy.logprobs: logp (B, 1), value (B,)."""
        hidden = self.prompt_hidden(prompts)
        logp = self.log_softmax(hidden).gather(1, torch.tensor(responses))
        return logp, self.value_head(hidden)

    # -- out
    @torch.no_grad()
    def generate(self, prompts, generator, *_):
        """An answer of one token, the action's number, for each prompt: no limit ever matters."""
        chances = self.log_softmax(self.prompt_hidden(prompts)).exp()
        return torch.multinomial(chances, 1, generator=generator).tolist()

    def decode(self, response):
        return json.dumps({"action": self.actions[response[0]]})

    def action_start(self, *_):
        """The one token is the action's."""
        return 0


@dataclass
class FeatureFiles:
    """How such a policy is written and read: plumbing.adapters.PolicyFiles' counterpart."""

    base_name: str = "pocket"
    depends: dict = None

    def save(self, policy, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
        save_file(tensors, Path(folder) / "mlp.safetensors")

    def load(self, policy, folder):
        policy.load_state_dict(load_file(Path(folder) / "mlp.safetensors"))


def pocket_eyes():
    """(a function of pictures that gives the pocket model's image features (B, I, D), I·D)."""
    model, processor = load_model(str(POCKET))
    vision = model.config.vision_config
    I = (vision.image_size // vision.patch_size) ** 2

    def see(pictures):
        return encode_images(model, base_view(pictures, processor, vision.image_size))

    return see, I * model.config.text_config.hidden_size


def make_features(settings, checkpoint=None):
    """train.make_policy's counterpart: (a FeaturePolicy for the settings' game, its files)."""
    actions = make_game(settings.task, **settings.game_options).legal_actions()
    policy = FeaturePolicy(*pocket_eyes(), actions, settings.seed)
    return policy, FeatureFiles(depends={"base model": hashes(POCKET)})


def main(arguments=None):
    launch(FeatureSettings, __doc__, arguments, make_features)


if __name__ == "__main__":
    main()
