"""What differs between families of chat VLMs: how one view of a picture goes in, and where.

    family = Family(model, processor)
    prompts   = family.encode(pictures, texts)          # [({image tensors}, token ids)]
    features  = family.image_features([images, …], [I, …])      # [(I, levels, D)]
    more      = family.image_inputs(ids, features)      # what the model's forward takes of them
    positions = family.positions(images, ids, mask)     # (B, length); (3, B, length) with M-RoPE

transformers 5 gives all their inner models `get_image_features` and `mm_encoder_outputs`.
What it does not tell stands in FAMILIES; how one is added, in extras/README.md. subtle: with wrong
positions or token types decoding still equals scoring and a batch still equals its samples, so the
tests hold each family against transformers' own forward pass on the processor's own tensors.
Does not handle: weights (policy.py), what the text means (parse.py).
"""

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AttentionInterface, AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING


@dataclass(frozen=True)
class Facts:
    """How a picture goes in as one view; which cache the language model can decode with."""

    square: bool = False        # LLaVA's: squeezed to the vision tower's size, without tiles
    options: dict = field(default_factory=dict)     # else what the processor is told
    blocks: bool = False        # whether the tower lays all pictures in one row (attend_in_blocks)
    fixed_cache: bool = True    # whether decode.FixedCache serves; not sliding or linear attention


FAMILIES = {
    "llava": Facts(square=True),
    "llava_next": Facts(square=True),
    "llava_onevision": Facts(square=True),
    "qwen2_vl": Facts(blocks=True),
    "qwen2_5_vl": Facts(blocks=True),
    "qwen3_vl": Facts(blocks=True),
    # its experts are no linear layers: no adapters, no 4 bits
    "qwen3_vl_moe": Facts(blocks=True),
    "qwen3_5": Facts(blocks=True, fixed_cache=False),
    "glm4v": Facts(blocks=True),
    "smolvlm": Facts(options={"do_image_splitting": False}),
    "idefics3": Facts(options={"do_image_splitting": False}),
    "gemma3": Facts(options={"do_pan_and_scan": False}, fixed_cache=False),
    "internvl": Facts(options={"crop_to_patches": False}),
}


def takes_fixed_cache(config) -> bool:
    """Whether decode.FixedCache serves a model: one of its family, and without a window."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return FAMILIES[config.model_type].fixed_cache and not window


# The parts that can have adapters, by prefixes of module paths; the longest that fits decides.
PARTS = {
    "vision": ("model.vision_tower.", "model.vision_model.", "model.visual."),
    "projector": ("model.multi_modal_projector.", "model.connector.", "model.visual.merger.",
                  "model.visual.deepstack_merger_list."),
    "language": ("model.language_model.", "model.text_model."),
}

TEXT_TENSORS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def part_of_path(path: str) -> str | None:
    """The part that a module lies in; None for the output head and the like.

    >>> part_of_path("model.visual.merger.linear_fc1"), part_of_path("lm_head")
    ('projector', None)
    """
    fits = [
        (len(prefix), part)
        for part, prefixes in PARTS.items()
        for prefix in prefixes if path.startswith(prefix)]
    return max(fits)[1] if fits else None


# ---- processors --------------------------------------------------------------------------------
def without_video(kind):
    """A processor's class that takes None for its video half."""
    changed = {"check_argument_for_proper_class": lambda *_: None}
    return type(kind.__name__, (kind,), changed)


def load_processor(name: str):
    """A model's processor without its video half, which would need torchvision."""
    kind = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name, trust_remote_code=False))]
    settings, _ = kind.get_processor_dict(name)
    images = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    halves = {"image_processor": images, "tokenizer": tokenizer, "video_processor": None}
    wanted = kind.get_attributes()
    if "video_processor" in wanted:
        kind = without_video(kind)
    return kind.from_args_and_dict([halves[half] for half in wanted], settings)


