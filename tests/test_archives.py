"""Archives to one volume a subject: every way HCP packs them, bad ones, and interrupted runs."""

import errno
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from joblib import Parallel

from brainsex import archives
from brainsex.archives import extract
from tests.conftest import NO_RESULT

ROOT = Path(__file__).parents[1]
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
FA = "900001/T1w/Diffusion/900001_FA.nii.gz"


def volume(seed, size=4000):
    """Bytes that compress to about half."""
    return bytes(random.Random(seed).choices(range(16), k=size))


def zipped(files, method=DEFLATED):
    """A zip archive of `files` (pairs of name and content, so that names may repeat)."""
    content = BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return content.getvalue()


def nested(data, inner=DEFLATED, outer=STORED, name=FA):
    """The study's form: an archive that holds an archive that holds the volume."""
    within = zipped([("T1w/readme.txt", b"text" * 40), (name, data)], inner)
    return zipped([("release-notes/notes.txt", b"notes" * 40), ("packed.zip", within)], outer)


def save(folder, **archives):
    """Write archives; keyword `_900001_x` becomes ``900001_x.zip``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in archives.items():
        (folder / f"{name.removeprefix('_')}.zip").write_bytes(content)
    return folder


def contents(folder):
    """Whatever lies in a folder but a run's record and its list of the rejected: bytes by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in NO_RESULT}


@pytest.fixture
def source(tmp_path):
    return tmp_path / "archives"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "fa"


@pytest.mark.parametrize("inner", [STORED, DEFLATED])
@pytest.mark.parametrize("outer", [STORED, DEFLATED])
def test_nested_archive_gives_the_bytes_that_were_put_in(source, target, inner, outer):
    save(source, _900001_3T_Diffusion_preproc=nested(volume(1), inner, outer))
    table = extract(source, target)
    assert table.values.tolist() == [["900001", "extracted", ""]]
    assert contents(target) == {"900001.nii.gz": volume(1)}
    assert (target / "rejected.csv").read_text().split() == ["Subject,reason"]


def test_names_of_packages_and_members_old_and_new(source, target):
    save(source, _900001_3T_Diffusion_preproc=nested(volume(1)))
    save(source / "2025", _900002_Diffusion3TRecommended=zipped([("a/FA.nii.gz", volume(2))]))
    save(source, _900003=zipped([("dti_FA.nii", volume(3))]))
    save(source, _000004_x=zipped([("a\\fa.NII.GZ", volume(4))]))
    (source / "900005-y.ZIP").write_bytes(nested(volume(5)))
    (source / "._900001.zip").write_bytes(b"what macOS leaves on foreign disks")
    (source / "900006.zip").mkdir()
    table = extract(source, target)
    assert table["Subject"].tolist() == ["000004", "900001", "900002", "900003", "900005"]
    assert set(table["status"]) == {"extracted"}
    assert contents(target) == {
        "000004.nii.gz": volume(4),
        "900001.nii.gz": volume(1),
        "900002.nii.gz": volume(2),
        "900003.nii": volume(3),
        "900005.nii.gz": volume(5),
    }


def test_two_archives_of_a_subject_count_as_one(source, target):
    structural = zipped([("900001/T1w/T1w_acpc_dc_restore_brain.nii.gz", volume(0))])
    save(source, _900001_3T_Structural_preproc=structural)
    save(source, _900001_3T_Diffusion_preproc=nested(volume(1)))
    assert extract(source, target)["status"].tolist() == ["extracted"]
    assert contents(target) == {"900001.nii.gz": volume(1)}
    extract(source, target / "t1w", "T1w_acpc_dc_restore_brain.nii.gz")
    assert contents(target / "t1w") == {"900001.nii.gz": volume(0)}


def test_the_same_archive_twice_is_two_files(source, target):
    for folder in ("a", "b"):
        save(source / folder, _900001=direct)
    reason = extract(source, target)["reason"][0]
    assert reason.endswith(f"found a/900001.zip/{FA}, b/900001.zip/{FA}")


def test_only_who_asks_for_fa_is_told_that_hcp_ships_none(source, target):
    save(source, _900001=zipped([("readme.txt", b"")]))
    assert "HCP ships no FA map" in extract(source, target)["reason"][0]
    reason = extract(source, target, "T1w_acpc_dc_restore_brain.nii.gz")["reason"][0]
    assert reason.endswith("found none")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_workers_are_the_cores_that_this_process_may_use(source, target, monkeypatch):
    def parallel(workers, **options):
        asked.append(workers)
        return Parallel(workers, **options)

    asked = []
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)
    monkeypatch.setattr(archives, "Parallel", parallel)
    extract(save(source, _900001=nested(volume(1))), target)
    assert asked[0] <= len(os.sched_getaffinity(0))


