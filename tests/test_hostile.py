"""Files that are broken or made to harm: no command, no reader and no page is led astray by one."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from brainsex import checks, cohort, networks, pages
from brainsex.__main__ import main

ROOT = Path(__file__).parents[1]
EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)>'


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("every", [199, pytest.param(1, marks=pytest.mark.soak)])
def test_no_hostile_file_stops_a_command_or_takes_more_than_it_may(every):
    command = [sys.executable, "-m", "tests.reliability.hostile", str(every)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    *problems, rows = done.stdout.splitlines()
    found = dict(json.loads(rows))
    assert problems == []
    assert found["… of which failed"] == "0"
    assert int(found["hostile and broken files tried"]) > 2000 / every


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def whole(folder):
    """A cohort of six, as convert writes it."""
    folder.mkdir()
    np.save(folder / "tensors.npy", np.random.default_rng(0).random((6, 22, 22, 22), np.float32))
    np.save(folder / "labels.npy", np.arange(6) % 2)
    people = {"Subject": [f"00000{n}" for n in range(6)], "label": np.arange(6) % 2}
    pd.DataFrame(people).to_csv(folder / "subjects.csv", index=False)
    grid = {"shape": (22, 22, 22), "affine": np.diag([8.0, 8, 8, 1]).tolist()}
    (folder / "grid.json").write_text(json.dumps(grid))
    return folder


def stopped(command):
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, command)))
    assert str(ended.value).startswith("error: ")
    return str(ended.value)


@pytest.mark.parametrize("command", ["check", "train", "masks"])
@pytest.mark.parametrize("name", ["tensors.npy", "labels.npy"])
def test_a_pickle_in_an_array_is_not_run(tmp_path, command, name):
    folder, marker = whole(tmp_path / "c"), tmp_path / "marker"
    np.save(folder / name, np.array([Bomb(marker)] * 6, object), allow_pickle=True)
    more = [tmp_path / "networks"] if command == "masks" else []
    assert name in stopped([command, folder, *more, tmp_path / "out"])
    assert not marker.exists()
    np.load(folder / name, allow_pickle=True)  # it is one
    assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("command", ["predict", "masks"])
def test_a_pickle_in_a_network_is_not_run(tmp_path, command, zipped):
    folder, marker, trained = whole(tmp_path / "c"), tmp_path / "marker", tmp_path / "networks"
    trained.mkdir()
    state = networks.MriNet3d(1, (22, 22, 22)).state_dict() | {"more": Bomb(marker)}
    torch.save(state, trained / "fold-0.pt", _use_new_zipfile_serialization=zipped)
    folds = pd.DataFrame({"Subject": [f"00000{n}" for n in range(6)], "fold": 0})
    folds.to_csv(trained / "folds.csv", index=False)
    commands = {
        "predict": ["predict", trained / "fold-0.pt", "x.nii.gz"],
        "masks": ["masks", folder, trained, tmp_path / "out"],
    }
    assert "fold-0.pt" in stopped(commands[command])
    assert not marker.exists()
    torch.load(trained / "fold-0.pt", weights_only=False)  # it is one
    assert marker.exists()


def test_weights_that_inflate_or_outnumber_their_file_are_refused(tmp_path):
    path, state = tmp_path / "fold-0.pt", {"hidden1.0.weight": torch.zeros(1).expand(10**7, 1)}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"fold-0\.pt: .*more weights than the file has bytes"):
        networks.load(path)
    good = networks.MriNet3d(1, (22, 22, 22)).state_dict()
    torch.save(good | {"linear.bias": torch.tensor([torch.nan, 0])}, path)
    with pytest.raises(ValueError, match="not finite"):
        networks.load(path, (22, 22, 22))
    torch.save(good | {"linear.bias": torch.zeros(2, dtype=torch.complex64)}, path)
    with pytest.raises(ValueError, match="no floating-point numbers"):
        networks.load(path, (22, 22, 22))


@pytest.mark.parametrize("name", ["../../beside", "{root}/beside", "..\\beside", "a\nb", "x" * 300])
def test_an_id_that_is_a_path_names_no_file(tmp_path, name):
    folder = whole(tmp_path / "c")
    people = pd.read_csv(folder / "subjects.csv", dtype=str)
    people.loc[2, "Subject"] = name.format(root=tmp_path)
    people.to_csv(folder / "subjects.csv", index=False)
    with pytest.raises(ValueError, match=r"subjects\.csv: line 4: expected Subject of at most 200"):
        cohort.load(folder)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_nothing_is_written_through_a_link_that_lay_in_wait(tmp_path):
    folder, out = whole(tmp_path / "c"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    for name in ("checks.csv", "montage.html"):
        (out / f".{name}.partial").symlink_to(tmp_path / "mine.txt")
        (out / name).symlink_to(tmp_path / "mine.txt")
    main(["check", str(folder), str(out)])
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (out / "checks.csv").is_symlink()


def test_pages_escape_names(tmp_path):
    folder = whole(tmp_path / "c")
    people = pd.read_csv(folder / "subjects.csv", dtype=str)
    people.loc[1, "Subject"] = "<b>1"
    people["qc_issue"] = EVIL
    people.to_csv(folder / "subjects.csv", index=False)
    data = cohort.load(folder)
    data = type(data)(**{**vars(data), "name": EVIL})
    found = checks.table(data)
    checks.montage(data, found, tmp_path / "montage.html")
    box = pages.Mesh(np.eye(3, dtype=np.float32), np.array([[0, 1, 2]], np.int32))
    scene = {f"</script>{EVIL}<!--": (box, "#123456", 1.0)}
    pages.page(tmp_path / "page.html", scene, title=EVIL, caption=f"</title>{EVIL}")
    for name, scripts in (("montage.html", 0), ("page.html", 2)):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert "<b>1" not in text
        assert "&lt;script&gt;alert" in text
        assert len(
            re.findall("<script", re.sub(r"<script>(?s:.*?)</script>", "<script", text))
        ) == (scripts)


def calls(tree):
    """Each call in a module: its name, as ``torch.load``, and its keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


