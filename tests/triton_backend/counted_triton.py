"""What a step of DenseNet-121 launches with Triton's kernels on a GPU like an H100."""

from collections import Counter
from unittest import mock

import launch_counts

from fused_densenet.backends.triton import launch, plans, tuning


def count(kind: str) -> dict[str, int]:
    """``kind`` is one of :data:`launch_counts.KINDS`."""
    counts: Counter[str] = Counter()
    plans.forget()
    with (
        mock.patch.object(launch, "execute", lambda it, tensors: counts.update([it.function.__name__])),
        mock.patch.object(tuning, "family", return_value="sm_90"),
        mock.patch.object(tuning, "multiprocessors", return_value=132),
    ):
        launch_counts.count("triton", kind == "training", counts)
    plans.forget()
    return launch_counts.table(counts)
