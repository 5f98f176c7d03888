"""x"""
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """What a tensor held: its least and largest finite number, and how many were not finite."""

    where: str  # the module or the weight
    what: str  # value (of a weight), input, output, loss, gradient, gradient of the output ...
    shape: tuple[int, ...]
    low: float
    high: float
    nan: int
    inf: int

    @property
    def name(self) -> str:
        """In words, such as "the output of blocks.0.attn"."""
        return f"the {self.what} of {self.where}" if self.where else f"the {self.what}"

    @property
    def bad(self) -> bool:
        """Whether any number was not finite."""
        return self.nan + self.inf > 0

    @property
    def peak(self) -> float:
        """The largest finite magnitude."""
        return max(-self.low, self.high, 0.0)

    def __str__(self) -> str:
        found = f"{self.low:.3g} to {self.high:.3g}" if self.low <= self.high else "nothing finite"
        counts = f", {self.nan} NaN and {self.inf} infinite of {math.prod(self.shape)}"
        return f"{self.name}: {found}" + (counts if self.bad else "")


def measure(x: Tensor) -> Tensor:
    """The least and largest finite number of x, its NaNs and its infinities: (4,) float64.

    The result stays on the device; nothing waits.
    """
    x = x.detach()
    finite = x.isfinite()
    low, high = x.where(finite, math.inf).amin(), x.where(finite, -math.inf).amax()
    return torch.stack([part.double() for part in (low, high, x.isnan().sum(), x.isinf().sum())])

from functools import partial
from typing import Any

from torch import nn


class Watch:
    """Measures what passes between the modules of a model, forward and backward, in order.

    Within `with Watch(model) as watch:` run the model plainly, neither compiled nor recorded;
    `watch.readings()` then tells what was seen, the weights first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows: list[tuple[str, str, tuple[int, ...], Tensor]] = []
        self.handles: list[Any] = []
        self.seen: dict[int, Tensor] = {}  # kept alive, or another tensor might get the same id

    def note(self, where: str, what: str, x: Tensor) -> None:
        """Measure x, and its gradient when it comes."""
        self.rows.append((where, what, tuple(x.shape), measure(x)))
        if x.requires_grad and not x.is_leaf:
            x.register_hook(partial(self.note, where, f"gradient of the {what}"))

    def look(self, where: str, what: str, found: Any) -> None:
        """Note the tensors that a module was given, or gave, but none of them twice."""
        for i, x in enumerate(found if isinstance(found, tuple) else (found,)):
            if isinstance(x, Tensor) and x.is_floating_point() and id(x) not in self.seen:
                self.seen[id(x)] = x
                self.note(where, f"{what} {i}" if i else what, x)

    def before(self, where: str, module: nn.Module, given: Any) -> None:
        self.look(where, "input", given)

    def after(self, where: str, module: nn.Module, given: Any, found: Any) -> None:
        self.look(where, "output", found)

    def complete(self, where: str, weight: Any) -> None:
        self.note(where, "gradient", weight.grad)

    def __enter__(self) -> "Watch":
        for name, weight in self.model.named_parameters():
            self.note(name, "value", weight)
            hook = weight.register_post_accumulate_grad_hook(partial(self.complete, name))
            self.handles.append(hook)
        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_pre_hook(partial(self.before, name)))
            self.handles.append(module.register_forward_hook(partial(self.after, name)))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.seen.clear()

    def readings(self) -> list[Reading]:
        """All that was seen, in order; here the device is waited for, once."""
        numbers = torch.stack([row[-1] for row in self.rows]).tolist()
        return [
            Reading(*row[:-1], low, high, int(nan), int(inf))
            for row, (low, high, nan, inf) in zip(self.rows, numbers, strict=True)
        ]

from collections.abc import Iterable

from nanolm.train import LossFunction


def replay(
    model: nn.Module, loss_of: LossFunction, micro: Iterable[tuple[Tensor, Tensor]]
) -> list[Reading]:
    """What a model's tensors hold in a forward and backward pass over the micro-batches.

    `loss_of` must run `model` plainly. Weights and their gradients are left as they are.
    """
    weights = list(model.parameters())
    kept = [p.grad for p in weights]
    try:
        for p in weights:
            p.grad = None
        with Watch(model) as watch, torch.enable_grad():
            for inputs, targets in micro:
                loss = loss_of(inputs, targets)
                watch.note("", "loss", loss)
                loss.backward()
                watch.seen.clear()
            return watch.readings()
    finally:
        for p, grad in zip(weights, kept, strict=True):
            p.grad = grad


def first_bad(readings: list[Reading]) -> int | None:
    """Which of the readings is the first that is bad, if any is."""
    return next((i for i, reading in enumerate(readings) if reading.bad), None)

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nanolm.train import write_file


@dataclass
class Report:
    """What was found about a step; `save` and `load` keep it in a folder, as report.json."""

    step: int  # counted from 1, as in the log
    way: str  # how the step was repeated
    readings: list[Reading]  # of this step
    before: dict[int, list[Reading]]  # of some of the steps before, by their numbers
    in_float32: bool | None = None  # whether it happens in float32 too, where that was tried

    @property
    def first(self) -> Reading | None:
        """Where it began; None if the repeated step was finite."""
        i = first_bad(self.readings)
        return None if i is None else self.readings[i]

    def history(self, where: str, what: str = "output") -> dict[int, Reading]:
        """The readings of one tensor, by step; of its last micro-batch."""
        steps = sorted((self.before | {self.step: self.readings}).items())
        found = {step: [r for r in rows if r[:2] == (where, what)] for step, rows in steps}
        return {step: rows[-1] for step, rows in found.items() if rows}

    def sentence(self) -> str:
        """The finding in one line."""
        if not (first := self.first):
            return "repeated plainly it is finite: suspect what was compiled, or overwritten memory"
        words = f"it begins in {first}" + ("" if self.way == "plainly" else f", {self.way}")
        past = [r for step, r in self.history(*first[:2]).items() if step < self.step]
        if past:
            low, high = min(r.low for r in past), max(r.high for r in past)
            words += f"; in {len(past)} steps before it went from {low:.3g} to {high:.3g}"
        return words + ("; in float32 this step is finite" if self.in_float32 is False else "")

    def table(self, before: int = 3, after: int = 1) -> str:
        """The readings around the first bad one, a line each."""
        i = first_bad(self.readings) or 0
        return "\n".join(map(str, self.readings[max(i - before, 0) : i + 1 + after]))

    def save(self, folder: Path) -> None:
        """Write report.json into a folder."""
        content = json.dumps(asdict(self) | {"sentence": self.sentence()})
        write_file(folder / "report.json", content.encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Read report.json back."""

        def rows(part: list[list[Any]]) -> list[Reading]:
            return [Reading(row[0], row[1], tuple(row[2]), *row[3:]) for row in part]

        found = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        before = {int(step): rows(part) for step, part in found["before"].items()}
        return cls(found["step"], found["way"], rows(found["readings"]), before, found["in_float32"])