RUN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"}
RUN |= {"joblib.load", "pickle.load", "pickle.loads"}
RUN |= {"pd.read_pickle", "pickle.Unpickler", "torch.jit.load"}
SOURCES = [*sorted(ROOT.glob("brainsex/*.py")), ROOT / "notebooks/run.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_call_runs_what_is_in_a_file(path):
    for name, options in calls(ast.parse(path.read_text(encoding="utf-8"))):
        assert name not in RUN
        assert options.get("allow_pickle", "False") == "False"
        assert options.get("shell", "False") == "False"
        if name == "torch.load":
            assert options["weights_only"] == "True"


# ------------------------------------------------------------------------ what the repository holds


def committed():
    """Text of each committed file, by its path; nothing outside a checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return {}
    files = {name: ROOT / name for name in listed.stdout.split("\0") if name}
    return {name: path.read_bytes() for name, path in files.items() if path.is_file()}


FILES = committed()
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


@checkout
@pytest.mark.parametrize("what", SECRETS)
def test_no_committed_file_holds_a_secret(what):
    found = {
        name: match[0][:60]
        for name, content in FILES.items()
        if name != "tests/test_hostile.py"
        for match in re.finditer(SECRETS[what], content)
    }
    assert found == {}


def test_the_patterns_of_secrets_find_some():
    for text in (
        b"AKIA" + b"A" * 16,
        b"-----BEGIN RSA PRIVATE KEY",
        b"password = 'hunter22'",
        b"https://me:word@example.org",
        b"me@gmail.com",
        b"/home/me/x",
        b"(/root/x",
    ):
        assert any(re.search(pattern, text) for pattern in SECRETS.values()), text


HCP = re.compile(
    rb"(?<![\w.#])[1-9][0-9]{5}(?=_3T|_7T|_FA|_Diff|_Struct|[/,\"' ]|$|\.zip|\.nii)", re.MULTILINE
)
"""What HCP's IDs look like (six digits, the first no 0); synthetic ones begin with 0."""
MADE_UP = re.compile(rb"900[01]\d\d|[178]00000|999999|959964|700001|800001")
"""Of tests and documents: HCP has none that begin with 9000 or 9001; round numbers; Z of 97.5 %."""


@checkout
def test_no_subject_of_hcp_is_named():
    found = {}
    for name, content in FILES.items():
        if name.endswith((".png", ".html")):
            continue
        if name.endswith(".ipynb"):
            cells = nbformat.reads(content.decode(), 4).cells
            content = "\n".join(
                cell.source + json.dumps(cell.get("outputs", ""), default=str) for cell in cells
            ).encode()
            content = re.sub(rb'"image/png": "[^"]*"', b"", content)
        ids = {match[0] for match in HCP.finditer(content) if not MADE_UP.fullmatch(match[0])}
        if ids:
            found[name] = sorted(ids)[:5]
    assert found == {}


@checkout
def test_no_volume_and_no_table_of_people_is_committed():
    ends = (".nii", ".nii.gz", ".npy", ".npz", ".zip", ".pt", ".mgz", ".dcm", ".tsv", ".xlsx")
    assert [name for name in FILES if name.lower().endswith(ends)] == []
    for name in FILES:
        if name.endswith(".csv"):
            header = FILES[name].split(b"\n")[0].decode().lower()
            assert not {"subject", "participant_id", "gender", "sex"} & set(header.split(",")), name


@checkout
def test_notebooks_show_the_synthetic_cohort():
    notebooks = [name for name in FILES if name.endswith(".ipynb")]
    assert len(notebooks) == 8
    for name in notebooks:
        cells = nbformat.reads(FILES[name].decode(), 4).cells
        said = " ".join(json.dumps(cell.get("outputs", ""), default=str) for cell in cells)
        assert "synthetic" in re.sub(r'"image/png": "[^"]*"', "", said), name
