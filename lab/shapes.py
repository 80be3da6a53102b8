"""Shapes of published models without their download: what training them takes, random weights.

    python -m lab.shapes                    # lab/README.md's table: which model on which GPU

    processor = byte_processor()
    model = random_model(llava_7b_config(processor), torch.device("cuda"), bits="4")

Speed and memory do not depend on the weights' values; bench.py measures this model.
byte_processor's prompts have one token a byte, more than the real tokenizer's. Does not handle:
real checkpoints (policy.load_model).
"""

import functools
from importlib import resources

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaTokenizer,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen3VLConfig,
)
from transformers.tokenization_utils_base import generate_merges

from lab import pocket
from plumbing.memory import first_that_fits, peak
from plumbing.settings import Settings

# LLaVA-1.6-Mistral's turns: what the user says stands in [INST] … [/INST], the picture first
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    " [/INST]{% else %} {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s> "
    "{% endif %}{% endfor %}")


# ---- LLaVA-1.6-7B ------------------------------------------------------------------------------
@functools.cache
def byte_processor():
    """A processor for 336-pixel pictures whose tokenizer has a token a byte."""
    return pocket.make_processor(pocket.make_tokenizer([], vocabulary=260), side=336, patch=14)


def mistral_processor():
    """LLaVA-1.6-Mistral's processor: Mistral's real 32,000 pieces, then `<image>` and `<pad>`.

    The pieces are mistral-common's, read by sentencepiece: packages that the tests and the
    rehearsal need, no run.
    """
    import sentencepiece
    file = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(token): token for token in range(len(pieces))}
    merges = generate_merges(vocabulary)
    for special in ("<image>", "<pad>"):
        vocabulary[special] = len(vocabulary)
    # legacy, as the hub's: after the picture comes a "▁" (28705), as at every text's beginning
    tokenizer = LlamaTokenizer(
        vocabulary, merges, legacy=True, pad_token="<pad>", add_bos_token=True,
        extra_special_tokens={"image_token": "<image>"})
    return pocket.make_processor(
        tokenizer, side=336, patch=14, chat_template=MISTRAL_TEMPLATE)


def llava_7b_config(processor):
    """llava-hf/llava-v1.6-mistral-7b-hf's configuration: Mistral-7B, CLIP-L/14 at 336 pixels."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768)
    text = MistralConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768,
        sliding_window=None, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return pocket.llava_config(vision, text, processor.tokenizer, vision_feature_layer=-2)


def random_model(config, device, bits="4"):
    """A LLaVA-NeXT of the configuration with random weights.

    In 4 bits its linear layers are NF4 as in policy.load_model.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype)
    if bits != "4":
        return model
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _in_4_bits(module, device, dtype))
            module.weight = None        # one layer in 16 bits at a time
    if device.type == "cuda":
        torch.cuda.empty_cache()        # what building took is not what the model takes
    return model


def _in_4_bits(linear, device, dtype):
    from bitsandbytes.nn import Linear4bit, Params4bit
    small = Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None,
        compute_dtype=dtype, quant_type="nf4", device="meta")
    weight = Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    small.weight, small.bias = weight.to(device), linear.bias
    return small


# ---- which model on which GPU ------------------------------------------------------------------
def qwen3_vl_config(hidden, mlp, layers, heads):
    """The configuration of Qwen/Qwen3-VL-2B- and -4B-Instruct, by what differs between them."""
    text = {
        "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": 128, "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
            "mrope_interleaved": True}}
    vision = {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
        "out_hidden_size": hidden, "deepstack_visual_indexes": [7, 7, 7]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


# tokens of the longest game's prompt, patches of its picture; Mistral's counted, Qwen's text taken
# to be as long
MISTRAL_PROMPT, QWEN_PROMPT = (688, 576), (81 + 112, 324)
LLAVA = "llava-hf/llava-v1.6-mistral-7b-hf"
LLAVA_7B = llava_7b_config(byte_processor())
QWEN_2B = qwen3_vl_config(2048, 6144, 28, 16)
QWEN_4B = qwen3_vl_config(2560, 9728, 36, 32)
# a GPU's GB, the model, its configuration, the rank of its adapters, its prompt
TABLE = (
    (8, "Qwen/Qwen3-VL-2B-Instruct", QWEN_2B, 32, QWEN_PROMPT),
    (12, "Qwen/Qwen3-VL-4B-Instruct", QWEN_4B, 64, QWEN_PROMPT),
    (16, "Qwen/Qwen3-VL-4B-Instruct", QWEN_4B, 128, QWEN_PROMPT),
    (24, LLAVA, LLAVA_7B, 128, MISTRAL_PROMPT),
    (24, "Qwen/Qwen3-VL-2B-Instruct", QWEN_2B, 128, QWEN_PROMPT),
    (40, LLAVA, LLAVA_7B, 128, MISTRAL_PROMPT),
    (48, LLAVA, LLAVA_7B, 128, MISTRAL_PROMPT),
    (80, LLAVA, LLAVA_7B, 128, MISTRAL_PROMPT))


def plans():
    """[(row of TABLE, settings, plan)]: what train.py chooses on a GPU of 1 GiB less than its name
    says."""
    return [
        (row, *first_that_fits(
            row[2], Settings(task="blackjack", rank=row[3]), row[4], (row[0] - 1) * 2**30))
        for row in TABLE]


def table():
    """lab/README.md's table, in Markdown."""
    lines = [
        "| GPU | `python train.py --task blackjack --out runs/NAME` … | bits "
        "| gradient checkpointing | answers a pass, at once | plan |",
        "| --- | --- | --- | --- | --- | --- |"]
    for (gigabytes, name, _, rank, _), settings, plan in plans():
        flag = "" if rank == Settings.rank else f" --rank {rank}"
        checkpointing = ("none", "every layer", "every second")[settings.gradient_checkpointing]
        lines.append(
            f"| {gigabytes} GB | `--model {name}{flag}` | {settings.bits} | {checkpointing} "
            f"| {settings.micro_batch_size}, {settings.play_batch_size} "
            f"| {peak(plan) / 2**30:.1f} GiB |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
