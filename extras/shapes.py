"""Shapes of published models without their download: configurations, random weights, what training them takes.

    python -m extras.shapes                                 # extras/README.md's table: which model on which GPU

    processor = byte_processor()
    model = random_model(llava_7b_config(processor), torch.device("cuda"), bits="4")

Speed and memory do not hang on the weights' values; extras/bench.py measures this model. byte_processor's prompts have
one token a byte, more than the real tokenizer's. Does not handle: real checkpoints (vlm.loading.load_model).
"""

import functools
from importlib import resources

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaTokenizer,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen3VLConfig,
)
from transformers.tokenization_utils_base import generate_merges

from extras import pocket
from plumbing.settings import Settings
from vlm.memory import choose, peak

# LLaVA-1.6-Mistral's turns: what the user says stands in [INST] … [/INST], the picture first
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} [/INST]"
    "{% else %} {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s> {% endif %}{% endfor %}")


@functools.cache
def byte_processor():
    """A processor for 336-pixel pictures whose tokenizer has no merges: a token a byte, and four special ones."""
    return pocket.make_processor(pocket.make_tokenizer([], vocabulary=260), side=336, patch=14)


def mistral_processor():
    """LLaVA-1.6-Mistral's processor: Mistral's real 32,000 pieces, then `<image>` and `<pad>`.

    The pieces are mistral-common's, read by sentencepiece: packages that the tests and the rehearsal need, no run.
    """
    import sentencepiece
    file = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(token): token for token in range(pieces.get_piece_size())}
    merges = generate_merges(vocabulary)
    vocabulary |= {"<image>": len(vocabulary), "<pad>": len(vocabulary) + 1}
    tokenizer = LlamaTokenizer(vocabulary, merges, pad_token="<pad>", add_bos_token=True,
                               extra_special_tokens={"image_token": "<image>"})
    return pocket.make_processor(tokenizer, side=336, patch=14, chat_template=MISTRAL_TEMPLATE)


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


def random_model(config, device, bits="4"):
    """A LLaVA-NeXT of the configuration with random weights; in 4 bits its linear layers are NF4 as in `load_model`."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype)
    if bits != "4":
        return model
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


def qwen3_vl_config(hidden, mlp, layers, heads, vision=(24, 1024, 4096), tied=True):
    """Qwen/Qwen3-VL-…-Instruct's configuration, by what differs between its sizes."""
    depth, vision_hidden, vision_mlp = vision
    return Qwen3VLConfig(
        text_config={"vocab_size": 151936, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
                     "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                         "mrope_interleaved": True}},
        vision_config={"depth": depth, "hidden_size": vision_hidden, "intermediate_size": vision_mlp, "num_heads": 16,
                       "out_hidden_size": hidden, "deepstack_visual_indexes": [depth // 3 - 1] * 3},
        tie_word_embeddings=tied)


# a GPU's GB, the model, its configuration, flags, (tokens of the longest game's prompt, patches of its picture)
MISTRAL_PROMPT, QWEN_PROMPT = (681, 576), (81 + 105, 324)       # Mistral's counted, Qwen's text taken to be as long
LLAVA, QWEN_2B = "llava-hf/llava-v1.6-mistral-7b-hf", qwen3_vl_config(2048, 6144, 28, 16)
QWEN_4B = qwen3_vl_config(2560, 9728, 36, 32)
TABLE = ((8, "Qwen/Qwen3-VL-2B-Instruct", QWEN_2B, {"rank": 32}, QWEN_PROMPT),
         (12, "Qwen/Qwen3-VL-4B-Instruct", QWEN_4B, {"rank": 64}, QWEN_PROMPT),
         (16, "Qwen/Qwen3-VL-4B-Instruct", QWEN_4B, {}, QWEN_PROMPT),
         (24, LLAVA, None, {}, MISTRAL_PROMPT),
         (40, LLAVA, None, {}, MISTRAL_PROMPT),
         (80, LLAVA, None, {}, MISTRAL_PROMPT))


def plans():
    """[(row of TABLE, bits, gradient_checkpointing, plan)]: what train.py chooses where all but 1 GiB is free."""
    return [(row, *choose(row[2] or llava_7b_config(byte_processor()), Settings(task="blackjack", **row[3]), row[4],
                          (row[0] - 1) * 2**30)) for row in TABLE]


def table():
    """extras/README.md's table, in Markdown."""
    lines = ["| GPU | `python train.py --task blackjack --out runs/NAME` … | bits | gradient checkpointing | plan |",
             "| --- | --- | --- | --- | --- |"]
    for (gigabytes, name, _, flags, _), bits, checkpointing, plan in plans():
        flags = "".join(f" --{flag} {value}" for flag, value in flags.items())
        lines.append(f"| {gigabytes} GB | `--model {name}{flags}` | {bits} | {'yes' if checkpointing else 'no'} | "
                     f"{peak(plan) / 2**30:.1f} GiB |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
