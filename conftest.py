"""Options that tests and benchmarks share: on which device they run, and through which backend."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where tests of layer, operators and kernels, and benchmarks, put their tensors (default cpu)",
    )
    parser.addoption(
        "--backend",
        choices=("reference", "triton", "cuda"),
        help="tests: what serves operators that were not asked for another; benchmarks: measure this one alone",
    )
    parser.addoption(
        "--tiles",
        choices=("small", "shipped"),
        default="small",
        help="tests/kernels: blocks small enough for Triton's interpreter, or those that ship (default small)",
    )


def pytest_configure(config):
    # Before any test module is imported: tensors that modules hold are moved too.
    if config.getoption("--device") == "cuda" and torch.cuda.is_available():
        torch.set_default_device("cuda")
        for name in ("rand", "randn", "randint", "randperm"):
            setattr(torch, name, _drawn_where_its_generator_is(getattr(torch, name)))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="--device cuda: torch finds no CUDA device"))


def _drawn_where_its_generator_is(draw):
    """``draw`` with a generator of the CPU gives the same numbers, moved to the default device."""

    def moved(*args, generator=None, device=None, requires_grad=False, **kwargs):
        # torch knows its own functions by what the module holds when it first looks, so each is told its device.
        device = torch.get_default_device() if device is None else device
        if generator is None or generator.device.type == torch.device(device).type:
            return draw(*args, generator=generator, device=device, requires_grad=requires_grad, **kwargs)
        drawn = draw(*args, generator=generator, device=generator.device, **kwargs)
        return drawn.to(device).requires_grad_(requires_grad)

    return moved
