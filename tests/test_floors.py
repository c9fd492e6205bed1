"Nothing climbs: which room may import which (design of the house), and what importing the library must not drag in."
import ast, subprocess, sys
from pathlib import Path
import pytest

LIB = Path(__file__).resolve().parents[1]/"mdd_bench"
ROOMS = dict(data={"errors", "data"}, parts={"errors", "parts"}, evaluation={"errors", "evaluation"}, detectors={"errors", "parts", "detectors"},
             running={"errors", "data", "parts", "evaluation", "detectors", "running"}, reporting={"errors", "reporting", "running.store"}, errors=set())

def imports(path):
    "Own modules that a file imports, as dotted names below mdd_bench, at any depth of the code."
    here = path.relative_to(LIB).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(here[:len(here) - node.level]) if node.level else (node.module or "").split(".")[1:] if (node.module or "").split(".")[0] == "mdd_bench" else None
            if base is None: continue
            if node.level: base += (node.module or "").split(".") if node.module else []
            yield ".".join(base) or node.names[0].name
        elif isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith("mdd_bench."): yield a.name.split(".", 1)[1]

FILES = sorted(p for p in LIB.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py", "cli.py"))

@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(LIB).as_posix())
def test_nothing_climbs(path):
    room = path.relative_to(LIB).with_suffix("").parts[0]
    for name in imports(path):
        if name.startswith("_") or name == "__version__": continue
        assert any(name == ok or name.startswith(ok + ".") for ok in ROOMS[room]), f"{path.name} ({room}) imports {name}"

def test_the_check_sees_imports():
    assert set(imports(LIB/"running"/"run.py")) >= {"errors", "data.catalog", "parts.backbone", "running.store"}

def test_light_imports():
    heavy = ["papermill", "matplotlib", "seaborn", "distributed", "fastcore", "IPython", "nbdev"]
    code = f"import sys, mdd_bench, mdd_bench.running.run, mdd_bench.running.sweep, mdd_bench.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(LIB).as_posix())
def test_no_notebook_tools_in_the_library(path):
    names = {a.name.split(".")[0] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names} | \
            {(n.module or "").split(".")[0] for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and not n.level}
    assert not names & {"nbdev", "fastcore", "IPython"}
