"""Test with the lowest versions that pyproject.toml allows, or with the newest.

``python -m tests.reliability.versions {lowest,newest} [--python PYTHON]`` makes a virtual
environment in build/ and runs the test suite with it. It downloads what it installs.
"""

import argparse
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


def install(which: str, python: str) -> str:
    """Make the environment anew, and return its interpreter."""
    code = "import platform; print(platform.python_version())"
    version = subprocess.check_output([python, "-c", code], text=True).strip()
    folder = ROOT / "build" / f"versions-{which}-{version}"
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    scripts = sysconfig.get_path("scripts", "venv", {"base": str(folder)})
    pip = [Path(scripts, "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *requirements(which)], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    return pip[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("lowest", "newest"))
    parser.add_argument("--python", default=sys.executable, help="an interpreter, else this one")
    arguments = parser.parse_args()
    python = install(arguments.which, arguments.python)
    return subprocess.run([python, "-m", "pytest"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
