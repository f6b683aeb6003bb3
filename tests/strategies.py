"""What hypothesis draws, and how many examples of it: ``HYPOTHESIS_PROFILE`` is quick, default or thorough."""

import os

import hypothesis
from hypothesis import strategies as st
from primitives import Shape

for _profile, _examples in {"quick": 8, "default": 25, "thorough": 1000}.items():
    hypothesis.settings.register_profile(
        _profile, max_examples=_examples, deadline=None, derandomize=True, database=None, print_blob=True
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    dims = draw(st.integers(1, 3))
    longest = (40, 11, 5)[dims - 1]
    sizes = [draw(st.integers(1, longest)) if i >= 3 - dims else 1 for i in range(3)]
    kernel = [draw(st.sampled_from([1, 3])) if i >= 3 - dims else 1 for i in range(3)]
    if draw(st.booleans()):
        kernel = [max(kernel) if i >= 3 - dims else 1 for i in range(3)]
    channels = draw(st.one_of(st.integers(1, 70), st.sampled_from([8, 16, 64, 128])))
    out_channels = draw(st.one_of(st.integers(1, 50), st.sampled_from([12, 32, 48, 128])))
    pool = draw(st.booleans())
    if pool:
        kernel = [1, 1, 1]
    return Shape((draw(st.integers(1, 3)), *sizes), channels, out_channels, tuple(kernel), pool)


margins = st.sampled_from([0, 0, 1, 3, 8])
"""Channels beside a slice."""
