"""Compiles the kernels of the decoder for GPUs that are not here, and says what they take.

    TRITON_INTERPRET=0 python tests/decode_gate.py

prints one JSON list, as `tests/flash_gate.py` does. A process of its own, since tests interpret the
kernels instead.
"""

import json
import sys

import torch

from nanolm.decode import Kernels, Plan
from nanolm.interpret import compile_only, resources
from nanolm.model import ModelConfig, Transformer

CARDS = (80, 86, 89, 90)
SIZES = ((1, Plan(8)), (64, Plan(2)))


def compiled(card, batch_size, plan, preset="default", dtype=torch.bfloat16):
    """What each of the kernels takes, without filters and with them."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset(preset)).to(dtype)
    engine = Kernels(model, model.new_cache(batch_size), model.config.vocab_size, plan)
    with compile_only(card) as found:
        for filters in (False, True):
            engine.launch(1, filters)
    case = f"sm_{card}-{preset}-B{batch_size}-G{plan.G}"
    return [{"case": case, "kernel": name} | resources(kernel) for name, kernel in found]


if __name__ == "__main__":
    cards = map(int, sys.argv[1:]) if sys.argv[1:] else CARDS
    print(json.dumps([row for card in cards for size in SIZES for row in compiled(card, *size)]))
