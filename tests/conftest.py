"""What several test files share."""

from collections.abc import Iterator

import joblib
import numpy as np
import pytest
import torch

from brainsex import networks

NO_RESULT = {".lock", "run.json", "rejected.csv"}
"""What a run leaves in its folder beside its results."""


@pytest.fixture
def in_process() -> Iterator[None]:
    """Train folds one after the other in this process, which sees what a test puts in place."""
    with joblib.parallel_config(backend="sequential"):
        yield


@pytest.fixture
def one_cpu_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread and no GPU: small volumes only wait for a second thread."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes of cross_validate
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Run a test in both precisions, whichever of them this processor would choose."""
    monkeypatch.setattr(networks, "fast_precision", lambda device: request.param)
    return request.param


@pytest.fixture(scope="module")
def planted() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Make sixty volumes of 22 a side: men are brighter in one box, and nowhere else.

    Volumes (60, 22, 22, 22), sex (60,), the box (22, 22, 22) and who is held out (60,).
    """
    rng = np.random.default_rng(3)
    sex = np.arange(60) % 2
    volumes = rng.uniform(0.2, 0.4, (60, 22, 22, 22)).astype(np.float32)
    box = np.zeros((22, 22, 22), bool)
    box[6:14, 8:16, 7:15] = True
    volumes[:, box] += 0.3 * sex[:, None]
    return volumes, sex, box, np.arange(60) >= 36