def test_what_is_no_volume_never_matches(source, target):
    others = [
        "__MACOSX/x_FA.nii.gz",
        "a/._x_FA.nii.gz",
        "FA.nii.gz/",
        "x_FA.nii.gz.json",
        "xFA.nii",
    ]
    files = [(name, b"") for name in others] + [("__MACOSX/._packed.zip", b"no archive")]
    save(source, _900001=zipped([*files, (FA, volume(1))]))
    extract(source, target, ["*_FA.nii*", "FA.nii.gz"])
    assert contents(target) == {"900001.nii.gz": volume(1)}


def test_only_one_level_of_nesting_is_read(source, target):
    save(source, _900001=zipped([("outer.zip", nested(volume(1)))]))
    assert extract(source, target)["status"].tolist() == ["rejected"]


def test_stored_inner_archive_is_read_in_place(source, target, monkeypatch):
    def refuse(**options):
        raise AssertionError("a temporary file for a stored archive")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    save(source, _900001=b"a stub before the archive" + nested(volume(1), STORED, STORED))
    save(source, _900002=nested(volume(2), DEFLATED, STORED))
    extract(source, target)
    assert contents(target) == {"900001.nii.gz": volume(1), "900002.nii.gz": volume(2)}


def test_compressed_inner_archive_is_inflated_beside_the_volumes(source, target, monkeypatch):
    opened, original = [], tempfile.TemporaryFile
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda **options: opened.append(options) or original(**options)
    )
    save(source, _900001=nested(volume(1), STORED, DEFLATED))
    extract(source, target)
    assert opened == [{"dir": target}]
    assert contents(target) == {"900001.nii.gz": volume(1)}


def test_a_temporary_file_goes_before_the_next_comes(source, target, monkeypatch):
    opened, original = [], tempfile.TemporaryFile

    def temporary(**options):
        assert all(file.closed for file in opened)
        opened.append(original(**options))
        return opened[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    without = zipped([("x.txt", b"")])
    files = [("1.zip", without), ("2.zip", without), ("3.zip", zipped([(FA, volume(1))]))]
    save(source, _900001=zipped(files))
    assert extract(source, target)["status"].tolist() == ["extracted"]
    assert len(opened) == 3


@pytest.fixture
def cohort(source):
    """Twelve subjects, packed in turn in each way; the fourth is damaged."""
    ways = [(STORED, STORED), (STORED, DEFLATED), (DEFLATED, STORED)]
    for number in range(12):
        content = nested(volume(number), *ways[number % 3])
        save(source, **{f"_{900000 + number}_x": content[:-300] if number == 4 else content})
    return source


def test_workers_change_nothing(cohort, target):
    one, four = (extract(cohort, target / str(n), workers=n) for n in (1, 4))
    pd.testing.assert_frame_equal(one, four)
    assert one["Subject"].tolist() == [str(900000 + number) for number in range(12)]
    assert contents(target / "1") == contents(target / "4")
    lists = [(target / n / "rejected.csv").read_bytes() for n in ("1", "4")]
    assert lists[0] == lists[1]
    assert pd.read_csv(target / "1/rejected.csv", dtype=str)["Subject"].tolist() == ["900004"]


def test_workers_read_at_the_same_time_one_a_core_by_default(source, target, monkeypatch):
    together = threading.Barrier(2, timeout=20)
    monkeypatch.setattr(archives, "_extract_one", lambda *_: together.wait())
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    save(source, _900001=b"", _900002=b"")
    assert extract(source, target)["status"].tolist() == ["extracted", "extracted"]


def test_present_volumes_are_not_looked_at_again(cohort, target, monkeypatch):
    extract(cohort, target)
    before = contents(target)
    for path in cohort.iterdir():
        path.write_bytes(b"garbage")
    opened, original = [], zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda file: opened.append(file) or original(file))
    table = extract(cohort, target)
    assert opened == [cohort / "900004_x.zip"]
    assert table["status"].value_counts().to_dict() == {"present": 11, "rejected": 1}
    assert contents(target) == before


