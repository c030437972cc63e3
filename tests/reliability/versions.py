"""Test with the lowest versions that pyproject.toml allows, or with the newest.

``python -m tests.reliability.versions {lowest,newest} [PYTHON]`` makes a virtual environment in
build/, of this interpreter or another, and runs the test suite with it. It downloads what it needs.
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


def run(which: str, python: str = sys.executable) -> int:
    """Make the environment anew, and return how pytest ends in it."""
    version = subprocess.check_output([python, "--version"], text=True).split()[1]
    folder = ROOT / "build" / f"versions-{which}-{version}"
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    inside = Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)}), "python")
    pip = [inside, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *requirements(which)], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    return subprocess.run([inside, "-m", "pytest"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:2] not in (["lowest"], ["newest"]):
        sys.exit(__doc__)
    sys.exit(run(*sys.argv[1:]))
