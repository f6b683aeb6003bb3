"""Each primitive of DenseNet-121 on every backend, and its dense blocks as a whole, against their floors.

A floor counts what a primitive must read and write once (operands, results, both passes over an accumulated gradient),
at the bandwidth of a copy, and its multiplications at the rate of a large matrix product; the longer of the two.
"""

import functools
import math
import statistics
import time
from types import ModuleType
from typing import NamedTuple

import gpu_predictions
import torch
from gpu_phase import Item
from gpu_run import Run, read_rows
from gpu_timing import ARITHMETICS, Rates, Work, graph_of, interleaved, measure_rates, milliseconds, tf32
from torch import Tensor

from fused_densenet import FusedDenseBlock, use_backend
from fused_densenet.backends import BACKENDS
from fused_densenet.backends.contract import Gradient, Norm, Owed, pooled
from fused_densenet.ops.layout import empty_channels_last

CALLS = 10
"""In a CUDA graph, at least."""
MOST_COPIES = 64
FORWARD, BACKWARD = "norm_relu_conv", "norm_relu_conv_backward"
PLACE, PLACE_BACKWARD = "place", "place_backward"
COPY, MOMENTS = "place without moments", "place of moments alone"
"""Of ``place`` each half; predicted, not measured on their own."""
POOL, POOL_BACKWARD = "norm_relu_pool", "norm_relu_pool_backward"


class Problem(NamedTuple):
    """A primitive on ``pixels`` (N, D, H, W): ``C`` channels to ``K`` (both the same where there is no convolution).

    ``accumulate`` is that of ``norm_relu_conv_backward``: into the block's gradient, or stored. ``pool`` halves the image
    before the product, or for a stem's maxima; ``pixels`` are the input's.
    """

    primitive: str
    pixels: tuple[int, int, int, int]
    C: int
    K: int
    side: int
    accumulate: bool = False
    pool: bool = False

    def out_pixels(self) -> tuple[int, ...]:
        return (self.pixels[0], *pooled(self.pixels[1:])) if self.pool else self.pixels

    def __str__(self) -> str:
        n, _, h, w = self.pixels
        product = f", {self.C} to {self.K}, {self.side}×{self.side}" if self.side else f", {self.C}"
        return f"{self.primitive}{product}, {n}×{h}×{w}{', pooled' * self.pool}"

    def moved(self, item: int, weight_item: int) -> int:
        """Bytes, each once."""
        p, out = math.prod(self.pixels) * self.C, math.prod(self.out_pixels()) * self.K
        weight = self.C * self.K * self.side**2 * weight_item
        if self.primitive == FORWARD:
            return (p + out) * item + weight
        if self.primitive == BACKWARD:
            return ((2 + self.accumulate) * p + 2 * out) * item + 2 * weight
        of_pixels = {PLACE: 2, COPY: 2, MOMENTS: 1, PLACE_BACKWARD: 3, POOL: 1, POOL_BACKWARD: 2}[self.primitive]
        return (of_pixels * p + out * (self.primitive in (POOL, POOL_BACKWARD))) * item

    def flops(self) -> int:
        product = 2 * math.prod(self.out_pixels()) * self.C * self.K * self.side**2
        return product * {FORWARD: 1, BACKWARD: 2}.get(self.primitive, 0)


BLOCKS = ((6, 64, 4), (12, 128, 8), (24, 256, 16), (16, 512, 32))
"""DenseNet-121's: layers, input channels, and how much smaller than the image."""
GROWTH, WIDTH = 32, 128


def layer_problems(batch: int, side: int, layers: int, channels: int) -> list[Problem]:
    """Every primitive of a training step of a dense block's layers, forward and backward of each."""
    pixels, problems = (batch, 1, side, side), []
    for layer in range(layers):
        c = channels + layer * GROWTH
        problems.append(Problem(FORWARD, pixels, c, WIDTH, 1))
        problems.append(Problem(FORWARD, pixels, WIDTH, GROWTH, 3))
        problems.append(Problem(BACKWARD, pixels, WIDTH, GROWTH, 3))
        problems.append(Problem(BACKWARD, pixels, c, WIDTH, 1, accumulate=True))
    return problems


def block_problems(batch: int, side: int, layers: int, channels: int) -> list[Problem]:
    """Every primitive of a training step of a dense block alone, as the schedule calls them: with its input placed in the
    buffer, the result's gradient in the gradients' buffer, and the input's gradient out of that."""
    pixels, whole = (batch, 1, side, side), channels + layers * GROWTH
    inside = layer_problems(batch, side, layers, channels)
    placed = Problem(PLACE, pixels, channels, channels, 0), Problem(COPY, pixels, whole, whole, 0)
    return [*placed[:1], *inside, *placed[1:], Problem(PLACE_BACKWARD, pixels, channels, channels, 0)]


