"""What several test files share."""

import pytest
import torch


@pytest.fixture
def one_cpu_thread(monkeypatch):
    """Volumes as small as these only wait for a second thread, where others use the cores."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes of cross_validate
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
