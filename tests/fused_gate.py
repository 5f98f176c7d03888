"""Compiles the kernels between the products for GPUs that are not here, and says what they take.

    TRITON_INTERPRET=0 python tests/fused_gate.py

prints one JSON list, as `tests/flash_gate.py` does. A process of its own, since tests interpret the
kernels instead.
"""

import json

import torch

from nanolm import fused
from nanolm.interpret import compile_only, resources

CASES = ((80, 256), (86, 256), (89, 256), (90, 64), (90, 256), (90, 1024))  # cards, channels


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(C):
    """Each kernel once, on tensors that are nowhere, with C channels."""
    x, weight, scale = meta(100, C), meta(C), meta(100, dtype=torch.float32)
    table, row = meta(50, 16, dtype=torch.float32), meta(5000, dtype=torch.float32)
    fused.launch_norm(x, x, weight, 1e-5)
    fused.launch_norm_back(x, x, scale, weight, x, meta(4, C, dtype=torch.float32))
    fused.launch_rotate(meta(2, 50, 3 * 32), table, table, 2)
    fused.launch_gate(meta(100, 2 * C))
    fused.launch_gate_back(x, meta(100, 2 * C))
    place, words = meta(300, C, dtype=torch.float32), meta(100, dtype=torch.int32)
    fused.launch_add_rows(place, words, meta(100, dtype=torch.int64), x)
    good, loss = meta(dtype=torch.bool), meta(dtype=torch.float32)
    fused.launch_clip([row, row], loss, good, 1, 1.0, True)
    fused.launch_adamw(row, row, row, meta(5000), row, row, row, good, (0.9, 0.95), 1e-8, 0.1)


def launch_products(C):
    """The products with something behind them, which are for one kind of card."""
    x, norm_weight = meta(32768, C), meta(C, dtype=torch.float32)
    for half in (16, 64):
        table = meta(512, half, dtype=torch.float32)
        fused.launch_product_turned(x, meta(384, C), table, table, 2)
    fused.launch_product_norm(x, meta(C, C), x, norm_weight, 1e-5)


def compiled(card, C):
    with compile_only(card) as found:
        launch_all(C)
        if card == 90 and C <= 256:
            launch_products(C)
    case = f"sm_{card}-C{C}"
    return [{"case": case, "kernel": name} | resources(kernel) for name, kernel in found]


if __name__ == "__main__":
    print(json.dumps([row for case in CASES for row in compiled(*case)]))
