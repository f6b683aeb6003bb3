"""How kernels get the shared memory that they need: leave for all of it, once for each kernel and device."""

import ctypes
import shutil
from pathlib import Path

import pytest
import small
from cases import ONE, Case
from emulated import Host, default_library, load
from ptx_launch import Notes

LARGER, SMALLER = Case((1, 1, 1, 64), 128, 128, ONE), Case((1, 1, 1, 64), 128, 64, ONE)  # of one kernel


@pytest.fixture
def library(tmp_path: Path) -> ctypes.CDLL:
    """The kernels, none of which has been launched."""
    return load(Path(shutil.copy(default_library()._name, tmp_path / "kernels.so")))


def test_another_thread_launches_in_between(library: ctypes.CDLL) -> None:
    """The same kernel with less shared memory, after the first thread's preparations and before its launch."""
    notes = Notes(library)

    @ctypes.CFUNCTYPE(None)
    def other() -> None:
        small.backward(SMALLER, "bfloat16", Host(library), 1)  # whose launches are noted, too

    library.cuda_host_meanwhile(other)
    small.backward(LARGER, "bfloat16", notes, 1)
    first, second = (launch for launch in notes.launches if launch.shared > 48 << 10)
    assert first.kernel == second.kernel and first.shared < second.shared


def test_once_for_each_kernel_and_device(library: ctypes.CDLL) -> None:
    host = Host(library)
    for device in (0, 1):
        library.cuda_host_device(device)
        for expected, case in [(1, SMALLER), (0, LARGER), (0, SMALLER)]:
            small.backward(case, "bfloat16", Notes(library), 1)
            assert host.statistics()["attributes"] == expected, (device, case)
