"""Steps of whole networks: the dense blocks on each backend beside torchvision's own code, interleaved.

Where torchvision is not installed its part is taken by fused_densenet.reference, DenseNet written operator by operator.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from allocator import step_memory
from common import in_layout
from gpu_primitives import backends
from gpu_run import Run
from gpu_timing import Work, graph_of, interleaved
from peers import torchvision_densenets
from torch import Tensor, nn

from fused_densenet import fuse, reference, use_backend


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


EAGER, COMPILED = "eager, channels-last", "torch.compile, channels-last"


def variants(case: Case, run: Run) -> dict[str, Variant]:
    ours = backends(run, torch.float32 if case.precision == "float32" else torch.bfloat16)
    found = {EAGER: Variant()}
    if case.compiled:
        found[COMPILED] = Variant(compiled=True)
        found |= {f"fused {name}, torch.compile": Variant(name, compiled=True) for name in ours}
        return found
    training = case.mode == "training"
    found |= {"eager, NCHW": Variant(channels_last=False), f"{EAGER}, CUDA graph": Variant(graph=True)}
    if training:
        found["memory_efficient"] = Variant(memory_efficient=True)
    for name in ours:
        found[f"fused {name}"] = Variant(name)
        if training:
            found[f"fused {name}, memory_efficient"] = Variant(name, memory_efficient=True)
        found[f"fused {name}, CUDA graph"] = Variant(name, graph=True)
    return dict(sorted(found.items(), key=lambda item: item[1].graph))  # graphs keep their memory: last


def peer_name() -> str:
    try:
        torchvision_densenets()
    except SystemExit:
        return "reference (torchvision is not installed)"
    return "torchvision"


def build(network: str, memory_efficient: bool = False) -> nn.Module:
    arguments: dict[str, Any] = TINY if network == "tiny" else {}
    if peer_name() == "torchvision":
        module = torchvision_densenets()
        make = module.DenseNet if network == "tiny" else getattr(module, network)
        return make(memory_efficient=memory_efficient, **arguments)
    from memory import NETWORKS, checkpointed

    plain = reference.DenseNet(**(arguments or NETWORKS[network]._asdict()))
    return checkpointed(plain) if memory_efficient else plain


class Subject:
    """A model in one variant with its input; ``step()`` is what is timed."""

    def __init__(self, case: Case, variant: Variant, plain: nn.Module, x: Tensor, run: Run) -> None:
        self.case, self.variant = case, variant
        model = build(case.network, variant.backend is None and variant.memory_efficient)
        model.load_state_dict(plain.state_dict())
        if variant.backend is not None:
            fuse(model, memory_efficient=variant.memory_efficient, strict=True)
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.model = in_layout(model.to(run.device), layout).train(case.mode == "training")
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
    plain, x = model_and_input(case, run)
    works: dict[str, Work] = {}
    peaks: dict[str, int | None] = {}
    for name, variant in variants(case, run).items():
        work = run.attempt(f"{case}, {name}", lambda n=name, v=variant: prepare(case, v, plain, x, run, peaks, n))
        if work is not None:
            works[name] = work
    times = run.attempt(f"{case}, timing", lambda: interleaved(works, run, seconds))
    if times is None:
        works = {name: work for name, work in works.items() if "CUDA graph" not in name}
        times = run.attempt(f"{case}, timing without graphs", lambda: interleaved(works, run, seconds))
    for name, samples in (times or {}).items():
        row = {**case._asdict(), "variant": name, "milliseconds": statistics.median(samples), "samples": len(samples)}
        run.add("network", **row, images_per_second=case.batch / row["milliseconds"] * 1e3, peak_bytes=peaks[name])


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


def phase(run: Run) -> None:
    torch.backends.cudnn.benchmark = True  # for torchvision's convolutions; the fused ones are not cuDNN's
    run.add("peer", name=peer_name())
    run.attempt("errors", lambda: measure_errors(run))
    cases = SMOKE if run.smoke else CASES
    longest = 2.0
    for i, case in enumerate(cases):
        if run.left() < 1.2 * longest:
            run.add("dropped", what="networks: " + "; ".join(map(str, cases[i:])))
            break
        before = run.left()
        if case.compiled and before < COMPILING and not run.smoke:
            run.add("dropped", what=f"networks: {case}")
            continue
        run.attempt(str(case), lambda c=case: measure_case(c, run, 4.0))
        if not case.compiled:
            longest = max(longest, before - run.left())
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def warm(run: Run) -> None:
    """Compiles torchvision's networks, so that their code is in torch's cache when they are measured."""
    for case in (case for case in (SMOKE if run.smoke else CASES) if case.compiled):
        plain, x = model_and_input(case, run)
        run.attempt(
            f"compiling {case}",
            lambda c=case, p=plain, x=x: Subject(c, Variant(compiled=True), p, x, run).step(),
        )
