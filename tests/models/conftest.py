"""One thread for the tests of models, some of which compare results bit by bit."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Several threads divide a product by its size, so that rounding depends on the batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
