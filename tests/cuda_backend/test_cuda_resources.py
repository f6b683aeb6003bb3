"""nvcc's machine code: no spill, and for sm_80, sm_90a and sm_100 the registers and occupancy of ``resources.json``."""

import json

import nvcc
import pytest
import report
import resources
import small
from building import HERE, kernels
from resources import Layer, Need


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    nvcc.all_ptx(kernels())


architectures = pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)


@pytest.mark.parametrize("architecture", [*nvcc.ARCHITECTURES, *resources.SMALL_DEVICES])
def test_nothing_spills(architecture: str) -> None:
    """But in TF32 on sm_75, which has none: these kernels are never launched there."""
    spilled = [nvcc.readable(name) for name, used in resources.compiled(architecture).items() if used.spills]
    assert all(architecture == "75" and "(Arithmetic)2" in name for name in spilled), spilled


@pytest.mark.parametrize("architecture", resources.SMALL_DEVICES)
def test_every_layer_fits_small_devices(architecture: str) -> None:
    """In every arithmetic, forward and backward; and layers of many channels with the largest kernels."""
    device = resources.SMALL_DEVICES[architecture]
    large = [Layer((2, 16, 16, 16), 1100, 48, kernel) for kernel in small.LARGEST]
    shared = [launch.shared for launch in resources.every_launch(device, [*resources.LAYERS, *large])]
    assert 48 << 10 < max(shared) <= device.shared_per_block


@architectures
def test_occupancy(architecture: str) -> None:
    found = resources.needs(architecture)
    report.sections["CUDA kernels: registers, bytes of shared memory, threads, blocks on a multiprocessor"] += [
        f"sm_{architecture:4} {name:60} {need.registers:3} {need.shared:6} {need.threads:4} {need.blocks:2}"
        for name, need in found.items()
    ]
    expected = {name: Need(*need) for name, need in json.loads(resources.EXPECTED.read_text())[architecture].items()}
    update = f"PYTHONPATH=tests python {resources.__file__} writes what is found"
    assert found.keys() == expected.keys(), update
    for name, need in found.items():
        wanted = expected[name]
        assert need.threads == wanted.threads, f"{name}: {update}"
        assert need.blocks >= max(wanted.blocks, 1), f"{name}: {need}, expected {wanted}; {update}"
        assert need.registers <= wanted.registers and need.shared <= wanted.shared, (
            f"{name}: {need}, {wanted}; {update}"
        )


def test_a_kernel_that_spills_is_found() -> None:
    path = nvcc.ptx(HERE / "examples" / "spill.cu", "80")
    (used,) = nvcc.resources(path, "80").values()
    assert used.spills > 0 and used.stack > 0


def test_occupancy_of_known_kernels() -> None:
    """By the CUDA occupancy calculator: limits by registers, by shared memory, by threads."""
    used = nvcc.Resources(128, 0, 0, 0)
    assert nvcc.blocks_per_multiprocessor(used, 256, 0, "90a") == 2
    assert nvcc.blocks_per_multiprocessor(used._replace(registers=32), 256, 100 << 10, "90a") == 2
    assert nvcc.blocks_per_multiprocessor(used._replace(registers=32), 256, 100 << 10, "80") == 1
    assert nvcc.blocks_per_multiprocessor(used._replace(registers=32), 512, 0, "80") == 4
    assert nvcc.blocks_per_multiprocessor(used._replace(registers=32), 32, 0, "80") == 32