def test_a_rejected_subject_leaves_the_list_once_it_is_repaired(cohort, target):
    extract(cohort, target)
    save(cohort, _900004_x=nested(volume(4)))
    table = extract(cohort, target)
    assert table["Subject"].tolist() == [str(900000 + number) for number in range(12)]
    assert table["status"].tolist() == 4 * ["present"] + ["extracted"] + 7 * ["present"]
    assert len(pd.read_csv(target / "rejected.csv")) == 0


def test_overwrite_extracts_anew_and_keeps_one_volume_a_subject(source, target):
    save(source, _900001=nested(volume(1)), _900002=nested(volume(2)))
    extract(source, target)
    save(source, _900001=zipped([("FA.nii", volume(3))]), _900002=b"garbage")
    assert extract(source, target, overwrite=True)["status"].tolist() == ["extracted", "rejected"]
    assert contents(target) == {"900001.nii": volume(3), "900002.nii.gz": volume(2)}


def test_volumes_without_archives_are_present(source, target):
    source.mkdir()
    target.mkdir()
    others = (".900003.nii.gz.partial", "mean-of-all.nii.gz", "notes", "900004.gz", ".nii")
    for name in ("000002.nii.gz", "900001.nii", *others):
        (target / name).write_bytes(b"")
    table = extract(source, target)
    assert table.values.tolist() == [["000002", "present", ""], ["900001", "present", ""]]


@pytest.mark.parametrize(("made", "found"), [(True, "none in it"), (False, "no such folder")])
def test_no_source_says_what_was_expected(source, target, made, found):
    if made:
        save(source, readme=b"").joinpath("readme.zip").rename(source / "readme.txt")
    message = rf"archives: .*<ID>.*{found}.*DATA_ACCESS.md"
    with pytest.raises(FileNotFoundError, match=message):
        extract(source, target)
    assert not target.exists()
    if not made:  # a mistyped folder is an error whatever was extracted before
        target.mkdir()
        (target / "900001.nii.gz").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=message):
            extract(source, target)


def changed(content, old, new):
    assert old in content
    return content.replace(old, new)


def with_header(content, name, **fields):
    """Overwrite fields of a member's local and central headers."""
    content = bytearray(content)
    for signature, shift, length in ((b"PK\3\4", 0, 30), (b"PK\1\2", 2, 46)):
        at = content.index(name.encode(), content.index(signature)) - length
        while content[at : at + 4] != signature:
            at = content.index(name.encode(), at + length + 1) - length
        for field, value in fields.items():
            offset, form = {"flags": (6, "<H"), "method": (8, "<H"), "size": (22, "<I")}[field]
            struct.pack_into(form, content, at + offset + shift, value)
    return bytes(content)


