"""The shape of LLaVA-1.6-Mistral-7B without its download: configuration, random weights in NF4, memory plan.

    processor = byte_processor()
    model = random_nf4(llava_7b_config(processor), torch.device("cuda"))
    plan = memory_plan(llava_7b_config(processor), rank=128, micro_batch=4, play_batch=16, prompt_tokens=750,
                       answer_tokens=100)                          # {use: bytes}, counted on no device

Speed and memory do not hang on the weights' values; extras/bench.py measures this model. Prompts are of one token a
byte, longer than the real tokenizer's. Does not handle: the real checkpoint (loading.load_model).
"""

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

from extras import pocket


def byte_processor():
    """A processor for 336-pixel pictures whose tokenizer has no merges: a token a byte, and four special ones."""
    return pocket.make_processor(side=336, patch=14, vocabulary=260)


def llava_7b_config(processor):
    """llava-hf/llava-v1.6-mistral-7b-hf's configuration: Mistral-7B, CLIP-L/14 at 336 pixels, its tokens."""
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14, projection_dim=768)
    text = MistralConfig(vocab_size=32064, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768,
                         sliding_window=None, rms_norm_eps=1e-5,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    return LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=image_token,
                           image_grid_pinpoints=[[336, 336]], vision_feature_layer=-2,
                           vision_feature_select_strategy="default", tie_word_embeddings=False)


def random_nf4(config, device):
    """A LLaVA-NeXT of the configuration with random weights, its linear layers in NF4 as `load_model` has them."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for path in [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]:
        module = model.get_submodule(path)
        if module is not head:
            small = Linear4bit(module.in_features, module.out_features, bias=module.bias is not None,
                               compute_dtype=dtype, quant_type="nf4", device="meta")
            small.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4",
                                      compress_statistics=True).to(device)
            small.bias = module.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, small)
            del module                                      # one layer in 16 bits at a time
    if device.type == "cuda":
        torch.cuda.empty_cache()                            # what building took is not what the model takes
    return model


def memory_plan(config, rank, micro_batch, play_batch, prompt_tokens, answer_tokens):
    """Bytes by use, for one GPU with NF4, bf16 compute, adapters on all parts: {use: bytes}. Built on no device.

    Exact for what stays: a quantised weight is half a byte, one byte of scale per 64 and a float32 per 64 · 256 of
    them; an adapter's or the value head's weight is fp32 with its gradient and Adam's two moments. For what comes
    and goes, the largest tensors of the code in policy.py are counted, the rest is not: a lower bound.
    """
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
        head = model.get_output_embeddings()
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        quantised = sum(nf4_bytes(module.weight.numel()) for module in linear)
        other = 2 * (sum(p.numel() for p in model.parameters()) - sum(module.weight.numel() for module in linear))
    adapters = sum(rank * (module.in_features + module.out_features) for module in linear)
    text, vision = config.text_config, config.vision_config
    value_head = (text.hidden_size + 1) * 1024 + 1025 * 512 + 513
    patches = (vision.image_size // vision.patch_size) ** 2
    length = prompt_tokens + answer_tokens
    return {
        "weights, NF4": quantised,
        "weights, bf16 (embeddings, head, norms, biases)": other,
        "adapters and value head, fp32": 4 * (adapters + value_head),
        "their gradients": 4 * (adapters + value_head),
        "Adam's moments": 8 * (adapters + value_head),
        "update: checkpoints (a bf16 hidden state a layer)": 2 * micro_batch * (
            length * text.hidden_size * text.num_hidden_layers
            + (patches + 1) * vision.hidden_size * vision.num_hidden_layers),
        "update: one layer computed again (8 bf16 MLP-wide tensors)":
            2 * 8 * micro_batch * length * text.intermediate_size,
        "update: head in fp32 and 4 × the answers' logits":
            4 * text.vocab_size * (text.hidden_size + 4 * micro_batch * answer_tokens),
        "play: keys and values, bf16": 2 * 2 * play_batch * length * text.num_hidden_layers
            * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads),
    }


def nf4_bytes(weights):
    """Bytes of a weight matrix in NF4 with double quantisation, blocks of 64 and of 256 (arXiv 2305.14314)."""
    blocks = -(-weights // 64)
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256)
