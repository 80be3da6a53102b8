"""The pocket model behind `transformers serve`, and whether it plays there as it does here.

    pip install -r extras/requirements-endpoint.txt
    python -m extras.serve --out results/bench/endpoint.json        # two minutes on a core

The server is transformers' own and knows nothing of this program. What makes it sample from policy.py's
distribution stands in a copy of the model's folder (one_view): one view of the picture, and in generation_config.json
that it samples at all (without do_sample it ignores the temperature), without top-k (else the likeliest 50) and without
the forbidden tokens.
What still differs: the server ends an answer at the end token alone, not at the closing brace too (parse.json_closed),
its random numbers are its own, and it answers one call at a time.
Does not handle: other models (point eval.py --endpoint at their server).
"""

import argparse
import contextlib
import json
import logging
import socket
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from env import GAMES
from eval import evaluate
from extras.endpoint import EndpointPlayer
from extras.machine import machine
from players import model_player, open_policy
from plumbing.errors import ModelError, in_words
from vlm.loading import POCKET

LONGEST = 60                # tokens; the pocket model's answers have 13 to 31, and the rest would be time


def one_view(policy, folder):
    """Write a LLaVA-NeXT policy's weights as a plain LLaVA, which sees one view of a picture and never tiles."""
    model, processor, side = policy.model, policy.processor, policy.model.config.vision_config.image_size
    config = LlavaConfig(vision_config=model.config.vision_config, text_config=model.config.text_config,
                         image_token_index=model.config.image_token_id, image_seq_length=(
                             side // model.config.vision_config.patch_size) ** 2,
                         projector_hidden_act=model.config.projector_hidden_act,
                         vision_feature_layer=model.config.vision_feature_layer,
                         vision_feature_select_strategy=model.config.vision_feature_select_strategy)
    with torch.device("meta"):
        copy = LlavaForConditionalGeneration(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "model.image_newline"}
    copy.load_state_dict(weights, assign=True)              # strict: the same weights, but for the tiles' line ends
    copy.generation_config = model.generation_config.__class__(
        do_sample=True, top_k=0, top_p=1.0, bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=sorted(policy.end_tokens), pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=policy.suppress_tokens.nonzero().flatten().tolist())
    copy.save_pretrained(folder)
    pictures, square = processor.image_processor, {"height": side, "width": side}
    LlavaProcessor(
        CLIPImageProcessorPil(size=square, do_center_crop=False, crop_size=square, resample=pictures.resample,
                              rescale_factor=pictures.rescale_factor, image_mean=pictures.image_mean,
                              image_std=pictures.image_std),
        processor.tokenizer, patch_size=processor.patch_size, num_additional_image_tokens=1,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        chat_template=processor.chat_template).save_pretrained(folder)


@contextlib.contextmanager
def serving(folder):
    """Run `transformers serve` for a folder on the loopback, in a thread; yields its URL."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ModelError("transformers serve needs fastapi and uvicorn: pip install -r "
                         "extras/requirements-endpoint.txt") from error
    from transformers.cli.serve import Serve
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = Serve(force_model=str(folder), device="cpu", dtype="float32", host="127.0.0.1", port=port,
                  log_level="error", non_blocking=True)
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)           # else a line a call, among the results
    try:
        while not serve.server.started:
            if not serve._thread.is_alive():
                raise ModelError("transformers serve ended at once; what it printed says why")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serve.kill_server()


def same_answers(policy, player, count, seed=10_000):
    """At the first states of `count` games of each kind: how many greedy answers are the policy's own to the letter."""
    mine, same = model_player(policy, 0, max_new_tokens=LONGEST, greedy=True), 0
    for task in GAMES:
        games = [GAMES[task]() for _ in range(count)]
        pictures, infos = zip(*(game.reset(seed=seed + k) for k, game in enumerate(games)))
        same += sum(one.text == other.text for one, other in
                    zip(mine(games, pictures, infos), player(games, pictures, infos)))
    return same


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(GAMES), default=["numberline", "blackjack"])
    parser.add_argument("--episodes", type=int, default=100, help="held-out games of each task")
    parser.add_argument("--states", type=int, default=20, help="greedy answers compared, of each game")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    with in_words(), tempfile.TemporaryDirectory() as place:
        policy, _ = open_policy("pocket")
        folder = Path(place) / "one-view"
        one_view(policy, folder)
        figures = {**machine(policy.device), "temperature": policy.temperature,
                   "greedy_asked": len(GAMES) * options.states, "greedy_same": {}, "tasks": {}}
        for name, model in (("as shipped", POCKET), ("one view", folder)):
            with serving(model) as url, EndpointPlayer(url, str(model), Path(place) / name, greedy=True,
                                                            max_new_tokens=LONGEST) as player:
                figures["greedy_same"][name] = same_answers(policy, player, options.states)
        with serving(folder) as url:
            for task in options.tasks:
                with EndpointPlayer(url, str(folder), Path(place) / task, 2, temperature=policy.temperature) as player:
                    there = evaluate(player, task, options.episodes, 10_000)
                calls = {key: value for key, value in player.counts().items() if key not in ("endpoint", "answered_by")}
                here = evaluate(model_player(policy, 0), task, options.episodes, 10_000)
                figures["tasks"][task] = {"served": there | calls, "local": here}
        print(json.dumps(figures), flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
