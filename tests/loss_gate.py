"""Compiles the kernels of the loss for GPUs that are not here, and says what they take.

    TRITON_INTERPRET=0 python tests/loss_gate.py

prints one JSON list, as `tests/flash_gate.py` does. A process of its own, since tests interpret the
kernels instead.
"""

import json
from unittest import mock

import torch

from nanolm import loss
from nanolm.interpret import compile_only, resources

CARDS = (80, 86, 89, 90)
SIZES = ((256, 32000, True), (256, 32000, False), (64, 1401, True), (768, 50257, True))


def compiled(card, D, V, grads, at_once=False):
    """What each of the three kernels takes."""
    tiles = loss.HOPPER_TILES if card == 90 else loss.OTHER_TILES
    hidden = torch.empty(512, D, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(V, D, device="meta")
    targets = torch.empty(512, dtype=torch.int64, device="meta")
    with (
        compile_only(card) as found,
        mock.patch.object(loss, "set_product", lambda *_, **__: None),
        mock.patch.object(loss, "choose_loss_tiles", lambda _: (tiles, 4)),
        mock.patch.object(loss, "can_at_once", lambda _: at_once),
    ):
        loss.launch_loss(hidden, weight, targets, -100, grads, splits=4)
    case = f"sm_{card}-D{D}-V{V}" + "-grads" * grads
    return [{"case": case, "kernel": name} | resources(kernel) for name, kernel in found]


if __name__ == "__main__":
    rows = [row for card in CARDS for size in SIZES for row in compiled(card, *size)]
    for D, V in ((256, 32000), (64, 1401)):
        rows += compiled(90, D, V, True, at_once=True)
    print(json.dumps(rows))