def save_processor(processor, folder):
    """Write what load_processor reads; transformers' own way fails without the video half."""
    if getattr(processor, "video_processor", True) is not None:
        processor.save_pretrained(folder)
        return
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    parameters = set(inspect.signature(type(processor).__init__).parameters)
    elsewhere = {"self", "kwargs", "chat_template", *processor.get_attributes()}
    settings = {"processor_class": type(processor).__name__}
    settings |= {name: getattr(processor, name) for name in sorted(parameters - elsewhere)}
    file = Path(folder) / "processor_config.json"
    file.write_text(json.dumps(settings, indent=1) + "\n")
    (Path(folder) / "chat_template.jinja").write_text(processor.chat_template)


# ---- attention within blocks -------------------------------------------------------------------
def attend_in_blocks(module, query, key, value, attention_mask, cu_seq_lens_q, max_length_q,
                     scaling, **_):
    """Attention within blocks (pictures, or windows of them) of one row of S patches, in one call.

    query, key, value: (1, heads, S, size); block k is cu_seq_lens_q[k] to [k + 1]. Returns (1, S,
    heads, size), None. transformers' own way is a call for each block: 8,192 where Qwen2.5-VL reads
    32 pictures. subtle: a mask over the whole row would be one call too, but in bf16 a picture's
    features would depend on its place in the row, and ratios would not be 1.
    """
    places = cu_seq_lens_q[:-1, None] + torch.arange(int(max_length_q), device=query.device)
    real = places < cu_seq_lens_q[1:, None]                             # (blocks, longest)
    S = query.shape[2]
    blocks = [one[0][:, places.clamp(max=S - 1)] for one in (query, key, value)]
    seen = F.scaled_dot_product_attention(      # (heads, blocks, longest, size)
        *blocks, attn_mask=None if real.numel() == S else real[:, None], scale=scaling)
    return seen[:, real].transpose(0, 1)[None], None


# subtle: transformers' towers hand over all blocks at once where the name says "flash", and else
# call a block at a time
AttentionInterface.register("blocks_flash", attend_in_blocks)


# ---- LLaVA's one view --------------------------------------------------------------------------
def base_view(pictures, processor, side):
    """(B, 3, side, side) fp32: the whole picture at the vision tower's size, normalised.

    It is what LLaVA-NeXT calls the base view, beside which it would also show tiles.
    """
    settings = processor.image_processor
    small = [
        np.asarray(Image.fromarray(picture).resize((side, side), settings.resample))
        for picture in pictures]
    pixels = torch.from_numpy(np.stack(small)).float() * settings.rescale_factor
    mean, std = torch.tensor(settings.image_mean), torch.tensor(settings.image_std)
    return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous()


