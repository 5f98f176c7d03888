"""What tests of small tensors begin with; import `one_seed`, and every test of the file has it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_seed():
    """One seed, and one thread: tensors are small and test processes share the cores."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
