"""How the root conftest shares a machine among the workers of a test run."""

import importlib.util
import os
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sharing():
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("cores", "gigabytes", "workers"),
    [(8, 32, 2), (2, 16, 2), (1, 16, 1), (8, 7.9, 1), (8, 2, 1)],
)
def test_workers_fit_cores_and_memory(sharing, monkeypatch, cores, gigabytes, workers):
    memory = types.SimpleNamespace(available=gigabytes * 1e9)
    monkeypatch.setattr(sharing.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(sharing, "_cores", lambda: cores)
    assert sharing.pytest_xdist_auto_num_workers(None) == workers


@pytest.mark.parametrize(("cores", "threads"), [(1, "1"), (2, "1"), (8, "4")])
def test_workers_share_the_cores(sharing, monkeypatch, cores, threads):
    monkeypatch.setattr(sharing, "_cores", lambda: cores)
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "7")
    sharing.pytest_configure(None)
    assert os.environ["OMP_NUM_THREADS"] == threads
    assert os.environ["NUMBA_NUM_THREADS"] == "7", "what the user set stays"


def test_alone_nothing_is_set(sharing, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sharing.pytest_configure(None)
    assert "OMP_NUM_THREADS" not in os.environ
