"""What several test files share."""

import joblib
import pytest
import torch


@pytest.fixture
def in_process():
    """Folds one after the other in this process, which sees what a test puts in place."""
    with joblib.parallel_config(backend="sequential"):
        yield


@pytest.fixture
def one_cpu_thread(monkeypatch):
    """Volumes as small as these only wait for a second thread, where others use the cores."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes of cross_validate
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