direct = zipped([(FA, volume(1))])
stored = zipped([(FA, volume(1))], STORED)
flipped = changed(stored, volume(1)[1000:1050], volume(1)[1000:1049] + b"\xff")
ZEROS = bytes(3_000_000)
bomb = zipped([(FA, ZEROS)])
packed = zipfile.ZipFile(BytesIO(bomb)).getinfo(FA).compress_size
BAD = {
    "truncated": (direct[:-40], "expected a whole zip archive.*download it again"),
    "no zip": (b"<html>Please log in</html>", "expected a whole zip archive.*not a zip file"),
    "empty": (b"", "expected a whole zip archive"),
    "no member": (
        zipped([("900001/T1w/Diffusion/data.nii.gz", b"")]),
        r"expected one file named like \*_FA.nii.gz.*found none.*HCP ships no FA.*DATA_ACCESS.md",
    ),
    "two members": (
        zipped([("a/x_FA.nii.gz", b""), ("in.zip", zipped([("FA.nii", b"")]))]),
        "expected one file.*found 900001_x.zip/a/x_FA.nii.gz, 900001_x.zip/in.zip/FA.nii$",
    ),
    "flipped byte": (flipped, "900001_FA.nii.gz: .*Bad CRC-32"),
    "flipped, in place": (zipped([("in.zip", flipped)], STORED), "in.zip/900001.*Bad CRC-32"),
    "flipped, inflated": (zipped([("in.zip", flipped)]), "in.zip/900001.*Bad CRC-32"),
    "inner flipped": (
        changed(zipped([("in.zip", stored)], STORED), b"PK\5\6", b"PK\0\6"),
        "expected a whole zip archive",
    ),
    "inner no zip": (zipped([("in.zip", b"text")]), "900001_x.zip/in.zip: .*not a zip file"),
    "encrypted": (with_header(direct, FA, flags=1), "encrypted"),
    "inner encrypted": (
        with_header(zipped([("in.zip", direct)], STORED), "in.zip", flags=1),
        "900001_x.zip/in.zip: encrypted",
    ),
    "other compression": (zipped([(FA, b"")], zipfile.ZIP_BZIP2), "expected deflate.*method 12"),
    "deflate64": (with_header(direct, FA, method=9), "expected deflate.*method 9"),
    "declares more": (with_header(direct, FA, size=5000), "1000 fewer bytes than declared"),
    "declares less": (with_header(direct, FA, size=3000), "Bad CRC-32"),
    "inflates a thousandfold": (
        bomb,
        "at most 500 times what is stored, [0-9]+ bytes, declared are 3000000",
    ),
    "says it is stored large": (
        changed(
            bomb,
            struct.pack("<II", packed, len(ZEROS)),
            struct.pack("<II", 1_000_000, len(ZEROS)),
        ),
        "at most 500 times what is stored",
    ),
    "declares too much": (with_header(direct, FA, size=1 << 31 | 1), "at most 2147483648 bytes"),
    "inner declares more": (
        with_header(zipped([("in.zip", direct)]), "in.zip", size=900_000),
        "fewer bytes than declared",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_is_rejected_with_its_reason_and_the_rest_goes_on(source, target, case):
    content, message = BAD[case]
    save(source, _900001_x=content, _900002_x=nested(volume(2)))
    table = extract(source, target)
    assert table["status"].tolist() == ["rejected", "extracted"]
    reason = table["reason"][0]
    assert reason.startswith("900001_x.zip") or "900001_x.zip" in reason
    assert re.search(message, reason)
    assert contents(target) == {"900002.nii.gz": volume(2)}
    listed = pd.read_csv(target / "rejected.csv", dtype=str)
    assert listed.values.tolist() == [["900001", reason]]


def test_sizes_are_bounded(source, target, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER", 3999)
    save(source, _900001=direct)
    assert "at most 3999 bytes" in extract(source, target)["reason"][0]
    monkeypatch.setattr(archives, "MAX_MEMBER", 4000)
    monkeypatch.setattr(archives, "MAX_INNER", 1000)
    save(source, _900002=nested(volume(2), STORED, DEFLATED), _900003=nested(volume(3)))
    table = extract(source, target)
    assert table["status"].tolist() == ["extracted", "rejected", "extracted"]  # 3rd: in place
    assert "900002.zip/packed.zip: expected at most 1000 bytes" in table["reason"][1]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 200))]
)
def test_hostile_bytes_never_stop_a_cohort_nor_pass_as_a_volume(source, target, seed):
    draw = random.Random(seed)
    for number in range(60):
        content = bytearray(nested(volume(1), *draw.choices([STORED, DEFLATED], k=2)))
        for _ in range(draw.choice([1, 1, 2, 5])):
            near_end = len(content) - 1 - draw.randrange(200)
            at = draw.choice([draw.randrange(len(content)), near_end])
            content[at] = draw.randrange(256)
        save(source, **{f"_{900000 + number}": content[: draw.choice([None, None, None, -50])]})
    table = extract(source, target)
    assert len(table) == 60
    assert set(contents(target).values()) <= {volume(1)}
    assert len(contents(target)) == (table["status"] == "extracted").sum()


class Full:
    """A file on a disk that is full after a few writes."""

    def __init__(self, file, writes, stop):
        self.file, self.writes, self.stop = file, writes, stop

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        if self.writes == 0:
            self.stop()
        self.writes -= 1
        return self.file.write(data)

    def flush(self, *_):
        self.stop()

    seek = flush


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("workers", [1, 4])
def test_a_full_disk_raises_and_the_next_run_goes_on(cohort, target, monkeypatch, workers):
    def open_on_full_disk(path, *rest, **options):
        file = open(path, *rest, **options)
        return Full(file, 3, disk_full) if ".900007." in str(path) else file

    with monkeypatch.context() as patch:
        patch.setattr(archives, "CHUNK", 1000)
        patch.setattr(archives, "open", open_on_full_disk, raising=False)
        with pytest.raises(OSError, match=r"No space left.*run again.*fa'") as caught:
            extract(cohort, target, workers=workers)
    assert caught.value.errno == errno.ENOSPC
    left = contents(target)
    assert "900007.nii.gz" not in left
    if workers == 1:  # nobody is tried in vain after it
        assert sorted(left) == [f"90000{n}.nii.gz" for n in (0, 1, 2, 3, 5, 6)]
    assert left == {
        f"9000{n:02}.nii.gz": volume(n) for n in range(12) if f"9000{n:02}.nii.gz" in left
    }
    status = extract(cohort, target).set_index("Subject")["status"]
    assert status.drop("900004").isin(["present", "extracted"]).all()
    assert status["900007"] == "extracted"


