"""Test with the lowest versions that pyproject.toml allows, or with the newest.

``python -m tests.reliability.versions {lowest,newest} [PYTHON]`` makes a virtual environment in
build/, of this interpreter or another, and runs the test suite in it. It downloads what it needs.
"""

import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def requirements(which: str) -> list[str]:
    """Return what the project and its extras need; of the lowest version allowed, or any."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = sum(project["optional-dependencies"].values(), project["dependencies"])
    return [line.replace(">=", "==") for line in needed] if which == "lowest" else needed


def run(which: str, python: str = sys.executable) -> None:
    folder = ROOT / "build" / f"versions-{which}-{Path(python).name}"
    inside = Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)}), "python")
    install = [inside, "-m", "pip", "install", "--quiet"]
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    subprocess.run([*install, *requirements(which)], check=True)
    subprocess.run([*install, "--no-deps", "--editable", ROOT], check=True)
    subprocess.run([inside, "-m", "pytest"], cwd=ROOT, check=True)


if __name__ == "__main__":
    run(*sys.argv[1:])
