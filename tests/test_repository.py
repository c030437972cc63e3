"""What the repository holds: no secret, nobody's data, no call that runs what is in a file."""

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

from tests.reliability import versions

ROOT = Path(__file__).parents[1]
RUNNING_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"),
    *("joblib.load", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    *("pd.read_pickle", "torch.jit.load"),
}
SOURCES = [*sorted(ROOT.glob("brainsex/**/*.py")), ROOT / "notebooks/run.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_what_is_in_a_file(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert name not in RUNNING_CALLS
            assert options.get("allow_pickle", "False") == "False"
            assert options.get("shell", "False") == "False"
            assert name != "torch.load" or options["weights_only"] == "True"


def read_committed() -> dict[str, bytes]:
    """Read each committed file, by its path; none outside a checkout."""
    command = ["git", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    paths = {name: ROOT / name for name in listing.stdout.split("\0") if name}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


FILES = read_committed()
checkout = pytest.mark.skipif(not FILES, reason="no checkout: git does not list the files")
SECRETS = {
    "a key": rb"\b(AKIA[0-9A-Z]{16}|ghp_[0-9A-Za-z]{20,}|gho_[0-9A-Za-z]{20,}|sk-[0-9A-Za-z_-]{20,}"
    rb"|github_pat_[0-9A-Za-z_]{20,}|hf_[0-9A-Za-z]{20,}|xox[abp]-[0-9A-Za-z-]{10,}|AIza[\w-]{35})",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password": rb"(?i)(passw(or)?d|secret|api_?key|access_?token)\s*[=:]\s*[\"'][^\"'\s]{4,}",
    "an address with a password": rb"[a-z]+://[^/\s:@\"']+:[^/\s:@\"']+@",
    "an e-mail": rb"@(gmail|outlook|hotmail|yahoo|gmx|proton|icloud)[\w.-]*",
    "somebody's folder": rb"(/home/|/Users/|C:\\\\?Users\\\\?)[a-z][\w-]+",
    "root's folder": rb"(?<![\w.])/root/[\w.]",
}
EXAMPLES = {
    "a key": b"AKIA" + b"A" * 16,
    "a private key": b"-----BEGIN RSA PRIVATE KEY",
    "a password": b"password = 'hunter22'",
    "an address with a password": b"https://me:word@example.org",
    "an e-mail": b"me@gmail.com",
    "somebody's folder": b"/home/me/x",
    "root's folder": b"(/root/x",
}


@checkout
@pytest.mark.parametrize("kind", SECRETS)
def test_no_committed_file_holds_a_secret(kind):
    assert re.search(SECRETS[kind], EXAMPLES[kind])
    secrets = {
        name: match[0][:60]
        for name, content in FILES.items()
        if name != "tests/test_repository.py"
        for match in re.finditer(SECRETS[kind], content)
    }
    assert secrets == {}


HCP_ID = re.compile(
    rb"(?<![\w.#])[1-9][0-9]{5}(?=_3T|_7T|_FA|_Diff|_Struct|[/,\"' ]|$|\.zip|\.nii)", re.MULTILINE
)
"""What HCP's IDs look like (six digits, the first no 0); synthetic ones begin with 0."""
MADE_UP = re.compile(rb"900[01]\d\d|[178]00000|123456|999999|959964|700001|800001")
"""Of tests and documents: HCP has none that begin with 9000 or 9001; plain numbers; Z of 97.5 %."""


def notebook_text(content: bytes, *, sources: bool = True) -> str:
    """Return what a notebook's cells hold and show, without its images."""
    cells = nbformat.reads(content.decode(), 4).cells
    outputs = "\n".join(json.dumps(cell.get("outputs", ""), default=str) for cell in cells)
    outputs = re.sub(r'"image/png": "[^"]*"', "", outputs)
    return outputs + "\n".join(cell.source for cell in cells) * sources


@checkout
def test_no_subject_of_hcp_is_named():
    subjects = {}
    for name, content in FILES.items():
        if not name.endswith((".png", ".html")):
            text = notebook_text(content).encode() if name.endswith(".ipynb") else content
            ids = {match for match in HCP_ID.findall(text) if not MADE_UP.fullmatch(match)}
            subjects |= {name: ids} if ids else {}
    assert subjects == {}


@checkout
def test_no_volume_and_no_table_of_people_is_committed():
    endings = (".nii", ".nii.gz", ".npy", ".npz", ".zip", ".pt", ".mgz", ".dcm", ".tsv", ".xlsx")
    assert [name for name in FILES if name.lower().endswith(endings)] == []
    for name in FILES:
        if name.endswith(".csv"):
            header = FILES[name].split(b"\n")[0].decode().lower()
            assert not {"subject", "participant_id", "gender", "sex"} & set(header.split(",")), name


@checkout
def test_notebooks_show_the_synthetic_cohort():
    notebooks = [name for name in FILES if name.endswith(".ipynb")]
    assert len(notebooks) == 9
    for name in notebooks:
        assert "synthetic" in notebook_text(FILES[name], sources=False), name


def test_what_the_notebooks_ran_with_is_what_the_package_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["notebooks"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert sorted(pinned) == sorted(Requirement(line).name for line in needed)
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_lower_bounds_become_pins_of_whatever_the_project_asks_for():
    lowest, newest = (versions.requirements(which) for which in ("lowest", "newest"))
    assert {"numpy==2.0", "dipy==1.10", "pytest==8.2"} <= set(lowest)
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", line) for line in lowest)
    assert [line.replace(">=", "==") for line in newest] == lowest
