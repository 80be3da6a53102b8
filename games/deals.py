"""Which deals an evaluation plays: a number of them by seeds, or every one that there is.

    choose_deals(game, 1000, seed=10_000)               # dealt by seeds 10,000 to 10,999
    choose_deals(game, "all", seed=10_000, draws=4)     # each four times, with its own weight

Does not handle: what deals a game has (Game.all_deals), playing them (eval.py).
"""

from typing import NamedTuple

from games.game import GameError


class Deal(NamedTuple):
    """How an episode is dealt, and how much it counts in the means."""

    weight: float
    seed: int
    options: dict = None        # of Game.reset


def choose_deals(game, episodes, seed, draws=4) -> list[Deal]:
    """The deals of a whole evaluation, in order.

    episodes: how many, dealt by seed, seed + 1, … and alike in weight; or "all": every deal of the
    game `draws` times, each by a seed of its own, with the weight that it has. ValueError
    (GameError is one) where that cannot be.
    """
    if episodes != "all":
        if episodes < 1:
            raise ValueError(f"episodes must be 1 or more, not {episodes}")
        episodes = min(episodes, game.held_out_episodes)
        return [Deal(1, seed + k) for k in range(episodes)]
    if not 2 <= draws <= 1000:
        raise GameError("--draws must be 2 to 1000: how far they differ makes the interval")
    found = []
    for draw in range(draws):
        game.reset(seed=seed + draw)
        deals = game.all_deals()
        if deals is None:
            raise GameError(
                f"the deals of {type(game).__name__} have no end: --episodes takes a number here")
        first = seed + draw * len(deals)
        found += [
            Deal(probability, first + k, {"deal": deal})
            for k, (probability, deal) in enumerate(deals)]
    return found
