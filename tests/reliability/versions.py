"""Test with the lowest versions that the requirements allow, or with the newest.

``python -m tests.reliability.versions {lowest,newest} [--python PYTHON]`` makes a virtual
environment in build/, fills it from requirements.txt, requirements-diffusion.txt and the test extra
of pyproject.toml, and runs the test suite with it: what pytest ends with, this ends with. It needs
nothing installed, and downloads what it installs. PYTHON is the interpreter, else this one.
"""

import argparse
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("requirements.txt", "requirements-diffusion.txt")


def requirements() -> list[str]:
    """What the project asks for but for itself, one requirement each."""
    lines = [
        line.split("#")[0].strip()
        for name in FILES
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = lines + project["optional-dependencies"]["test"]
    return [line for line in asked if line and not line.startswith("-")]


def lowest(requirement: str) -> str:
    """The same, of its lowest version; what is pinned stays so."""
    return requirement.replace(">=", "==", 1)


def install(which: str, python: str) -> str:
    """Make the environment anew, and give its interpreter."""
    ask = [python, "-c", "import platform; print(platform.python_version())"]
    version = subprocess.check_output(ask, text=True).strip()
    folder = ROOT / "build" / f"versions-{which}-{version}"
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    scripts = sysconfig.get_path("scripts", "venv", {"base": str(folder)})
    inside = str(Path(scripts, "python"))
    pip = [inside, "-m", "pip", "install", "--quiet"]
    wanted = requirements()
    if which == "lowest":
        wanted = [lowest(each) for each in wanted]
    subprocess.run([*pip, *wanted], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    return inside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("lowest", "newest"))
    parser.add_argument("--python", default=sys.executable, help="an interpreter, else this one")
    arguments = parser.parse_args()
    python = install(arguments.which, arguments.python)
    return subprocess.run([python, "-m", "pytest"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
