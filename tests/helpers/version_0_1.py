"""Files that moebox 0.1 wrote, in `FOLDER`, and the picks that it recorded in them."""

import numpy as np

from helpers.paths import TESTS

FOLDER = TESTS / "data" / "version_0_1"
LAYERS, EXPERTS, TOP_K = 3, 8, 2
PROMPT_TOKENS = 30


def picks():
    """int32 [40, LAYERS, TOP_K]: those of a prompt, then those of ten decoded tokens."""
    tokens = np.arange(40)
    layers = []
    for layer in range(LAYERS):
        first, second = (tokens + layer) % EXPERTS, (3 * tokens + layer + 1) % EXPERTS
        layers.append(np.stack([first, np.where(first == second, (second + 1) % EXPERTS, second)], axis=1))
    return np.stack(layers, axis=1).astype(np.int32)