def chosen_problems(batch: int, image: int) -> list[Problem]:
    """Of each block the first, the middle and the last 1x1 convolution, a 3x3 convolution, and its input's placing; and
    the transition after it."""
    chosen = []
    for layers, channels, scale in BLOCKS:
        problems = block_problems(batch, image // scale, layers, channels)
        pointwise = [p for p in problems if p.primitive == FORWARD and p.side == 1]
        kept = [problems[0], pointwise[0], pointwise[layers // 2], pointwise[-1], problems[2], problems[3]]
        kept += [p for p in problems if p.primitive == BACKWARD and p.side == 1 and p.C == pointwise[layers // 2].C]
        chosen += [*kept, problems[-1]]
        whole = channels + layers * GROWTH
        if scale < BLOCKS[-1][-1]:
            pixels = problems[0].pixels
            chosen += [Problem(primitive, pixels, whole, whole // 2, 1, pool=True) for primitive in (FORWARD, BACKWARD)]
    return chosen


def backends(run: Run, dtype: torch.dtype) -> dict[str, ModuleType]:
    return {name: b for name, b in BACKENDS.items() if b.unavailable(run.device, dtype) is None}


def call(problem: Problem, dtype: torch.dtype, device: torch.device) -> tuple[functools.partial, dict[str, Tensor]]:
    """``call(backend)`` runs the primitive; the tensors that it writes."""
    draw = functools.partial(torch.randn, device=device)
    c, k = problem.C, problem.K
    buffer, gradients = (draw(*problem.pixels, c + k).to(dtype) for _ in range(2))
    x, dx = buffer[..., :c], gradients[..., :c]
    if problem.pool:
        out, stored = (draw(*problem.out_pixels(), k).to(dtype) for _ in range(2))
    else:
        out, stored = buffer[..., c:], gradients[..., c:]
    norm = Norm(draw(c), draw(c).abs(), draw(c), draw(c), 1e-5)
    grad = Gradient(stored, out if problem.side else x, draw(k), draw(2, k))
    mean, var = torch.empty(2, k, device=device)
    if problem.primitive == PLACE:
        arguments, written = (x, out, mean, var), {"out": out, "mean": mean, "var": var}
    elif problem.primitive == PLACE_BACKWARD:
        arguments, written = (grad, dx), {"out": dx}
    else:
        weight = draw(k, c, 1, problem.side, problem.side) / (c * problem.side) ** 0.5
        if problem.primitive == FORWARD:
            arguments = (x, norm, weight, out, mean, var)
            written = {"out": out, "mean": mean, "var": var}
        else:
            dweight, owed = torch.empty_like(weight), Owed(*torch.empty(2, c, device=device), draw(2, c))
            arguments = (grad, x, norm, weight, dx, problem.accumulate, dweight, owed)
            written = {"dx": dx, "dweight": dweight, "dgamma": owed.dweight, "dbeta": owed.dbias}
            written["correction"] = owed.correction
    return functools.partial(_call, problem.primitive, arguments), written


def _call(primitive: str, arguments: tuple, backend: ModuleType) -> None:
    getattr(backend, primitive)(*arguments)


def largest_error(written: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of the relative errors (Euclidean norm)."""
    return max(float((t.double() - expected[n]).norm() / (expected[n].norm() + 1e-30)) for n, t in written.items())


def copies(moved: int, cache: int) -> int:
    """Of a problem's tensors, used in turn, so that each use finds a second-level cache full of the others."""
    return min(MOST_COPIES, 1 + math.ceil(2 * cache / moved))


def cache_bytes(run: Run) -> int:
    return 64 if run.smoke else torch.cuda.get_device_properties(run.device).L2_cache_size


def rates_of(run: Run) -> Rates:
    """Those of the report; measured where it has none."""
    for row in read_rows(run.rows):
        if row["kind"] == "rates":
            return Rates(row["copy"], row["products"])
    rates = measure_rates(run)
    run.add("rates", **rates._asdict())
    return rates


def measure_problem(problem: Problem, arithmetic: str, run: Run, seconds: float) -> None:
    """A row for each backend, as soon as it ran and again from all backends' interleaved rounds."""
    dtype, rates = ARITHMETICS[arithmetic], rates_of(run)
    moved, flops = problem.moved(torch.empty(0, dtype=dtype).element_size(), 4), problem.flops()
    floor = rates.floor(moved, flops, arithmetic)
    torch.manual_seed(0)  # errors of few values depend on what is drawn
    drawn = [call(problem, dtype, run.device) for _ in range(copies(moved, cache_bytes(run)))]
    run_on, written = drawn[0]
    before = {name: t.clone() for name, t in written.items()}
    calls = [run_on for run_on, _ in drawn] * (1 if run.smoke else math.ceil(CALLS / len(drawn)))
    about = {"primitive": str(problem), "arithmetic": arithmetic, "floor_microseconds": floor * 1e3}

    def result_of(backend: ModuleType) -> dict[str, Tensor]:
        for name, t in written.items():
            t.copy_(before[name])
        run_on(backend)
        return {name: t.double() for name, t in written.items()}

    def all_on(backend: ModuleType) -> None:
        for call_on in calls:
            call_on(backend)

    def add(name: str, ms: float) -> None:
        rate = {"gigabytes_per_second": moved / ms / 1e6, "teraflops": flops / ms / 1e9}
        predicted = gpu_predictions.of_primitive(str(problem), name, arithmetic)
        found = {"microseconds": ms * 1e3, "predicted_microseconds": predicted, "times_the_floor": ms / floor}
        run.add("primitive", **about, backend=name, **found, **rate, **seen[name])

    with tf32(False):
        expected = result_of(BACKENDS["eager"])
    works: dict[str, Work] = {}
    seen: dict[str, dict[str, float]] = {}
    for name, backend in backends(run, dtype).items():
        what = f"{problem}, {arithmetic}, {name}"
        if run.attempt(what, functools.partial(result_of, backend)) is None:
            continue
        seen[name] = {"error": largest_error(written, expected)}
        seen[name]["host_microseconds"] = host_microseconds(functools.partial(run_on, backend), run)
        work = run.attempt(what, lambda b=backend: graph_of(functools.partial(all_on, b), run))
        if work is not None:
            works[name] = work
            add(name, milliseconds(work, run.device) / len(calls))
    for name, times in interleaved(works, run, seconds).items():
        add(name, statistics.median(times) / len(calls))


def host_microseconds(work: Work, run: Run) -> float:
    """Of a call, by the host's clock, while the device is not waited for."""
    times = []
    for _ in range(1 if run.smoke else 20):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


class Block:
    """A dense block of DenseNet-121 with its input, and its training step."""

    def __init__(self, layers: int, channels: int, batch: int, side: int, dtype: torch.dtype, run: Run) -> None:
        self.layers = layers
        self.block = FusedDenseBlock(layers, channels, 4, GROWTH).to(run.device)
        shape = (batch, channels, side, side)
        self.x = empty_channels_last(shape, channels, torch.empty(0, dtype=dtype, device=run.device))
        self.x.normal_().requires_grad_()
        whole = (batch, channels + layers * GROWTH, side, side)
        self.dout = torch.randn(whole, device=run.device).to(dtype, memory_format=torch.channels_last)

    def step(self, backend: str) -> None:
        # Autocast, so that the data is bfloat16 and the parameters are float32.
        with use_backend(backend), torch.autocast(self.x.device.type, torch.bfloat16, cache_enabled=False):
            out = self.block(self.x)
        torch.autograd.grad(out, [self.x, *self.block.parameters()], self.dout)


def dense_blocks(batch: int, image: int, run: Run) -> list[Block]:
    shapes = [(1, 16, 3)] if run.smoke else [(layers, channels, image // scale) for layers, channels, scale in BLOCKS]
    return [Block(layers, channels, batch, side, torch.bfloat16, run) for layers, channels, side in shapes]


def measure_blocks(batch: int, image: int, run: Run) -> None:
    """Training steps of the four dense blocks alone, in a CUDA graph, in bfloat16 with float32 parameters."""
    rates, steps = rates_of(run), dense_blocks(batch, image, run)
    problems = [p for block in steps for p in block_problems(batch, block.x.shape[-1], block.layers, block.x.shape[1])]
    floor = sum(rates.floor(p.moved(2, 4), p.flops(), "bfloat16") for p in problems)
    about = {"batch": batch, "floor_milliseconds": floor, "bytes": sum(p.moved(2, 4) for p in problems)}

    def add(name: str, ms: float) -> None:
        found = {"milliseconds": ms, "predicted_milliseconds": gpu_predictions.of_blocks("densenet121", batch, name)}
        run.add("blocks", backend=name, **about, **found, times_the_floor=ms / floor)

    works: dict[str, Work] = {}
    for name in backends(run, torch.bfloat16):
        work = run.attempt(
            f"dense blocks, {name}", lambda n=name: graph_of(lambda: [block.step(n) for block in steps], run)
        )
        if work is not None:
            works[name] = work
            add(name, milliseconds(work, run.device))
    for name, times in interleaved(works, run, 2.0).items():
        add(name, statistics.median(times))


def sizes(run: Run) -> tuple[int, int]:
    """Batch and side of the image."""
    return (1, 32) if run.smoke else (64, 224)


def measured_problems(run: Run) -> list[Problem]:
    problems = chosen_problems(*sizes(run))
    if run.smoke:
        problems = [p._replace(pixels=(1, 1, 4, 4), C=16, K=16) for p in (*problems[:2], *problems[5:10])]
    return problems


def items(run: Run) -> list[Item]:
    found = [
        Item("rates of the device", lambda: rates_of(run)),
        Item("dense blocks", lambda: measure_blocks(*sizes(run), run)),
    ]
    for arithmetic in ARITHMETICS:
        for problem in measured_problems(run):
            measure = functools.partial(measure_problem, problem, arithmetic, run, 0.1)
            found.append(Item(f"{problem}, {arithmetic}", measure, 30.0))
    return found
