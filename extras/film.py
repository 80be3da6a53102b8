"""An episode as a moving picture: what the model saw, what it thought, what was played.

    film = Film()
    evaluate(player, "blackjack", episodes=1, seed=0, watch=film)
    film.save("game.gif")                                   # or .png

Does not handle: probabilities and advantages (viewer.py).
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont


class Film:
    """Collects one episode's pictures with the thoughts and the action beside them; save() writes a GIF or a PNG."""

    def __init__(self):
        self.frames = []

    def __call__(self, picture, choice, episode):
        if episode != 0:
            return
        frame = Image.new("RGB", (760, 300), (250, 250, 246))
        frame.paste(Image.fromarray(picture), (0, 0))
        pen, font = ImageDraw.Draw(frame), ImageFont.load_default(17)
        lines = ["The end."]
        if choice:
            drawn = "" if choice.named else " (the answer names no legal action: drawn at random)"
            lines = textwrap.wrap(choice.text or "", 50) + textwrap.wrap(f"plays: {choice.action}{drawn}", 50)
        pen.multiline_text((318, 20), "\n".join(lines), fill=(30, 30, 36), font=font, spacing=7)
        self.frames.append(frame)

    def save(self, path):
        """A .gif shows one frame after another, a .png one below another."""
        if path.endswith(".gif"):
            self.frames[0].save(path, save_all=True, append_images=self.frames[1:], duration=2500, loop=0)
            return
        width, height = self.frames[0].size
        strip = Image.new("RGB", (width, height * len(self.frames)))
        for row, frame in enumerate(self.frames):
            strip.paste(frame, (0, row * height))
        strip.save(path)