def plot_ranges(report: Report, axes: Any) -> None:
    """Draw, by step, the largest magnitude of each block's output and of the first bad tensor."""
    names = dict.fromkeys(r.where for r in report.readings if r.what == "output")
    chosen = [(name, "output") for name in names if name.count(".") == 1]
    first = report.first[:2] if report.first else None
    if first:
        chosen = [first, *(one for one in chosen if one != first)]
    for where, what in chosen:
        past = {step: r for step, r in report.history(where, what).items() if 0 < r.peak < math.inf}
        width, label = (2.5 if (where, what) == first else 1), f"{what} of {where}"
        if past:
            axes.plot(list(past), [r.peak for r in past.values()], linewidth=width, label=label)
    if axes.lines:
        axes.set(yscale="log")
        axes.legend(fontsize="small")
    axes.axvline(report.step, color="red", linestyle=":")
    axes.set(xlabel="step", ylabel="largest magnitude")

from dataclasses import replace

from tqdm import tqdm

from nanolm.model import Transformer
from nanolm.optim import AdamW, decay_groups
from nanolm.train import (
    Run,
    load_checkpoint,
    loss_function,
    step_folders,
    train_step,
    unpack_optimizer,
)

LONGEST = 1000  # steps that are repeated for what they tell of the ranges
READ = 40  # about how many of them are read


