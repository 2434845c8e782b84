import contextlib
import warnings

import numpy as np
import pytest
import torch

# The tensors of the tests are small: on a busy machine threads that wait for each other cost a hundredfold.
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


def modes():
    """What a test might leave behind for those after it."""
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "reads of the GPU": torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else 0,
    }


def set_sync_debug_mode(mode):
    """Without torch's warning that this is a prototype, which, as an error, would leave the mode on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture(autouse=True)
def modes_stay():
    """Fails a test that leaves a mode behind, and puts it back for the others."""
    before = modes()
    yield
    after = modes()
    if after == before:
        return
    torch.set_grad_enabled(before["grad"])
    torch.set_default_dtype(before["dtype"])
    torch.use_deterministic_algorithms(before["deterministic"])
    torch.autograd.set_detect_anomaly(before["anomaly"])
    torch.set_num_threads(before["threads"])
    if torch.cuda.is_initialized():
        set_sync_debug_mode(before["reads of the GPU"])
    pytest.fail(f"left behind: {after}, before: {before}")


@pytest.fixture
def gpu_unread():
    """A context in which reading a value of the GPU is an error."""

    @contextlib.contextmanager
    def context():
        set_sync_debug_mode("error")
        try:
            yield
        finally:
            set_sync_debug_mode("default")

    return context
