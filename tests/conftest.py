"""What several test files share."""

import joblib
import numpy as np
import pytest
import torch

NO_RESULT = {".lock", "run.json", "rejected.csv"}
"""What a run leaves in its folder beside its results."""


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


@pytest.fixture(scope="module")
def planted():
    """Sixty volumes of 22 a side: men are brighter in one box, and nowhere else."""
    rng = np.random.default_rng(3)
    sex = np.arange(60) % 2
    volumes = rng.uniform(0.2, 0.4, (60, 22, 22, 22)).astype(np.float32)
    box = np.zeros((22, 22, 22), bool)
    box[6:14, 8:16, 7:15] = True
    volumes[:, box] += 0.3 * sex[:, None]
    return volumes, sex, box, np.arange(60) >= 36
