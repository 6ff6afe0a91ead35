"""The demo: a small ResNet learns digits, is halved, verified, calibrated, fine-tuned, shown."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.api import rebuild
from graphprune.calibration import calibrate
from graphprune.deploy.exporting import export
from graphprune.deploy.quantizing import quantize
from graphprune.errors import InputError
from graphprune.execute.checkpoint import save
from graphprune.measurement import (
    Measurement,
    bytes_text,
    count_text,
    cpu_threads,
    latency_text,
    measure,
)
from graphprune.plan.plan import plan_of
from graphprune.text import new_figure, share
from graphprune.training.history import History
from graphprune.verification.report import verify

RATIO, BATCH, SEED = 0.5, 64, 0
COLUMNS = ("original", "shrunk", "calibrated", "fine-tuned")


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            projection = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, inputs, height, width]`` to ``width`` channels."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A residual network for 8x8 images of ten digits."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for number in range(depth):
                blocks.append(Block(inputs, width, 2 if stage and not number else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, 1, 8, 8]`` to scores ``[batch, 10]``."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@dataclass(frozen=True)
class Data:
    """Images ``[n, 1, 8, 8]`` and their digits, for training and for testing."""

    images: Tensor
    digits: Tensor
    test_images: Tensor
    test_digits: Tensor


@dataclass(frozen=True)
class Stage:
    """One column of the table: accuracy in [0, 1], cost on one image, cost on a batch, bytes."""

    name: str
    accuracy: float
    image: Measurement
    batch: Measurement
    file_bytes: int


@dataclass(frozen=True)
class Demo:
    """What the demo found and wrote; ``onnx`` is empty where nothing can write such a file."""

    stages: tuple[Stage, ...]
    difference: float
    seconds: float
    model: str
    picture: str
    report: str
    onnx: str


def digits() -> Data:
    """The handwritten digits of scikit-learn, three quarters for training.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise InputError(
            'the demo needs scikit-learn for its images: pip install "graphprune[demo]"'
        ) from None
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, random_state=SEED, stratify=labels)
    x, x_test = (torch.tensor(part / 8 - 1).float().view(-1, 1, 8, 8) for part in split[:2])
    y, y_test = (torch.tensor(part).long() for part in split[2:])
    return Data(x, y, x_test, y_test)


def run(epochs: int, out: Path, console: Console) -> Demo:
    """Run the whole demo.

    Args:
        epochs: epochs of training; fine-tuning takes half as many.
        out: the folder for ``small.safetensors``, ``widths.png``, ``report.html`` and, where ONNX
            Runtime is installed, ``small.onnx``; made when missing.
        console: where progress and tables go.

    Returns:
        What was found, and the files.

    Raises:
        InputError: scikit-learn is not installed, or ``out`` cannot be made.
        VerificationError: the shrunk model differs from the masked original.
    """
    data = digits()
    _make_folder(out)
    # Layers this small only get slower when threads have to wait for one another.
    with cpu_threads(1), torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        return _run(data, epochs, out, console)


