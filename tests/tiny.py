"""Tiny random checkpoints of other families of chat VLMs, in their own file layout: for families.py's tests.

    make("qwen3_vl", "runs/tiny-qwen3")                     # a folder for load_model: some 300,000 weights, no training

Configurations are in miniature, tokenizers have a token a byte. Does not handle: anything learned.
"""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision import image_processing_pil_llava_onevision
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import families

TEMPLATE = ("{{% for message in messages %}}[{{{{ message['role'] }}}}]{{% for part in message['content'] %}}"
            "{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
            "{end}{{% endfor %}}{{% if add_generation_prompt %}}[assistant]{{% endif %}}")


def byte_tokenizer(special, **named):
    """A token a byte and the special ones; named: such as image_token, which processors ask the tokenizer for."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["<pad>", "<end>", "<turn>", *special]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
                                   extra_special_tokens=named)


def text_settings(tokenizer, **changes):
    return {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
            "initializer_range": 0.08, **changes}


def qwen3_vl(config_class=Qwen3VLConfig, model_class=Qwen3VLForConditionalGeneration, **text):
    """Qwen3-VL, and those that came of it with another language model."""
    tokenizer = byte_tokenizer(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
                                "<|endoftext|>"])       # the class of Qwen3.5's tokenizer adds it else
    token = tokenizer.convert_tokens_to_ids
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 4096})
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = config_class(
        text_config=text_settings(tokenizer, rope_parameters=rope, **text),
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
                       "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
                       "initializer_range": 0.08},
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))
    return model_class, config, Qwen3VLProcessor, \
        {"image_processor": images, "tokenizer": tokenizer}, "<|vision_start|><|image_pad|><|vision_end|>"


def qwen3_vl_moe():
    return qwen3_vl(Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, num_experts=4, num_experts_per_tok=2,
                    moe_intermediate_size=32, mlp_only_layers=[0])


def qwen3_5():
    return qwen3_vl(Qwen3_5Config, Qwen3_5ForConditionalGeneration, num_hidden_layers=4, linear_key_head_dim=16,
                    linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4)


def glm4v():
    tokenizer = byte_tokenizer(["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"])
    token = tokenizer.convert_tokens_to_ids
    images = Glm4vImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 8192})
    config = Glm4vConfig(
        text_config=text_settings(tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                              "mrope_section": [4, 2, 2]}),
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
                       "image_size": 64, "out_hidden_size": 64, "initializer_range": 0.08},
        image_token_id=token("<|image|>"), video_token_id=token("<|video|>"),
        image_start_token_id=token("<|begin_of_image|>"), image_end_token_id=token("<|end_of_image|>"))
    return Glm4vForConditionalGeneration, config, Glm4vProcessor, \
        {"image_processor": images, "tokenizer": tokenizer}, "<|begin_of_image|><|image|><|end_of_image|>"


def qwen2_vl(version=""):
    """Qwen2-VL, or with version "2_5" its successor."""
    tokenizer = byte_tokenizer(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    token = tokenizer.convert_tokens_to_ids
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 4096})
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 32,
               "fullatt_block_indexes": [1]} if version else {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    settings = {"text_config": text_settings(tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                                         "mrope_section": [4, 2, 2]}),
                "vision_config": vision, "image_token_id": token("<|image_pad|>"),
                "video_token_id": token("<|video_pad|>"), "vision_start_token_id": token("<|vision_start|>"),
                "vision_end_token_id": token("<|vision_end|>")}
    model_class, config_class, processor_class = (
        (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLProcessor) if version else
        (Qwen2VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLProcessor))
    return model_class, config_class(**settings), processor_class, \
        {"image_processor": images, "tokenizer": tokenizer}, "<|vision_start|><|image_pad|><|vision_end|>"


def llava():
    tokenizer = byte_tokenizer(["<image>"], image_token="<image>")
    config = LlavaConfig(
        text_config={"model_type": "llama", **text_settings(tokenizer)},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "image_size": 64,
                       "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "projection_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16)
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return LlavaForConditionalGeneration, config, LlavaProcessor, \
        {"image_processor": images, "tokenizer": tokenizer, "patch_size": 16,
         "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}, "<image>"


def llava_onevision():
    tokenizer = byte_tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    token = tokenizer.convert_tokens_to_ids
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_settings(tokenizer)},
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                       "image_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16,
                       "vision_use_head": False},
        image_token_index=token("<image>"), video_token_index=token("<video>"), image_grid_pinpoints=[[64, 64]])
    images = image_processing_pil_llava_onevision.LlavaOnevisionImageProcessorPil(
        size={"height": 64, "width": 64}, image_grid_pinpoints=[[64, 64]])
    return LlavaOnevisionForConditionalGeneration, config, LlavaOnevisionProcessor, \
        {"image_processor": images, "tokenizer": tokenizer, "num_image_tokens": 16,
         "vision_feature_select_strategy": "full"}, "<image>"


def gemma3():
    tokenizer = byte_tokenizer(["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
                               boi_token="<start_of_image>", eoi_token="<end_of_image>",
                               image_token="<image_soft_token>")
    token = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config=text_settings(tokenizer, sliding_window=512, query_pre_attn_scalar=16,
                                  layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                                  eos_token_id=[token("<end>"), token("<turn>")]),
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 64, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=16, boi_token_index=token("<start_of_image>"), eoi_token_index=token("<end_of_image>"),
        image_token_index=token("<image_soft_token>"))
    images = Gemma3ImageProcessorPil(size={"height": 64, "width": 64})
    return Gemma3ForConditionalGeneration, config, Gemma3Processor, \
        {"image_processor": images, "tokenizer": tokenizer, "image_seq_length": 16}, "<start_of_image>"


def internvl():
    tokenizer = byte_tokenizer(["<img>", "</img>", "<IMG_CONTEXT>", "<video>"], start_image_token="<img>",
                               end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_settings(tokenizer)},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": [64, 64], "patch_size": [8, 8]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=16)
    images = GotOcr2ImageProcessorPil(size={"height": 64, "width": 64})
    return InternVLForConditionalGeneration, config, InternVLProcessor, \
        {"image_processor": images, "tokenizer": tokenizer, "image_seq_length": 16}, "<IMG_CONTEXT>"


def idefics3(config_class=Idefics3Config, model_class=Idefics3ForConditionalGeneration,
             processor_class=Idefics3Processor, images_class=Idefics3ImageProcessorPil):
    tokenizer = byte_tokenizer(["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"])
    config = config_class(
        text_config={"model_type": "llama", **text_settings(tokenizer)},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 64, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2)
    images = images_class(size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
    return model_class, config, processor_class, \
        {"image_processor": images, "tokenizer": tokenizer, "image_seq_len": 16}, "<image>"


def smolvlm():
    return idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor, SmolVLMImageProcessorPil)


KINDS = {"llava": llava, "llava_onevision": llava_onevision, "qwen2_vl": qwen2_vl,
         "qwen2_5_vl": lambda: qwen2_vl("2_5"), "qwen3_vl": qwen3_vl, "qwen3_vl_moe": qwen3_vl_moe, "qwen3_5": qwen3_5, "glm4v": glm4v, "gemma3": gemma3, "internvl": internvl,
         "idefics3": idefics3, "smolvlm": smolvlm}


def make(kind: str, folder, seed=0, layers=None):
    """Write a tiny random checkpoint of a family to a folder; layers: of its language model, if not three or four."""
    model_class, config, processor_class, parts, image = KINDS[kind]()
    if layers:
        text = config.get_text_config()
        text.layer_types = (getattr(text, "layer_types", None) or ["full_attention"]) * layers
        text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]
    config.initializer_range = 0.08
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        projection = getattr(model.model.multi_modal_projector, "mm_input_projection_weight", None) \
            if hasattr(model.model, "multi_modal_projector") else None
        if projection is not None:                          # Gemma's starts at 0: pictures would have no effect
            torch.nn.init.normal_(projection, std=0.3)
    model.save_pretrained(folder)
    parts["chat_template"] = TEMPLATE.format(image=image, end="<turn>")
    if "video_processor" in processor_class.get_attributes():
        parts["video_processor"] = None
        processor_class = families.without_video(processor_class)
    families.save_processor(processor_class(**parts), folder)


def llava_of(processor, seed=7):
    """A small random LLaVA-NeXT that fits the shipped pocket model's processor (120-pixel pictures)."""
    tokenizer = processor.tokenizer
    text = {"model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 256,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
            "sliding_window": None, "initializer_range": 0.08, "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 120, "patch_size": 24, "initializer_range": 0.08}
    config = LlavaNextConfig(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[120, 120]], vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=False)
    config.initializer_range = 0.08
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaNextForConditionalGeneration(config)
