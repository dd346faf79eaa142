"""The fast tests in environments of their own; each writes its row of docs/compatibility.md.

    nox                                    # all, one after the other: about 20 GB, 10 minutes each on two cores
    nox -s oldest                          # one
    nox -R -s newest -- tests/test_ops.py  # what follows -- goes to pytest, and no row is written; -R installs nothing

A Python that is not on the machine is left out with a warning (`--download-python auto` fetches it, with uv).
"""

from __future__ import annotations

import nox

EXTRAS = "demo,export,hf,look,peers,test,vision"
PROJECT = nox.project.load_toml("pyproject.toml")["project"]


def floors() -> list[str]:
    """The oldest release of everything that pyproject.toml names and tests use, as it says."""
    extras = (PROJECT["optional-dependencies"][extra] for extra in EXTRAS.split(","))
    wanted = {*PROJECT["dependencies"], *(requirement for extra in extras for requirement in extra)}
    return sorted(requirement.replace(">=", "==") for requirement in wanted)


# name: (Python, what pip is told besides the package and its extras)
SESSIONS = {
    "oldest": ("3.10", [*floors(), "numpy<2.4"]),  # the interpreter of triton 3.6 fails with numpy 2.4
    "tested": ("3.11", ["-c", "constraints.txt"]),
    "newest": ("3.13", ["--upgrade", "--upgrade-strategy", "eager"]),
    # Three equal signs leave out builds with a name (2.13.0+cpu), which pip may find first: it is the build from PyPI.
    "usual": ("3.11", ["-c", "constraints.txt", "torch===2.13.0"]),
}

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


def run(session: nox.Session) -> None:
    session.install(*SESSIONS[session.name][1], "-e", f".[{EXTRAS}]")
    tests = ("python", "-m", "pytest", "-n", "2", "--dist", "worksteal", "-m", "not slow and not long")
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if session.posargs:
        session.run(*tests, *session.posargs, env=threads)
        return
    report = f"{session.create_tmp()}/tests.xml"
    session.run(*tests, f"--junit-xml={report}", env=threads, success_codes=[0, 1])
    session.run("python", "tests/compatibility.py", session.name, report)


for name, (python, _) in SESSIONS.items():
    nox.session(run, name=name, python=python)