@pytest.mark.parametrize("writes", [0, 99])
def test_a_full_disk_under_the_temporary_file_is_no_rejection(source, target, monkeypatch, writes):
    original = tempfile.TemporaryFile
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda **options: Full(original(**options), writes, disk_full)
    )
    save(source, _900001=nested(volume(1), STORED, DEFLATED))
    with pytest.raises(OSError, match="No space left"):
        extract(source, target)
    assert contents(target) == {}


def test_a_target_that_cannot_be_written_raises(source, target):
    save(source, _900001=nested(volume(1)))
    target.write_bytes(b"a file where a folder is wanted")
    with pytest.raises(OSError, match="fa"):
        extract(source, target)


KILLED = """
import os, sys
from brainsex import archives
from tests.test_archives import Full

def open_and_die(path, *rest, **options):
    file = open(path, *rest, **options)
    return Full(file, 3, lambda: (file.flush(), os._exit(9))) if ".900005." in str(path) else file

archives.CHUNK, archives.open = 1000, open_and_die
archives.extract(sys.argv[1], sys.argv[2], workers=1)
"""


def test_a_run_killed_in_the_middle_of_a_volume_is_resumed(cohort, target):
    command = [sys.executable, "-c", KILLED, cohort, target]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 9
    left = contents(target)
    (partial,) = (name for name in left if re.fullmatch(r"\.900005\.nii\.gz\..*\.partial", name))
    assert left.pop(partial) == volume(5)[:3000]
    assert left == {f"90000{n}.nii.gz": volume(n) for n in (0, 1, 2, 3)}
    status = extract(cohort, target)["status"].tolist()
    assert status == 4 * ["present"] + ["rejected"] + 7 * ["extracted"]
    assert contents(target) == {f"9000{n:02}.nii.gz": volume(n) for n in range(12) if n != 4}


def documented(tmp_path, name):
    """The script `name` as DATA_ACCESS.md prints it."""
    page = (ROOT / "DATA_ACCESS.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (script,) = [block for block in blocks if block.startswith(f"# {name} ")]
    path = tmp_path / name
    path.write_text(script, encoding="utf-8", newline="\n")
    return path


SHELLS = {"take_fa.sh": ["bash"], "take_fa.ps1": ["pwsh", "-NoProfile", "-File"]}


@pytest.mark.parametrize("name", SHELLS)
def test_scripts_for_machines_without_python_do_the_same(source, target, tmp_path, name):
    needed = [SHELLS[name][0]] + ["unzip"] * (name == "take_fa.sh")
    if missing := [program for program in needed if not shutil.which(program)]:
        pytest.skip(f"no {missing[0]} on this machine")
    command = [*SHELLS[name], documented(tmp_path, name), source, target]
    for inner, outer in ((STORED, STORED), (DEFLATED, STORED), (DEFLATED, DEFLATED)):
        save(source / "old [1]", **{f"_90001{inner}_{outer}": nested(volume(inner), inner, outer)})
    shutil.move(source / "old [1]/900018_0.zip", source / "900028 0.ZIP")
    save(source, _000003_3T_Structural=zipped([("T1w.nii.gz", b"")]))
    save(source, _000003_3T_Diffusion=zipped([("a [b]*/dti_fa.nii", volume(3))]))
    save(source, _900004=zipped([("__MACOSX/._x_FA.nii.gz", b""), ("xFA.nii", b"")]))
    save(source, _900005=zipped([("a/FA.nii", b""), ("in.zip", zipped([("FA.nii", b"")]))]))
    save(source, _900006=direct[:-40], _900007=zipped([("in.zip", b"text")]))
    save(source, _900008=zipped([("in.zip", nested(volume(8)))]), _900009=b"garbage")
    if name == "take_fa.sh":
        save(source, _900003=with_header(direct, FA, flags=1))
    target.mkdir()
    (target / "900009.nii.gz").write_bytes(b"from before")
    expected = {
        "900010.nii.gz": volume(0),
        "900018.nii.gz": volume(8),
        "900028.nii.gz": volume(8),
        "000003.nii": volume(3),
        "900009.nii.gz": b"from before",
    }
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True, timeout=100)
        assert contents(target) == expected
        rejected = pd.read_csv(target / "rejected.csv", dtype=str).set_index("Subject")["reason"]
        encrypted = ["900003"] * (name == "take_fa.sh")  # of which older .NET knows nothing
        assert rejected.index.tolist() == [*encrypted, *(f"90000{n}" for n in range(4, 9))]
        assert all("found 0; HCP ships none" in rejected[f"90000{n}"] for n in (4, 8))
        assert "found 2" in rejected["900005"]


