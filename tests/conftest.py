"""What tests share: the tiny LM, a JupyterLab server, and a Chromium that opens notebooks in it."""

import contextlib
import copy
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# No time fails a test: a machine may be busy.
hypothesis.settings.register_profile("workbook", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("workbook")

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LAB_SETTINGS = {
    # The whole notebook stays in the page, also what is scrolled out of sight.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "apputils-extension/themes": {"theme": "JupyterLab Light", "adaptive-theme": False},
}
START_SECONDS = 60
WAIT_MS = 30_000


# JupyterLab


@contextlib.contextmanager
def lab_server(folder: Path, private: Path, theme: str = "light") -> Iterator[tuple[str, str]]:
    """Serve a folder in JupyterLab on a free loopback port, apart from the reader's own settings.

    Args:
        folder: what the server shows.
        private: an empty folder for settings, runtime files and the log.
        theme: "light" or "dark".

    Yields:
        `(url, token)`; the url ends without a slash.
    """
    environment = _private_environment(private, theme)
    token, port = secrets.token_hex(16), _free_port()
    url, log = f"http://127.0.0.1:{port}", private / "server.log"
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": folder,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": True,
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_up(url, token, server, log)
            yield url, token
        finally:
            _stop(url, token, server)


def _private_environment(private: Path, theme: str) -> dict[str, str]:
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    paths = {name: str(private / folder) for name, folder in folders.items()}
    for path in paths.values():
        Path(path).mkdir(parents=True)
    for name, values in LAB_SETTINGS.items():
        if name.endswith("themes"):
            values = {**values, "theme": f"JupyterLab {theme.capitalize()}"}
        file = private / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    # The kernel must find labkit where it is not installed too; a proxy must not see loopback.
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **paths, "PYTHONPATH": python_path, "JUPYTER_PREFER_ENV_PATH": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ask(url: str, token: str, method: str = "GET") -> None:
    request = urllib.request.Request(
        url, method=method, headers={"Authorization": f"token {token}"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10):
        pass


def _wait_until_up(url: str, token: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            return _ask(f"{url}/api/status", token)
        except OSError:
            time.sleep(0.2)
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"JupyterLab did not start within {START_SECONDS} s; it said:\n{tail}")


def _stop(url: str, token: str, server: subprocess.Popen) -> None:
    # Asking lets the server end its kernels; only a deaf server is killed.
    with contextlib.suppress(OSError):
        _ask(f"{url}/api/shutdown", token, "POST")
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


# Chromium


@contextlib.contextmanager
def chromium() -> Iterator:
    """Start a headless Chromium: the system's, or else Playwright's own.

    Yields:
        A Playwright browser.

    Raises:
        LookupError: if there is no Playwright or no browser; says what to do.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise LookupError("Playwright is missing: pip install playwright") from None
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=found, args=list(BROWSER_ARGUMENTS), timeout=WAIT_MS
            )
        except Error as error:
            if found:
                raise
            message = "no Chromium found: install it, or run `playwright install chromium`"
            raise LookupError(f"{message} ({str(error).splitlines()[0]})") from None
        with contextlib.closing(browser):
            yield browser


def open_notebook(browser, url: str, token: str, notebook: Path, width=1300, height=1000):
    """Open a notebook in JupyterLab, and wait for its kernel.

    Args:
        browser: from `chromium`.
        url, token: from `lab_server`.
        notebook: a file at the top of the served folder; must name its kernel.
        width, height: of the window, in pixels.

    Returns:
        A Playwright page.
    """
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(WAIT_MS)
    # A workspace of its own: nothing that another page had open comes back.
    workspace = f"{url}/doc/workspaces/{secrets.token_hex(4)}"
    page.goto(f"{workspace}/tree/{urllib.parse.quote(notebook.name)}?token={token}")
    page.wait_for_function(
        "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"
    )
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    return page


def run_all_cells(page, timeout_seconds: float = 60) -> None:
    """Run the open notebook, and wait for the last cell.

    Raises:
        AssertionError: if a cell ended in an error; holds its message.
    """
    # `evaluate` would wait for the command without a limit, so it only starts it.
    run = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
    page.evaluate(f"() => {{ {run}.finally(() => window.labkitHasRun = true); }}")
    page.wait_for_function("window.labkitHasRun", timeout=1000 * timeout_seconds)
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()[-800:]


def copy_notebook(notebook: Path, folder: Path) -> Path:
    """Copy a notebook to a folder, to run on the kernel of this environment."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content["metadata"]["kernelspec"] = kernel
    copy = folder / notebook.name
    copy.write_text(json.dumps(content), encoding="utf-8")
    return copy


# Fixtures


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Put the environment back after each test, for the kernels of nbval inherit it.

    Dask sets one thread and a greedy malloc in the process that starts a cluster: with these the
    notebooks take twice as long.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def tiny() -> tuple:
    """The tiny LM and its tokenizer; copy the model before you change it."""
    import labkit as lk  # here, since most tests need no torch

    return lk.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def ids(tiny):
    """Calibration windows of the tiny LM, int64 `(6, 64)`."""
    import labkit as lk

    return lk.windows(tiny[1], "reference-fit", 6, 64)


@pytest.fixture
def model(tiny):
    """A copy of the tiny LM, to be changed."""
    return copy.deepcopy(tiny[0])


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A Chromium; skips where there is none, fails if that happens in CI.

    One a module, not one a session: while Playwright's loop runs, no kernel of nbval could start.
    """
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(chromium())
        except LookupError as reason:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(reason))
        yield started


@pytest.fixture(scope="module")
def lab_page(browser, tmp_path_factory) -> Iterator[Callable[[Path], object]]:
    """A function that opens a copy of a notebook in JupyterLab and returns the Playwright page."""
    folder, private = (tmp_path_factory.mktemp(name) for name in ("notebooks", "jupyter"))
    with lab_server(folder, private) as (url, token), contextlib.ExitStack() as pages:

        def open_copy(notebook: Path):
            page = open_notebook(browser, url, token, copy_notebook(notebook, folder))
            pages.callback(page.close)
            return page

        yield open_copy
