"""The package's structure: which module knows which, and what importing it does."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "brainsex"
ALLOWED = {
    "storage": "",
    "evaluation": "",
    "confounds": "",
    "networks": "",
    "figures": "",
    "tables": "storage",
    "speed": "networks",
    "cohort": "storage tables",
    "archives": "layouts storage",
    "registration": "",
    "participants": "tables",
    "volumes": "layouts participants registration storage",
    "layouts": "tables",
    "diffusion": "archives storage",
    "tabular": "confounds evaluation participants tables",
    "training": "cohort confounds evaluation networks perturbation speed storage",
    "first_layer": "networks speed",
    "perturbation": "networks speed",
    "saliency": "networks perturbation speed",
    "explain": "cohort networks perturbation saliency storage",
    "metrics": "networks perturbation speed",
    "synthetic": "cohort storage volumes",
}
"""What each module may import of the package; notebooks and ``__main__`` may import all."""


def imported(path: Path) -> set[str]:
    """Return the package's modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            package, _, module = (node.module or "").partition(".")
            if package == "brainsex":
                names |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("brainsex.")}
    return names & {path.stem for path in PACKAGE.glob("*")}


def test_each_module_imports_only_what_the_design_allows():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module not in ("__init__", "__main__"):
            extra = imported(path) - set(ALLOWED[module].split()) - {module}
            assert not extra, f"{path.name} imports {extra}"


def test_no_public_name_is_defined_in_two_modules():
    names = Counter(
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_importing_the_package_changes_no_global_state_and_needs_no_dipy():
    code = """
import sys, torch
flags = lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
                 torch.backends.cudnn.benchmark, torch.get_num_threads(), torch.get_default_dtype(),
                 torch.are_deterministic_algorithms_enabled(), torch.initial_seed())
before = flags()
sys.modules["dipy"] = None
import brainsex, brainsex.__main__
assert flags() == before
assert len(brainsex.__all__) == 11, brainsex.__all__
assert all(hasattr(brainsex, name) for name in brainsex.__all__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
