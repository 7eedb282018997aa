"""The worked JupyterHub configuration: executed without a hub, and held to what the book needs."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from traitlets.config import Config

from labkit import downloads
from labkit.authoring.doctor import MEMORY_OF_A_CHAPTER

SOURCE = Path(__file__).parent.parent / "classroom" / "jupyterhub_config.py"
SERVER_NBYTES = 200_000_000  # one learner's JupyterLab server without a kernel, as TEACHING.md says
# What can be set from outside, and where it must arrive.
OUTSIDE = {
    "CLASS_ENV": ("/srv/env", lambda c: c.Spawner.cmd[0], "/srv/env/bin/jupyterhub-singleuser"),
    "LABKIT_CACHE": ("/mnt/c", lambda c: c.Spawner.environment["LABKIT_CACHE"], "/mnt/c"),
    "CLASS_MEMORY": ("6G", lambda c: {c.Spawner.mem_limit, c.Spawner.mem_guarantee}, {"6G"}),
    "CLASS_IDLE_SECONDS": ("77", lambda c: str(c.Spawner.args).count("timeout=77'"), 2),
    "CLASS_AUTHENTICATOR": ("native", lambda c: c.JupyterHub.authenticator_class, "native"),
    "CLASS_GROUP": ("ml101", lambda c: c.LocalAuthenticator.allowed_groups, {"ml101"}),
    "CLASS_SPAWNER": ("systemd", lambda c: c.JupyterHub.spawner_class, "systemd"),
    "CLASS_ADDRESS": ("http://:8", lambda c: c.JupyterHub.bind_url, "http://:8"),
}


@pytest.fixture
def configure(monkeypatch) -> Callable[..., Config]:
    """A function that executes the configuration, with exactly these variables set."""
    for name in (*OUTSIDE, "CLASS_LEARNERS"):
        monkeypatch.delenv(name, raising=False)

    def execute(**variables: str) -> Config:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        config = Config()
        code = compile(SOURCE.read_text(encoding="utf8"), SOURCE, "exec")
        exec(code, {"get_config": lambda: config})
        return config

    return execute


def nbytes(size: str) -> float:
    return float(size[:-1]) * 1024 ** (1 + "KMGT".index(size[-1]))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_variable_from_outside_arrives(configure, name):
    value, place, expected = OUTSIDE[name]
    assert place(configure()) != expected
    assert place(configure(**{name: value})) == expected


def test_servers_run_in_the_class_environment_and_open_jupyterlab(configure):
    spawner = configure().Spawner
    (program,) = spawner.cmd
    assert Path(program).is_absolute()
    assert Path(program).parts[-2:] == ("bin", "jupyterhub-singleuser")
    assert spawner.default_url == "/lab"


def test_learners_find_one_cache_outside_every_home(configure, monkeypatch):
    given = configure().Spawner.environment
    # The learner's process has the variables that the hub passes on: labkit must heed them.
    monkeypatch.setenv("LABKIT_CACHE", given["LABKIT_CACHE"])
    folder = downloads.cache_folder()
    assert str(folder) == given["LABKIT_CACHE"]
    assert folder.is_absolute()
    assert not {Path.home(), Path.home().parent} & {folder, *folder.parents[:-1]}


def test_a_chapter_and_its_server_fit_into_the_memory_limit(configure):
    spawner = configure().Spawner
    assert nbytes(spawner.mem_limit) >= MEMORY_OF_A_CHAPTER + SERVER_NBYTES
    assert MEMORY_OF_A_CHAPTER <= nbytes(spawner.mem_guarantee) <= nbytes(spawner.mem_limit)


@pytest.mark.parametrize(
    ("cores", "learners", "threads"), [(2, 3, 1), (16, 4, 4), (16, 5, 3), (None, 1, 1)]
)
def test_learners_share_the_cores(configure, monkeypatch, cores, learners, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    given = configure(CLASS_LEARNERS=str(learners)).Spawner.environment
    assert given["OMP_NUM_THREADS"] == given["NUMBA_NUM_THREADS"] == str(threads)


def test_only_a_group_may_enter_and_no_password_is_on_file(configure):
    config = configure()
    assert config.JupyterHub.authenticator_class == "pam"
    assert config.LocalAuthenticator.allowed_groups
    assert not {"Authenticator", "DummyAuthenticator", "PAMAuthenticator"} & set(config)
    names = [name.lower() for section in config.values() for name in section]
    assert not [name for name in names if "password" in name or "token" in name]


def test_the_hub_listens_on_loopback_unless_told_otherwise(configure):
    assert configure().JupyterHub.bind_url.startswith("http://127.0.0.1:")


def test_idle_kernels_are_ended_after_a_break_not_during_one(configure):
    arguments = dict(a.removeprefix("--").split("=") for a in configure().Spawner.args)
    kernels = int(arguments["MappingKernelManager.cull_idle_timeout"])
    servers = int(arguments["ServerApp.shutdown_no_activity_timeout"])
    assert 1800 <= kernels <= 4 * 3600  # zero would mean: never
    assert servers >= kernels
    assert arguments["MappingKernelManager.cull_connected"] == "True"


def test_no_path_of_the_machine_it_was_written_on():
    text = SOURCE.read_text(encoding="utf8")
    here = (SOURCE.parents[1], Path.home(), Path(tempfile.gettempdir()))
    assert not [folder for folder in here if f"{folder}/" in text]
