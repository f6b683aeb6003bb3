"""Steps of whole networks: the dense blocks on each backend beside torchvision's own code, interleaved.

Where torchvision is not installed its part is taken by fused_densenet.reference, DenseNet written operator by operator,
and that of ``fuse(torchvision's)`` by fused_densenet.DenseNet; the report says so.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from allocator import step_memory
from baselines import NETWORKS, checkpointed, torchvision_densenets
from gpu_phase import Item
from gpu_primitives import backends
from gpu_run import Run, read_rows
from gpu_text import COMPILED, EAGER
from gpu_timing import Work, graph_of, interleaved, milliseconds
from torch import Tensor, nn

from fused_densenet import DenseNet, fuse, reference, use_backend


class Case(NamedTuple):
    """``precision`` is "bfloat16" (autocast) or "float32" (TF32 where the device has it).

    A ``compiled`` case sets torch.compile beside the others, which takes a minute or more.
    """

    network: str
    mode: str
    precision: str
    batch: int
    compiled: bool = False

    def __str__(self) -> str:
        compiled = ", torch.compile" if self.compiled else ""
        return f"{self.network}, {self.mode}, {self.precision}, batch {self.batch}{compiled}"


CASES = [
    Case("densenet121", "training", "bfloat16", 64),
    Case("densenet121", "inference", "bfloat16", 64),
    Case("densenet121", "training", "bfloat16", 64, compiled=True),
    Case("densenet121", "training", "bfloat16", 256),
    Case("densenet169", "training", "bfloat16", 64),
    Case("densenet201", "training", "bfloat16", 64),
    Case("densenet121", "training", "float32", 64),
    Case("densenet121", "training", "bfloat16", 8),
    Case("densenet121", "inference", "bfloat16", 8),
    Case("densenet121", "inference", "bfloat16", 64, compiled=True),
    Case("densenet169", "inference", "bfloat16", 64),
    Case("densenet201", "inference", "bfloat16", 64),
    Case("densenet121", "training", "bfloat16", 128),
    Case("densenet121", "training", "bfloat16", 32),
    Case("densenet201", "training", "bfloat16", 256),
    Case("densenet121", "inference", "bfloat16", 256),
    Case("densenet121", "training", "bfloat16", 16),
    Case("densenet169", "training", "bfloat16", 256),
]
"""The most important first; the end is what a deadline drops."""
COMPILING = 90
"""Seconds without which no case with torch.compile is begun."""

SMOKE = [Case("tiny", "training", "bfloat16", 2), Case("tiny", "inference", "float32", 2, compiled=True)]
TINY = {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 8, "num_classes": 10}


class Variant(NamedTuple):
    """``backend`` is None for torchvision's own blocks."""

    backend: str | None = None
    channels_last: bool = True
    memory_efficient: bool = False
    compiled: bool = False
    graph: bool = False


def variants(case: Case, run: Run) -> dict[str, Variant]:
    """Those that a graph was captured of come last, since they keep their memory."""
    ours = backends(run, torch.float32 if case.precision == "float32" else torch.bfloat16)
    if case.compiled:
        fused = {f"fused {name}, torch.compile": Variant(name, compiled=True) for name in ours}
        return {EAGER: Variant(), COMPILED: Variant(compiled=True), **fused}
    found = {EAGER: Variant(), "eager, NCHW": Variant(channels_last=False)}
    found |= {f"fused {name}": Variant(name) for name in ours}
    if case.mode == "training":
        found["memory_efficient"] = Variant(memory_efficient=True)
        found |= {f"fused {name}, memory_efficient": Variant(name, memory_efficient=True) for name in ours}
    found[f"{EAGER}, CUDA graph"] = Variant(graph=True)
    return found | {f"fused {name}, CUDA graph": Variant(name, graph=True) for name in ours}


def peer_name() -> str:
    try:
        torchvision_densenets()
    except SystemExit:
        return "reference (torchvision is not installed)"
    return "torchvision"


def build(network: str, memory_efficient: bool = False) -> nn.Module:
    if peer_name() == "torchvision":
        module = torchvision_densenets()
        make = module.DenseNet if network == "tiny" else getattr(module, network)
        return make(memory_efficient=memory_efficient, **(TINY if network == "tiny" else {}))
    plain = reference.DenseNet(**arguments(network))
    return checkpointed(plain) if memory_efficient else plain


def fused(network: str, memory_efficient: bool) -> nn.Module:
    """What ``build`` makes, fused."""
    if peer_name() == "torchvision":
        return fuse(build(network), memory_efficient=memory_efficient, strict=True)
    return DenseNet(memory_efficient=memory_efficient, **arguments(network))


def arguments(network: str) -> dict[str, Any]:
    return TINY if network == "tiny" else NETWORKS[network]._asdict()


