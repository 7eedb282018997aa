"""JupyterHub for a class with this workbook, on one Linux server.

Start it as root, in a folder of its own, where the hub keeps its database and its keys:

    cd /srv/jupyterhub && /opt/hub/bin/jupyterhub -f …/classroom/jupyterhub_config.py

`notebooks/TEACHING.md` says what to install before, and what three learners at once showed. Every
value below can be set from outside, by an environment variable of the hub; no file needs editing.

How large a server? CLASS_MEMORY for each learner at work, and 1 GB for the hub and the system.
"""

import os
from pathlib import Path

# The environment of the notebooks, with jupyterhub and nbgitpuller in it. Every learner reads it,
# so neither it nor the Python that it was made from may lie in anyone's home.
CLASS_ENV = Path(os.environ.get("CLASS_ENV", "/opt/class"))
# SmolLM2, converted: the teacher fills this once (`labkit fetch`), learners only read it.
CACHE = os.environ.get("LABKIT_CACHE", "/srv/labkit")
# How many work at the same time; each gets this share of the cores, at least one.
LEARNERS = int(os.environ.get("CLASS_LEARNERS", "20"))
THREADS = max(1, (os.cpu_count() or 1) // LEARNERS)
# A chapter takes up to 3.5 GB, the server beside it 0.2 GB. A second open chapter may not fit:
# a learner shuts down the kernel of the last one first.
MEMORY = os.environ.get("CLASS_MEMORY", "4G")
# A kernel that has been idle for so long is ended, and then the server: both hold memory.
IDLE_SECONDS = int(os.environ.get("CLASS_IDLE_SECONDS", "3600"))
# "pam" takes the accounts of this server, of those in CLASS_GROUP. For anything else ("native",
# "ldap", OAuth) install that authenticator beside the hub, and say in its terms who may enter.
AUTHENTICATOR = os.environ.get("CLASS_AUTHENTICATOR", "pam")
GROUP = os.environ.get("CLASS_GROUP", "class")
# Only a spawner with control groups holds a learner to CLASS_MEMORY. "systemd" does (pip install
# jupyterhub-systemdspawner beside the hub), and so do the spawners for containers. The plain one
# starts a process as the learner and enforces nothing: one greedy cell can stop a whole class.
SPAWNER = os.environ.get("CLASS_SPAWNER", "jupyterhub.spawner.LocalProcessSpawner")
# Passwords pass here: leave it on loopback, behind a web server with TLS.
ADDRESS = os.environ.get("CLASS_ADDRESS", "http://127.0.0.1:8000")

c = get_config()  # noqa: F821 - JupyterHub provides it

c.JupyterHub.bind_url = ADDRESS
c.JupyterHub.authenticator_class = AUTHENTICATOR
c.LocalAuthenticator.allowed_groups = {GROUP}
c.JupyterHub.spawner_class = SPAWNER

c.Spawner.cmd = [str(CLASS_ENV / "bin" / "jupyterhub-singleuser")]
c.Spawner.default_url = "/lab"
c.Spawner.mem_limit = MEMORY
c.Spawner.mem_guarantee = MEMORY  # what a spawner for containers should reserve
c.Spawner.environment = {
    "LABKIT_CACHE": CACHE,
    # torch, NumPy and SciPy read the first, numba the second. Without them every learner starts a
    # thread for each core, and the threads of a class stand in one another's way.
    "OMP_NUM_THREADS": str(THREADS),
    "NUMBA_NUM_THREADS": str(THREADS),
}
c.Spawner.args = [
    f"--MappingKernelManager.cull_idle_timeout={IDLE_SECONDS}",
    "--MappingKernelManager.cull_connected=True",  # also while the tab is still open
    f"--ServerApp.shutdown_no_activity_timeout={IDLE_SECONDS}",
]
# The first time, a whole class reads the same thousands of files from a cold disk.
c.Spawner.start_timeout = 120
c.Spawner.http_timeout = 120
