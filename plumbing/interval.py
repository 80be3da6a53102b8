"""How sure a share is: the interval that stands beside every success rate.

Does not handle: what differs between seeds (extras/recorded.py).
"""

import math


def wilson(successes, trials, z=1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share.

    >>> [round(bound, 3) for bound in wilson(50, 100)]
    [0.404, 0.596]
    """
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