def rewound(run: Run) -> Run:
    """A copy of a run as its newest checkpoint left it, neither compiled nor recorded."""
    c = replace(run.config, compile=False, graph=False, on_nan="skip")
    device, folders, step = next(run.model.parameters()).device, step_folders(run.folder), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c.seed)
        model = Transformer(run.model.config).to(device)
    optimizer = AdamW(decay_groups(model, c.weight_decay), lr=c.lr, betas=(c.beta1, c.beta2))
    if folders:
        saved = load_checkpoint(folders[-1], device, optimizer=True)
        model.load_state_dict(saved.model.state_dict())
        unpack_optimizer(model, optimizer, saved.optimizer)
        step = saved.step
    parts: Any = dict(config=c, model=model, optimizer=optimizer, graphed=None, pending=[])
    return replace(run, loss_of=loss_function(model, device, c), step=step, **parts)


def steps_before(run: Run, step: int) -> dict[int, list[Reading]]:
    """Readings of the steps just before this one, and of some further back, by their numbers.

    Empty if the newest checkpoint is more than LONGEST steps back, or not before it.
    """
    again, found = rewound(run), {}
    todo = step - 1 - again.step
    if not 0 < todo <= LONGEST:
        return {}
    for left in tqdm(range(todo, 0, -1), "reading the steps before", leave=False, disable=None):
        if left > READ // 2 and left % max(todo // READ, 1):
            train_step(again)
            continue
        with Watch(again.model) as watch:
            train_step(again)
        found[again.step] = watch.readings()
    return found

import contextlib
from collections.abc import Iterator

import safetensors.torch

from nanolm.train import fingerprint, save_checkpoint, to_device


def ways(run: Run) -> Iterator[tuple[str, nn.Module, LossFunction]]:
    """How a step of the run can be repeated plainly."""
    config, device = replace(run.config, compile=False), next(run.model.parameters()).device
    yield "plainly", run.model, loss_function(run.model, device, config)
    if run.graphed is not None:
        yield "repeated by the twin", run.graphed.twin, run.graphed.twin.loss


def keep_state(run: Run, name: str, done: int, micro: list[tuple[Tensor, Tensor]]) -> Path:
    """Save the state after `done` steps as a run of its own in the run's folder, with a batch."""
    folder, prepared, c = run.folder / name, run.folder / "data", run.config
    data = {"cursor": done * c.grad_accum, "text": fingerprint(run.batches.data.meta)}
    save_checkpoint(folder, run.model, run.optimizer, step=done, keep=1, val_loss=None, data=data)
    here = (str(prepared),) if (prepared / "tokenizer.json").is_file() else c.data
    config = replace(c, name=name, runs_dir=str(run.folder), data=here)
    both = {"model": asdict(run.model.config), "train": asdict(config)}
    write_file(folder / "config.json", json.dumps(both, indent=1).encode())
    run.tokenizer.save(folder / "tokenizer.json")
    batch = {f"inputs.{i}": pair[0].cpu() for i, pair in enumerate(micro)}
    batch |= {f"targets.{i}": pair[1].cpu() for i, pair in enumerate(micro)}
    write_file(folder / "batch.safetensors", safetensors.torch.save(batch))
    return folder


def investigate(run: Run, what: str, step: int) -> str:
    """Find where a number that is not finite began, save the evidence; the finding in one line.

    `what` is loss, gradient or validation loss; `step` counts from 1. The weights are those
    before the step or, for a validation loss, after it.
    """
    c, checks, device = run.config, what == "validation loss", next(run.model.parameters()).device
    batches = run.val_batches if checks else run.batches
    start, count = (0, c.eval_batches) if checks else ((step - 1) * c.grad_accum, c.grad_accum)
    micro = [to_device(batches.batch(start + i), device) for i in range(count)]
    if run.graphed is not None and run.graphed.latch and not checks:  # it went on counting
        counts = [run.optimizer.state[p]["step"] for p in run.graphed.held]
        torch._foreach_sub_(counts, run.step - (step - 1))
    for way, model, loss_of in ways(run):
        report = Report(step, way, replay(model, loss_of, micro), {})
        if report.first:
            break
    if report.first and (run.graphed is not None or c.dtype == "bfloat16"):
        report.in_float32 = first_bad(replay(run.model, run.model.loss, micro)) is not None
    report.before = steps_before(run, step)
    folder = keep_state(run, f"nan-{step:06d}", step if checks else step - 1, micro)
    report.save(folder)
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        plot_ranges(report, figure.add_subplot())
        figure.savefig(folder / "ranges.png", dpi=120)
    return f"{report.sentence()} (saved in {folder})"