def encode_images(model, pixels):
    """(B, I, D): what the language model gets of base views (B, 3, H, W)."""
    # LLaVA-NeXT's own method would want tiles, so tower and projector are called by hand.
    config, pixels = model.config, pixels.to(model.device, model.dtype)
    seen = model.model.vision_tower(pixels, output_hidden_states=True)
    hidden = seen.hidden_states[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":
        hidden = hidden[:, 1:]      # without CLS
    return model.model.multi_modal_projector(hidden)


# ---- a family ----------------------------------------------------------------------------------
class Family:
    """See the file's header."""

    def __init__(self, model, processor):
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.facts = FAMILIES[model.config.model_type]
        if self.facts.blocks:
            model.config.vision_config._attn_implementation = "blocks_flash"
        self.image_token = model.config.image_token_id
        self.forward_arguments = set(inspect.signature(model.model.forward).parameters)
        self.as_list = True         # whether the forward pass takes features as a list

    def end_tokens(self) -> set[int]:
        """The tokens that end an answer; Gemma has several."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {self.tokenizer.eos_token_id, *ends} - {None}

    def suppressed_tokens(self) -> list[int]:
        """Special tokens that are no end: they would break or blur the next scoring pass."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token for token, entry in added if entry.special}
        return sorted((special | {self.image_token}) - self.end_tokens())

    def encode(self, pictures, texts):
        """[({image tensors, a batch of one}, token ids)] of pictures (H, W, 3) uint8 and texts."""
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            for text in texts]
        rendered = self.tokenizer.apply_chat_template(
            chats, chat_template=self.processor.chat_template, add_generation_prompt=True,
            tokenize=False)
        bos = self.tokenizer.bos_token
        add_bos = not (bos and rendered[0].startswith(bos))     # some templates bring their own
        if self.facts.square:
            return self._encode_square(pictures, rendered, add_bos)
        found = []
        for picture, text in zip(pictures, rendered):
            got = self.processor(
                images=[[Image.fromarray(picture)]], text=[text], add_special_tokens=add_bos,
                return_tensors="pt", **self.facts.options)
            images = {key: got[key] for key in got if key not in TEXT_TENSORS}
            found.append((images, got["input_ids"][0].tolist()))
        return found

    def _encode_square(self, pictures, rendered, add_bos):
        vision = self.model.config.vision_config
        image_text = self.tokenizer.convert_ids_to_tokens(self.image_token)
        for text in rendered:
            if text.count(image_text) != 1:
                raise ValueError(
                    f"the chat template put {text.count(image_text)} image tokens into a prompt "
                    "that has one picture: this processor does not belong to a LLaVA")
        tokens = (vision.image_size // vision.patch_size) ** 2      # I
        texts = [text.replace(image_text, image_text * tokens) for text in rendered]
        ids = self.tokenizer(texts, add_special_tokens=add_bos)["input_ids"]
        pixels = base_view(pictures, self.processor, vision.image_size)
        return [({"pixel_values": one[None]}, list(row)) for one, row in zip(pixels, ids)]

    def image_features(self, images, counts):
        """[(I, levels, D)] of prompts' image tensors, by vision tower and projector.

        counts: I of each prompt. There is one level but for Qwen3-VL, whose deeper layers see the
        picture as well.
        """
        if self.facts.square:
            pixels = torch.cat([one["pixel_values"] for one in images])
            return list(encode_images(self.model, pixels)[:, :, None])
        device, dtype = self.model.device, self.model.dtype
        tensors = {key: torch.cat([one[key] for one in images]).to(device) for key in images[0]}
        tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
        seen = self.model.model.get_image_features(**tensors, return_dict=True)
        self.as_list = isinstance(seen.pooler_output, (list, tuple))
        levels = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())]
        flat = [
            torch.cat([part.reshape(-1, part.shape[-1]) for part in level]) for level in levels]
        flat = torch.stack(flat, 1)                         # (all images' tokens, levels, D)
        return list(flat.split(counts))

    def image_inputs(self, ids, features):
        """What the forward pass takes of features [(I, levels, D)], given the ids (B, length)."""
        # Features and not pixels: a frozen tower need not look twice at a picture.
        first = [one[:, 0] for one in features]
        first = first if self.as_list else torch.stack(first)
        seen = BaseModelOutputWithPooling(pooler_output=first)
        levels = features[0].shape[1]
        seen.deepstack_features = [[one[:, k] for one in features] for k in range(1, levels)]
        # Gemma's image tokens see each other; it tells them by their type
        types = {"token_type_ids", "mm_token_type_ids"} & self.forward_arguments
        is_image = (ids == self.image_token).int()
        return {"mm_encoder_outputs": {"image": seen}, **dict.fromkeys(types, is_image)}

    def positions(self, images, ids, mask):
        """(B, length) of ids and mask, padded on either side; (3, B, length) with M-RoPE.

        There an image token has a row and a column beside its place in the text (Qwen, GLM-4.1V).
        """
        if not hasattr(self.model.model, "get_rope_index"):
            # padding on the right counts on: a place told twice would be taken for another text's
            first = mask.argmax(1, keepdim=True)                    # (B, 1)
            return (torch.arange(ids.shape[1]) - first).clamp(min=0)
        grid = torch.cat([one["image_grid_thw"] for one in images])
        is_image = (ids == self.image_token).int()
        return self.model.model.get_rope_index(
            ids, is_image, image_grid_thw=grid, attention_mask=mask)[0]