@pytest.mark.skipif(not shutil.which("unzip"), reason="no unzip on this machine")
def test_documented_fsl_recipe_selects_the_inner_shell(source, target, tmp_path):
    """FSL itself is stood in for by scripts that leave what they were given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, line in {
        "fslselectvols": 'echo "$@" >selected',
        "dtifit": """while [ "$1" != -o ]; do shift; done
                     cat selected low.bvals low.bvecs data.nii.gz >"$2_FA.nii.gz" """,
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    folder = "900001/T1w/Diffusion"
    files = {
        "bvals": b"5 1000  3000 995 2000 5\n",
        "bvecs": b"0 1 2 3 4 5 \n.0 .1 .2 .3 .4 .5\n-0 -1 -2 -3 -4 -5\n",
        "data.nii.gz": b"data\n",
        "nodif_brain_mask.nii.gz": b"mask",
        "eddylogs/data.nii.gz.log": b"not needed",
    }
    package = zipped([(f"{folder}/{name}", content) for name, content in files.items()])
    save(source, _900001_3T_Diffusion_preproc=package)
    save(source, _900002_Diffusion3TRecommended=package[:-30], _900003_other=package)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    for name, content in list(files.items())[:4]:
        loose = source / folder.replace("900001", "900004") / name
        loose.parent.mkdir(parents=True, exist_ok=True)
        loose.write_bytes(content)
    before = sorted(loose.parent.iterdir())
    command = ["bash", documented(tmp_path, "fit_fa.sh"), source, target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "900002: no FA map" in run.stderr
    assert sorted(contents(target)) == ["900001.nii.gz", "900004.nii.gz"]
    assert len(set(contents(target).values())) == 1
    assert sorted(loose.parent.iterdir()) == before
    given = contents(target)["900001.nii.gz"].decode().splitlines()
    assert given[0] == "-i data -o low --vols=0,1,3,5"
    assert [line.split() for line in given[1:]] == [
        ["5", "1000", "995", "5"],
        ["0", "1", "3", "5"],
        [".0", ".1", ".3", ".5"],
        ["-0", "-1", "-3", "-5"],
        ["data"],
    ]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_archives_behind_a_link_are_found_once(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    with zipfile.ZipFile(disk / "000001.zip", "w") as archive:
        archive.writestr("FA.nii.gz", b"volume")
    source = tmp_path / "source"
    source.mkdir()
    (source / "archives").symlink_to(disk)
    (disk / "back").symlink_to(source)
    assert len(list(archives.files(source, ".zip"))) == 1
    table = extract(source, tmp_path / "fa")
    assert table[["Subject", "status"]].values.tolist() == [["000001", "extracted"]]
    assert (tmp_path / "fa" / "000001.nii.gz").read_bytes() == b"volume"


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_two_links_are_two_subjects_or_one_archive(tmp_path):
    """Of two subjects whose folders are links to one; and of one archive in a linked folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "data.nii.gz").touch()
    with zipfile.ZipFile(disk / "sub-03.zip", "w") as archive:
        archive.writestr("FA.nii.gz", b"volume")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("sub-01", "sub-02"):
        (source / name).symlink_to(disk)
    found = {path.relative_to(source).as_posix() for path in archives.files(source, ".nii.gz")}
    assert found == {"sub-01/data.nii.gz", "sub-02/data.nii.gz"}
    table = extract(source, tmp_path / "fa")
    assert table[["Subject", "status"]].values.tolist() == [["03", "extracted"]]


def test_a_volume_the_user_named_id_fa_is_present(tmp_path):
    (tmp_path / "fa").mkdir()
    (tmp_path / "fa" / "000001_FA.nii.gz").write_bytes(b"volume")
    with zipfile.ZipFile(tmp_path / "000001.zip", "w") as archive:
        archive.writestr("FA.nii.gz", b"another")
    assert extract(tmp_path, tmp_path / "fa")["status"].tolist() == ["present"]
    assert [path.name for path in (tmp_path / "fa").glob("*.nii*")] == ["000001_FA.nii.gz"]
