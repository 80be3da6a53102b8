"""An episode as a moving picture: what the model saw, what it thought, what was played.

    film = Film()
    evaluate(player, "blackjack", episodes=1, seed=0, watch=film)
    film.save("game.gif")                                   # or .png

Does not handle: probabilities and advantages (viewer.py).
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont


class Film:
    """Collects the first episode's pictures, with the thoughts and the action beside them."""

    def __init__(self):
        self.frames = []

    def __call__(self, picture, choice, episode):
        """evaluate's `watch`; choice is None at the episode's last picture."""
        if episode != 0:
            return
        lines = ["The end."]
        if choice:
            drawn = "" if choice.named else " (the answer names no legal action: drawn at random)"
            lines = textwrap.wrap(choice.text or "", 50)
            lines += textwrap.wrap(f"plays: {choice.action}{drawn}", 50)
        frame = Image.new("RGB", (760, 300), (250, 250, 246))
        frame.paste(Image.fromarray(picture), (0, 0))
        ImageDraw.Draw(frame).multiline_text(
            (318, 20), "\n".join(lines), fill=(30, 30, 36), font=ImageFont.load_default(17),
            spacing=7)
        self.frames.append(frame)

    def save(self, path):
        """A .gif shows one frame after another, a .png one below another."""
        first, *others = self.frames
        if path.endswith(".gif"):
            first.save(path, save_all=True, append_images=others, duration=2500, loop=0)
            return
        width, height = first.size
        strip = Image.new("RGB", (width, height * len(self.frames)))
        for row, frame in enumerate(self.frames):
            strip.paste(frame, (0, row * height))
        strip.save(path)