def _run(data: Data, epochs: int, out: Path, console: Console) -> Demo:
    start = time.perf_counter()
    model, example = DigitsResNet(), data.images[:1]
    _say(console, "Train", f"a ResNet of {len(widths(model))} convolutions on {len(data.images)} "
         f"images of digits; {len(data.test_images)} more to test it on")  # fmt: skip
    train(model, data, epochs, 0.03, "training", console)
    history = History(example)
    history.record(model, 0, COLUMNS[0], accuracy=accuracy(model, data))

    small = rebuild(model, RATIO, example)
    plan = plan_of(small)
    assert plan is not None  # rebuild leaves it there
    _say(console, "Shrink", f"{RATIO:.0%} of the channels of every layer leave")
    verified = verify(model, small, data.images[:2])
    _say(console, "Verify", "the small model equals the masked original, largest relative "
         f"difference {verified.difference:.1e}")  # fmt: skip
    stages = [_stage(COLUMNS[0], model, data, out), _stage(COLUMNS[1], small, data, out)]
    history.record(small, 1, COLUMNS[1], accuracy=stages[1].accuracy)

    calibrate(small, model, data.images.split(BATCH))
    # From here on no shape changes, hence no cost.
    stages.append(replace(stages[1], name=COLUMNS[2], accuracy=accuracy(small, data)))
    history.record(small, 2, COLUMNS[2], accuracy=stages[2].accuracy)
    _say(console, "Calibrate", "least squares, layer by layer, on images without labels: "
         f"accuracy {stages[1].accuracy:.1%} becomes {stages[2].accuracy:.1%}")  # fmt: skip

    def note(epoch: int) -> None:
        history.record(small, 3 + epoch, COLUMNS[3], accuracy=accuracy(small, data))

    more = max(1, epochs // 2)
    _say(console, "Fine-tune", f"{more} epochs of training, with labels")
    train(small, data, more, 0.01, "fine-tuning", console, note)
    stages.append(replace(stages[1], name=COLUMNS[3], accuracy=accuracy(small, data)))

    path = save(small, out / "small.safetensors")
    onnx = _export(small, out / "small.onnx", data.images[:2], console)
    int8 = None if onnx is None else _quantize(onnx, out / "small.int8.onnx", data, console)
    picture = draw_widths(model, small, out / "widths.png")
    page = plan.report(
        out / "report.html",
        model,
        example,
        small=small,
        verification=verified,
        measured=(stages[0].batch, stages[1].batch),
        accuracy=(stages[0].accuracy, stages[3].accuracy),
        history=history,
        command=f"graphprune demo --epochs {epochs}",
        title="A ResNet for digits, half of its channels",
    )
    console.print(_table(stages))
    for title, file in (
        ("small model", path), ("ONNX", onnx), ("in 8 bits", int8), ("layer widths", picture),
        ("report", page),
    ):  # fmt: skip
        if file is not None:
            console.print(f"{title + ':':<13} [bold]{escape(str(file))}[/]")
    seconds = time.perf_counter() - start
    console.print(f"[dim]{seconds:.0f} seconds in all[/]")
    return Demo(
        tuple(stages),
        verified.difference,
        seconds,
        str(path),
        str(picture),
        str(page),
        str(onnx or ""),
    )


def _say(console: Console, step: str, text: str) -> None:
    console.print(f"[bold]{step:<10}[/] {text}")


def _export(small: nn.Module, path: Path, images: Tensor, console: Console) -> Path | None:
    """Write the small model for an engine, where one is installed."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
        _say(console, "Export", escape('skipped: pip install "graphprune[onnx]" for ONNX Runtime'))
        return None
    made = export(small, path, images, certificate=False)
    assert made.agreement is not None  # it was asked for
    _say(console, "Export", f"{made.format} of {bytes_text(made.bytes)}, the same in ONNX Runtime: "
         f"largest relative difference {made.agreement.difference:.1e}")  # fmt: skip
    return made.path


def _quantize(file: Path, path: Path, data: Data, console: Console) -> Path:
    """Write the exported model with 8-bit numbers; training images give the ranges."""
    test = [(data.test_images, data.test_digits)]
    made = quantize(file, path, data.images[: 8 * BATCH].split(BATCH), test=test)
    assert made.likeness is not None  # there are data
    _say(console, "Quantize", f"int8 of {bytes_text(made.bytes)}: accuracy "
         f"{made.likeness.after or 0:.1%} in ONNX Runtime")  # fmt: skip
    return made.path


def show(path: str, console: Console) -> bool:
    """Open a page in the user's browser: from a terminal, and where windows can be."""
    windows = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if not (console.is_terminal and sys.stdin.isatty() and windows):
        return False
    try:
        return webbrowser.open(Path(path).resolve().as_uri())
    except webbrowser.Error:
        return False


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    rate: float,
    title: str,
    console: Console,
    after: Callable[[int], object] = lambda epoch: None,
) -> None:
    """Train with stochastic gradient descent, a one-cycle learning rate and a fixed order.

    Args:
        model: in place.
        data: images and digits.
        epochs: how often all images are gone through.
        rate: the largest learning rate.
        title: of the progress bar.
        console: where that is shown.
        after: is called with the number of every epoch when it is done.
    """
    steps = -(-len(data.images) // BATCH)
    optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(SEED)
    with _bar(console, title, epochs * steps) as advance:
        for epoch in range(epochs):
            model.train()
            order = torch.randperm(len(data.images), generator=generator)
            for index in torch.split(order, BATCH):
                loss = F.cross_entropy(model(data.images[index]), data.digits[index])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                advance(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}")
            after(epoch)
        advance(f"test accuracy {accuracy(model, data):.1%}", 0)
    model.eval()


def accuracy(model: nn.Module, data: Data) -> float:
    """The fraction of the test images that are recognised."""
    model.eval()
    with torch.no_grad():
        found = model(data.test_images).argmax(1)
    return float((found == data.test_digits).float().mean())


def widths(model: nn.Module) -> dict[str, int]:
    """The output channels of every convolution."""
    return {
        name: module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def draw_widths(model: nn.Module, small: nn.Module, path: Path) -> Path:
    """Draw the layer widths before and after: one bar behind the other."""
    before, after = widths(model), widths(small)
    names = list(before)
    places = range(len(names))
    figure = new_figure(7.5, 1.3 + 0.32 * len(names), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(places, list(before.values()), 0.68, color="#cfdbe6", label="original")
    axes.barh(places, list(after.values()), 0.68, color="#2a78a8", label="shrunk")
    for place, name in enumerate(names):
        axes.annotate(
            f"{before[name]} \N{RIGHTWARDS ARROW} {after[name]}",
            (before[name], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="#3c4650",
        )
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * max(before.values()))
    axes.set_xticks(range(0, max(before.values()) + 1, 32))
    axes.margins(y=0.02)
    axes.set_xlabel("output channels", fontsize=9)
    axes.set_title("Layer widths before and after", loc="left", fontsize=12, weight="bold")
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    axes.tick_params(length=0)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


@contextmanager
def _bar(console: Console, title: str, total: int) -> Iterator[Any]:
    columns = (
        TextColumn(f"{title:<12}"),
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(note: str, steps: int = 1) -> None:
            progress.update(task, advance=steps, note=note)

        yield advance


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(path)!r}: {error.strerror}") from error


def _stage(name: str, model: nn.Module, data: Data, out: Path) -> Stage:
    images = data.test_images
    return Stage(
        name,
        accuracy(model, data),
        measure(model, images[:1], latency=False),
        measure(model, images[:BATCH], repeats=20),
        _file_bytes(model, out),
    )


def _file_bytes(model: nn.Module, out: Path) -> int:
    """The size of the weights as a safetensors file."""
    path = out / ".weights.part"
    try:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
        return path.stat().st_size
    finally:
        path.unlink(missing_ok=True)


def _table(stages: list[Stage]) -> Table:
    first = stages[0]
    table = Table(title="before and after", title_justify="left", title_style="bold")
    table.add_column("")
    for stage in stages:
        table.add_column(stage.name, justify="right")

    small = stages[1]

    def cost(text: Callable[[Stage], str], number: Callable[[Stage], float]) -> list[str]:
        changed = f"{text(small)} ({share(number(small), number(first))})"
        return [text(first), changed, *["same"] * (len(stages) - 2)]

    rows: dict[str, list[str]] = {
        "accuracy": [f"{s.accuracy:.1%}" for s in stages],
        "parameters": cost(lambda s: count_text(s.image.parameters), lambda s: s.image.parameters),
        "MACs per image": cost(lambda s: count_text(s.image.macs), lambda s: s.image.macs),
        f"latency of {BATCH} images": cost(
            lambda s: latency_text(s.batch.latency or 0, None), lambda s: s.batch.latency or 0
        ),
        "file size": cost(lambda s: bytes_text(s.file_bytes), lambda s: s.file_bytes),
    }
    for title, cells in rows.items():
        table.add_row(title, *cells)
    return table
