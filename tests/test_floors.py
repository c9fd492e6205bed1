"Nothing climbs: which room may import which, and what importing the library must not drag in."
import ast, subprocess, sys
from pathlib import Path
import pytest

LIB = Path(__file__).resolve().parents[1]/"mdd_bench"
FILES = sorted(p for p in LIB.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py", "cli.py"))
ALL_MAY = {"errors", "options"}
ROOMS = dict(
    errors=set(),
    options=set(),
    data={"data"},
    parts={"parts"},
    evaluation={"evaluation"},
    detectors={"parts", "detectors"},
    running={"data", "parts", "evaluation", "detectors", "running"},
    reporting={"reporting", "running.store"},
)

def name_of(path): return path.relative_to(LIB).with_suffix("").as_posix()

# --- rooms

def relative_base(path, node):
    "What a relative import is relative to, as names below mdd_bench."
    here = path.relative_to(LIB).with_suffix("").parts
    return list(here[:len(here) - node.level]) + (node.module or "").split(".")*bool(node.module)

def from_import(path, node):
    "The own modules of a `from ... import ...`."
    if node.level: base = relative_base(path, node)
    else:
        first, *base = node.module.split(".")
        if first != "mdd_bench": return []
    if base: return [".".join(base)]
    return [alias.name for alias in node.names]       # from mdd_bench import running

def own_imports(path):
    "Own modules that a file imports, as dotted names below mdd_bench, at any depth of the code."
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom): found += from_import(path, node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [name.removeprefix("mdd_bench.") for name in names if name.startswith("mdd_bench.")]
    return [name for name in found if name != "__version__"]

@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_climbs(path):
    room = path.relative_to(LIB).with_suffix("").parts[0]
    allowed = ROOMS[room] | ALL_MAY if room not in ALL_MAY else {"errors"}
    for name in own_imports(path):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{name_of(path)} imports {name}"

def test_every_room_is_known():
    rooms = {path.relative_to(LIB).with_suffix("").parts[0] for path in FILES}
    assert rooms == set(ROOMS)

def test_the_check_sees_imports(tmp_path):
    "In every form, also inside of a function."
    assert set(own_imports(LIB/"running"/"run.py")) >= {"running.identity", "running.store"}
    assert set(own_imports(LIB/"detectors"/"detector.py")) >= {"errors", "options"}
    file = LIB/"parts"/"nowhere.py"
    code = '''
from ..errors import SpecError
from ..running.store import Store
from .backbone import Backbone
from .. import evaluation
from mdd_bench.data.catalog import Catalog
from mdd_bench import detectors
import mdd_bench.reporting.plots as plots, torch
def f():
    from mdd_bench.cli import main
'''
    class File(type(file)):
        def read_text(self, **_): return code
    expected = ["errors", "running.store", "parts.backbone", "evaluation", "data.catalog", "detectors"]
    assert own_imports(File(file)) == [*expected, "reporting.plots", "cli"]

def outside_imports(path):
    "Packages that a file imports, by their first name."
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return plain | {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}

@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_notebook_tools_in_the_library(path):
    assert not outside_imports(path) & {"nbdev", "fastcore", "IPython"}

# --- what is loaded

def loaded(code, packages):
    "Which packages are loaded after some code, in a fresh process."
    program = f"{code}\nimport sys\nprint(*(p for p in {packages!r} if p in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()

RUNNING = "import mdd_bench.running.run, mdd_bench.running.sweep, mdd_bench.cli"
HEAVY = ["papermill", "matplotlib", "seaborn", "distributed", "fastcore", "IPython", "nbdev"]

def test_runs_need_no_notebooks_and_no_plots(): assert loaded(RUNNING, HEAVY) == []

LIGHT = ["import mdd_bench", "import mdd_bench; dir(mdd_bench)", "import mdd_bench.cli"]

@pytest.mark.parametrize("code", LIGHT)
def test_importing_the_package_costs_nothing(code):
    assert loaded(code, ["torch", "timm", "pandas", "numpy", "scipy", "sklearn"]) == []

def test_specs_need_no_torch(): assert loaded("from mdd_bench import make_spec", ["torch", "pandas"]) == []

# --- the public names

PUBLIC = dict(
    Evaluator="evaluation.metrics",
    Runtime="running.runtime",
    create_detector="detectors.detector",
    list_detectors="detectors.detector",
    load_records="running.store",
    make_spec="running.spec",
    run="running.run",
)

def test_the_public_names_are_those_of_their_modules():
    import importlib
    import mdd_bench
    assert set(mdd_bench.__all__) == {"__version__", *PUBLIC}
    for name, module in PUBLIC.items():
        home = importlib.import_module(f"mdd_bench.{module}")
        assert getattr(mdd_bench, name) is getattr(home, name)
        assert name in home.__all__ and name in dir(mdd_bench)

def test_public_names_can_be_imported_first():
    "In a process that has loaded nothing else, one by one and all at once."
    names = ", ".join(PUBLIC)
    assert loaded(f"from mdd_bench import {names}", ["torch"]) == ["torch"]
    assert loaded("from mdd_bench import *\nassert callable(run) and callable(make_spec)", []) == []

def test_a_name_stays_its_own_after_a_submodule_is_imported():
    code = "import mdd_bench.running.run\nimport mdd_bench\nassert callable(mdd_bench.run)"
    assert loaded(code, []) == []

def test_an_unknown_name_is_a_clear_error():
    import mdd_bench
    with pytest.raises(AttributeError, match="mdd_bench has no 'rnu'; it has Evaluator, .*make_spec, run"):
        mdd_bench.rnu       # noqa: B018
    with pytest.raises(ImportError, match="rnu"): from mdd_bench import rnu  # noqa: F401
    assert not hasattr(mdd_bench, "rnu") and getattr(mdd_bench, "rnu", 3) == 3
