"""One thread, since the tensors are tiny; every kind of host."""

import pytest
import torch

from .hosts import HOSTS


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=HOSTS, ids=str)
def host(request):
    return HOSTS[request.param]