class Subject:
    """A model in one variant with its input; ``step()`` is what is timed."""

    def __init__(self, case: Case, variant: Variant, plain: nn.Module, x: Tensor, run: Run) -> None:
        self.case, self.variant = case, variant
        make = build if variant.backend is None else fused
        model = make(case.network, variant.memory_efficient)
        model.load_state_dict(plain.state_dict())
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.model = model.to(run.device, memory_format=layout).train(case.mode == "training")
        self.x = x.contiguous(memory_format=layout)
        self.labels = torch.arange(case.batch, device=run.device) % 10
        self.forward: Callable[[Tensor], Tensor] = self.model
        if variant.compiled:
            self.forward = torch.compile(self.model, backend="aot_eager" if run.smoke else "inductor", dynamic=False)
        # A cast that is kept from one step to the next would not be captured in a graph.
        self.autocast = functools.partial(
            torch.autocast,
            run.device.type,
            torch.bfloat16,
            enabled=case.precision == "bfloat16",
            cache_enabled=not variant.graph,
        )

    def logits(self) -> Tensor:
        with self.autocast(), use_backend(self.variant.backend or "auto"):
            return self.forward(self.x)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.logits().float(), self.labels)

    def release(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self) -> None:
        if self.case.mode == "training":
            self.release()
            self.loss().backward()
        else:
            with torch.no_grad():
                self.logits()

    def peak_bytes(self, run: Run) -> int | None:
        """Of a step, above what is allocated between steps; the gradients count. None where a graph holds it.

        The interpreter of Triton keeps what it was given, so that a CPU's events do not add up.
        """
        if self.variant.graph or (run.smoke and self.variant.backend == "triton"):
            return None
        if self.case.mode == "training":
            return step_memory(self.loss, self.release, run.device).peak_bytes
        if run.device.type == "cpu":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        return torch.cuda.max_memory_allocated() - before


def model_and_input(case: Case, run: Run) -> tuple[nn.Module, Tensor]:
    image = 16 if run.smoke else 224
    torch.manual_seed(0)
    return build(case.network).to(run.device), torch.randn(case.batch, 3, image, image, device=run.device)


def measure_case(case: Case, run: Run, seconds: float) -> None:
    """A row for each variant, as soon as it ran and again from all variants' interleaved rounds.

    Graphs are captured when all else is measured: where one has no memory left, the rest is not lost.
    """
    plain, x = model_and_input(case, run)
    every = variants(case, run)
    for graphs in (False, True):
        chosen = {name: variant for name, variant in every.items() if variant.graph == graphs}
        measure_variants(case, chosen, plain, x, run, seconds * len(chosen) / len(every))


def measure_variants(
    case: Case, chosen: dict[str, Variant], plain: nn.Module, x: Tensor, run: Run, seconds: float
) -> None:
    works: dict[str, Work] = {}
    peaks: dict[str, int | None] = {}

    def add(name: str, samples: list[float]) -> None:
        ms = statistics.median(samples)
        row = {**case._asdict(), "variant": name, "milliseconds": ms, "samples": len(samples)}
        run.add("network", **row, images_per_second=case.batch / ms * 1e3, peak_bytes=peaks[name])

    for name, variant in chosen.items():
        what = f"{case}, {name}"
        work = run.attempt(what, lambda n=name, v=variant: prepare(case, v, plain, x, run, peaks, n))
        first = None if work is None else run.attempt(what, lambda w=work: milliseconds(w, run.device))
        if first is not None:
            works[name] = work
            add(name, [first])
    times = run.attempt(f"{case}, timing", lambda: interleaved(works, run, seconds))
    for name, samples in (times or {}).items():
        add(name, samples)


def prepare(
    case: Case, variant: Variant, plain: nn.Module, x: Tensor, run: Run, peaks: dict[str, int | None], name: str
) -> Work:
    """Warms up, takes the peak, captures the graph."""
    subject = Subject(case, variant, plain, x, run)
    for _ in range(1 if run.smoke else 3):
        subject.step()
    peaks[name] = subject.peak_bytes(run)
    return graph_of(subject.step, run) if variant.graph else subject.step


def measure_errors(run: Run) -> None:
    """Relative errors (Euclidean norm) of the gradients of DenseNet-121, batch 2, against float64."""
    run.add("peer", name=peer_name())
    case = SMOKE[0] if run.smoke else CASES[0]._replace(batch=2)
    plain, x = model_and_input(case, run)
    double = Subject(case._replace(precision="float64"), Variant(), plain, x.double(), run)
    double.model.double()
    exact = gradients(double)
    for precision in ("float32", "bfloat16"):
        current = case._replace(precision=precision)
        for name, variant in variants(current, run).items():
            if variant.graph or variant.memory_efficient or variant.compiled or not variant.channels_last:
                continue
            subject = run.attempt(f"errors, {name}", lambda v=variant, c=current: Subject(c, v, plain, x, run))
            found = run.attempt(f"errors, {name}", functools.partial(gradients, subject))
            if found is not None:
                error = float((found - exact).norm() / exact.norm())
                run.add("error", network=case.network, precision=precision, variant=name, gradient_error=error)


def gradients(subject: Subject) -> Tensor:
    subject.step()
    found = [p.grad.flatten().double() for p in subject.model.parameters() if p.grad is not None]
    subject.release()
    return torch.cat(found)


def items(run: Run) -> list[Item]:
    """Each case needs the time that the longest before it took; one with torch.compile more."""
    torch.backends.cudnn.benchmark = True  # for torchvision's convolutions; the fused ones are not cuDNN's
    cases = SMOKE if run.smoke else CASES
    plain = {str(case) for case in cases if not case.compiled}
    ended = [row for row in read_rows(run.rows) if row["kind"] == "ended" and row["phase"] == "networks"]
    needed = 1.2 * max((row["seconds"] for row in ended if row["what"] in plain), default=2.0)
    found = [Item("errors", lambda: measure_errors(run))]
    for case in cases:
        need = COMPILING if case.compiled and not run.smoke else needed
        found.append(Item(str(case), functools.partial(measure_case, case, run, 4.0), 2.0 * COMPILING, need))
    return found
