"""Compiles the kernels of flash attention for GPUs that are not here, and says what they take.

    TRITON_INTERPRET=0 python tests/flash_gate.py 80 90

prints one JSON list: for every case and kernel its name, its shared memory, registers, spills and
tensor core instructions. A process of its own, since tests interpret the kernels instead.
"""

import itertools
import json
import sys
from typing import NamedTuple

import torch

from nanolm.flash import launch_backward, launch_forward
from nanolm.interpret import compile_only, resources

CARDS = (80, 86, 89, 90)


class Case(NamedTuple):
    """One launch of each kernel: the card, the numbers' type, and what kernels are compiled for."""

    card: int
    dtype: str
    D: int
    causal: bool
    group: int
    T: int

    def __str__(self):
        mask = "causal" if self.causal else "full"
        return f"sm_{self.card}-{self.dtype}-D{self.D}-{mask}-G{self.group}-T{self.T}"


def chosen(card):
    """The cases of one card that continuous integration has the time for."""
    kinds = [(True, 4), (False, 1)]  # the mask and the group
    if card == 90:  # which has a larger table
        kinds += [(True, 1), (False, 4)]
    cases = [Case(card, "bfloat16", D, *kind, 511) for D in (16, 32, 64, 128) for kind in kinds]
    if card == 90:
        cases += [Case(card, "bfloat16", 64, *kind, 4096) for kind in kinds]
    if card in (80, 90):
        cases += [Case(card, "float16", 64, True, 4, 512), Case(card, "bfloat16", 64, True, 1, 1)]
    if card == 89:
        cases += [Case(card, "float32", 64, True, 4, 511)]
    return cases


def thorough(card):
    """Every combination: for people who change a table of tiles."""
    axes = ["bfloat16", "float16"], (16, 32, 64, 128), (True, False), (1, 2, 4, 8), (511, 4096)
    return [Case(card, *rest) for rest in itertools.product(*axes)]


def turned(case):
    """Whether the gradients are also turned back, as in a training step."""
    return case.causal and case.group == 4


def compiled(case):
    """What each of the three kernels takes."""
    dtype, S = getattr(torch, case.dtype), case.T
    heads = 1 if case.T == 1 else 2 * case.group
    q = torch.empty(2, heads * case.group, case.T, case.D, dtype=dtype, device="meta")
    k, v = (torch.empty(2, heads, S, case.D, dtype=dtype, device="meta") for _ in range(2))
    with compile_only(case.card) as found:
        out, lse = launch_forward(q, k, v, case.causal, 0.125)
        launch_backward(torch.empty_like(out), q, k, v, out, lse, case.causal, 0.125)
        if turned(case):
            table = torch.empty(case.T, case.D // 2, device="meta")
            turn = {"turn": (table, table)}
            launch_backward(torch.empty_like(out), q, k, v, out, lse, True, 0.125, **turn)
    names = [str(case)] * 3 + [f"{case}-turned"] * 2
    return [
        {"case": name, "kernel": kind} | resources(kernel)
        for name, (kind, kernel) in zip(names, found, strict=False)
    ]


if __name__ == "__main__":
    cases = thorough if "--thorough" in sys.argv else chosen
    cards = [int(word) for word in sys.argv[1:] if word.isdigit()]
    print(json.dumps([row for card in cards for case in cases(card) for row in compiled(case)]))
