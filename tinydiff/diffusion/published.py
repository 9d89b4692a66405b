"""What others report for the tutorial's nets on MNIST, so that "is my loss normal?" has an answer.

The loss is `score_matching_loss` averaged over the images of an epoch, by epoch counted from 0.
"""

from __future__ import annotations

# The seminar's notebook of 2022 (see docs), as printed in it.
LOSS: dict[str, dict[int, float]] = {
    "concat": {49: 41.5},
    "add": {0: 1154.0, 1: 300.0, 10: 64.9, 20: 42.4, 40: 30.0, 60: 26.5, 74: 24.75},
    "conditional": {0: 1010.0, 1: 276.0, 10: 56.7, 20: 37.9, 50: 27.1, 80: 23.6, 99: 22.30},
}

# For scale: the same loss, on the test images, of scores that need no net.
SIMPLE: dict[str, float] = {"zero score": 784.0, "a Gaussian a pixel": 56.8, "best affine denoiser": 31.1}
