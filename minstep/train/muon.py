"""Muon's one idea: an update with all its singular values made 1, so that each direction counts.

The momentum of a matrix is nearly of low rank: a few directions drown the rest. Its nearest
orthogonal matrix has the same directions, all of one size. A few matrix products find it, with no
singular value decomposition.
"""

import numpy as np

from minstep.tap import Array

# a, b and c of each step's polynomial a*x + b*x^3 + c*x^5. Each is the best there is for the range
# of singular values that the one before leaves.
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
SAFETY = 1.01  # as if values were 1% smaller: one that rounding lifts over the range does not grow
TINY = 1e-7  # a matrix of a smaller norm fades, instead of its noise being blown up


def orthogonalised(update: Array, steps: int = 6) -> Array:
    """The nearest orthogonal matrix, nearly: U V^T where the update is U S V^T.

    update [O, I], or a stack [E, O, I] of which each matrix stands for itself, float32 or float64.
    Returns the same shape and dtype. `steps`, 1 to 6, of the iteration. After 6, singular values
    from 1e-3 to 1 of the matrix's Frobenius norm are within 0.993 to 1.002, those of 1e-4 at 0.18;
    after 5, within 0.84 to 1.13. A matrix of zeros stays zero.
    Source: Polar Express, arXiv 2505.16932, its coefficients and safety factor; 6 steps of it as in
        report section D, which ran them in float16. Muon, kellerjordan.github.io/posts/muon.
    Differs: Muon's first form repeats one polynomial (3.4445, -4.7750, 2.0315) 5 times, which
        leaves singular values further from 1: docs/12-training.md computes how far.
    Checked by: tests/train/test_muon.py
    """
    is_tall = update.shape[-2] > update.shape[-1]
    x = update.swapaxes(-1, -2) if is_tall else update  # x x^T is then the smaller product
    norm = np.sqrt(np.square(x).sum(axis=(-2, -1), keepdims=True))  # [..., 1, 1]
    x = x / (norm * SAFETY + TINY)
    for a, b, c in COEFFICIENTS[:steps]:
        gram = x @ x.swapaxes(-1, -2)
        higher = gram @ gram
        higher *= c / SAFETY**5
        gram *= b / SAFETY**3
        gram += higher
        added = gram @ x
        x *= a / SAFETY
        x += added
    return x.swapaxes(-1, -2) if is_tall else x
