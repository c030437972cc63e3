"""What the repository holds: no secret, nobody's data, no call that runs what is in a file."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
RUNNING_CALLS = """eval exec compile __import__ os.system os.popen yaml.load joblib.load pickle.load
pickle.loads pickle.Unpickler pd.read_pickle torch.jit.load""".split()


def test_no_call_runs_what_is_in_a_file():
    for path in (*ROOT.glob("brainsex/**/*.py"), ROOT / "notebooks/run.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                assert name not in RUNNING_CALLS, path
                assert name != "torch.load" or options["weights_only"] == "True", path
                for option in ("allow_pickle", "shell"):
                    assert options.get(option, "False") == "False", path


LISTING = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
FILES = {  # each committed file without images and meshes; none outside a checkout
    name: re.sub(rb"[\w+/=]{400,}", b"", (ROOT / name).read_bytes())
    for name in LISTING.stdout.split("\0")
    if (ROOT / name).is_file() and not name.endswith((".png", ".gif"))
}
SECRETS = {  # an example -> its pattern
    b"AKIA" + b"A" * 16: rb"\b(AKIA|ghp_|gho_|sk-|github_pat_|hf_|AIza|xox[abp]-)[\w-]{10,}",
    b"-----BEGIN RSA PRIVATE KEY": rb"-----BEGIN [A-Z ]*PRIVATE KEY",
    b"secret='abcd'": rb"(?i)(passw(or)?d|secret|api_?key|_token)\s*[=:]\s*[\"'][^\"'\s]{4,}",
    b"https://me:word@example.org": rb"[a-z]+://[^/\s:@\"']+:[^/\s:@\"']+@",
    b"me@gmail.com": rb"@(gmail|outlook|hotmail|yahoo|gmx|proton|icloud)[\w.-]*",
    b"/home/me/x": rb"(/home/|/Users/|C:\\\\?Users\\\\?)[a-z][\w-]+",
    b"(/root/x": rb"(?<![\w.])/root/[\w.]",
}


def test_no_committed_file_holds_a_secret():
    for example, pattern in SECRETS.items():
        assert re.search(pattern, example)
        hits = {name: re.search(pattern, content) for name, content in FILES.items()}
        hits = {name: hit[0][:60] for name, hit in hits.items() if hit}
        assert hits.keys() <= {"tests/test_repository.py"}, hits


HCP_ID = re.compile(
    rb"(?<![\w.#])[1-9][0-9]{5}(?=_3T|_7T|_FA|_Diff|_Struct|[/,\"' ]|$|\.zip|\.nii)", re.MULTILINE
)
"""What HCP's IDs look like (six digits, the first no 0); synthetic ones begin with 0."""
MADE_UP = re.compile(rb"900[01]\d\d|[178]00000|123456|999999|959964|700001|800001")
"""Of tests and documents: HCP has none that begin with 9000 or 9001; plain numbers; Z of 97.5 %."""


def test_no_subject_of_hcp_is_named():
    for name, content in FILES.items():
        ids = set() if name.endswith(".html") else set(HCP_ID.findall(content))
        assert not [subject for subject in ids if not MADE_UP.fullmatch(subject)], name


def test_no_volume_and_no_table_of_people_is_committed():
    endings = (".nii", ".nii.gz", ".npy", ".npz", ".zip", ".pt", ".mgz", ".dcm", ".tsv", ".xlsx")
    tour, synthetic = "notebooks/tour/", ROOT / "notebooks" / "tour" / "SYNTHETIC"
    assert synthetic.is_file()
    names = [name for name in FILES if not name.startswith(tour)]
    assert [name for name in names if name.lower().endswith(endings)] == []
    for name in names:
        if name.endswith(".csv"):
            header = FILES[name].split(b"\n")[0].decode().lower()
            assert not {"subject", "participant_id", "gender", "sex"} & set(header.split(",")), name


def test_what_the_notebooks_ran_with_is_what_the_package_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["notebooks"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {pin.name: pin for pin in map(Requirement, [line for line in lines if "==" in line])}
    assert sorted(pinned) == sorted(Requirement(line).name for line in needed)
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(str(pinned[requirement.name].specifier)[2:])
        assert requirement.marker == pinned[requirement.name].marker
