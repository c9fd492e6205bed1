"The wheel, in an environment outside the checkout, can do what the checkout can."
import ast, json, os, re, shutil, subprocess, sys, venv, zipfile
from pathlib import Path
import pytest
from conftest import ROOT, sweep_flags

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

def output(*command, cwd=None):
    "What a command prints, run without anything that leads to the checkout."
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy, so that no earlier build is mixed in and none is left behind."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder/"source"
    for name in ("mdd_bench", "nbs/studies"):
        shutil.copytree(ROOT/name, source/name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT/name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    output(sys.executable, "-m", "pip", "wheel", *options, source)
    [file] = folder.glob("*.whl")
    return file

@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The scripts of a fresh environment with the wheel.

    Its dependencies are borrowed from this one (no network), the checkout is not: `.pth` files in a borrowed
    folder are not followed, so that an editable installation stays out."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder/"env", with_pip=True)
    scripts = folder/"env"/"bin"
    output(scripts/"python", "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    site = Path(output(scripts/"python", "-c", "import site; print(site.getsitepackages()[0])"))
    borrowed = next(p for p in sys.path if p.endswith("site-packages") and Path(p, "torch").is_dir())
    (site/"borrowed.pth").write_text(borrowed + "\n")
    return scripts

# --- what is in it

@pytest.fixture(scope="module")
def content(wheel):
    with zipfile.ZipFile(wheel) as file: return set(file.namelist())

def test_the_wheel_has_every_module(content):
    modules = [p for p in (ROOT/"mdd_bench").rglob("*.py") if "__pycache__" not in p.parts]
    in_wheel = {name for name in content if re.fullmatch(r"mdd_bench/(?!studies/).*\.py", name)}
    assert in_wheel == {p.relative_to(ROOT).as_posix() for p in modules}
    packages = {p.parent.name for p in modules} - {"mdd_bench"}
    assert packages == {"data", "parts", "evaluation", "detectors", "running", "reporting"}

def test_the_wheel_has_every_study(content):
    "With its notebook, and the scripts that some of them call."
    files = [p for p in (ROOT/"nbs"/"studies").iterdir() if p.suffix in (".yaml", ".ipynb", ".py")]
    assert len(files) > 20
    assert {f"mdd_bench/studies/{p.name}" for p in files} <= content

def test_the_wheel_has_the_weights(content): assert "mdd_bench/procedural.safetensors" in content

def test_the_wheel_has_the_published_numbers(content):
    assert {f"mdd_bench/published_{part}.csv" for part in ("mean", "perclass", "classes")} <= content

def test_the_wheel_has_nothing_else(content):
    "No tests, no results, no lessons, no scratch files."
    own = {name for name in content if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in own} == {"mdd_bench"}
    assert {Path(name).suffix for name in own} <= {".py", ".yaml", ".ipynb", ".safetensors", ".csv"}

# --- what it needs

OTHER_NAMES = dict(PIL="pillow", sklearn="scikit-learn", yaml="pyyaml", markdown_it="markdown-it-py")

def imported_packages(path):
    "Packages that a file imports, by their first name."
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return plain | {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}

def test_every_imported_package_is_required(wheel):
    "A machine that has only what the wheel asks for must be able to import every module."
    with zipfile.ZipFile(wheel) as file:
        [metadata] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        lines = file.read(metadata).decode().splitlines()
    required = {re.match(r"[\w-]+", line.split(": ")[1]).group().lower()
                for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line}
    modules = [p for p in (ROOT/"mdd_bench").rglob("*.py") if "__pycache__" not in p.parts]
    imported = set().union(*map(imported_packages, modules)) - sys.stdlib_module_names - {"mdd_bench"}
    assert len(imported) > 10 and {OTHER_NAMES.get(name, name) for name in imported} - required == set()

# --- what it can do

def test_the_wheel_is_what_is_imported(installed, tmp_path):
    code = "import mdd_bench; print(mdd_bench.__file__)"
    found = output(installed/"python", "-c", code, cwd=tmp_path)
    assert found.startswith(str(installed.parent))

def test_studies_are_found_beside_the_package(installed, tmp_path):
    code = "import mdd_bench.running.study as study; print(study.study_path('run'), *study.list_studies())"
    path, *studies = output(installed/"python", "-c", code, cwd=tmp_path).split()
    assert path.startswith(str(installed.parent)) and path.endswith("mdd_bench/studies/run.ipynb")
    assert studies == sorted(p.stem for p in (ROOT/"nbs"/"studies").glob("*.yaml"))

@pytest.mark.slow
def test_the_command_sweeps_at_smoke_size(installed, tmp_path):
    args = ["sweep", "benchmark", *sweep_flags(detector=["rd4ad", "mddnet"])]
    printed = output(installed/"mdd_bench", *args, cwd=tmp_path)
    folder = tmp_path/"results"/"benchmark"
    assert "| mddnet † |" in printed and (folder/"benchmark.ipynb").is_file()
    assert len(list(folder.glob("runs/*/record.json"))) == 2

# --- what a developer calls

def test_make_knows_its_targets():
    targets = set(re.findall(r"^([\w-]+):", (ROOT/"Makefile").read_text(), re.M))
    assert {"demo", "test", "test-all", "gpu-check", "lint", "notebooks", "peers", "lab", "clean"} <= targets

def test_make_lint_checks_notebooks_and_tests():
    text = (ROOT/"Makefile").read_text()
    [recipe] = re.findall(r"^lint:.*\n\t(.+)", text, re.M)
    assert recipe.startswith("ruff check") and {"nbs", "tests"} <= set(recipe.split())
    assert re.search(r"^test:.*\blint\b", text, re.M) and re.search(r"^test-all:.*\blint\b", text, re.M)

def test_lint_finds_what_it_is_for(tmp_path):
    "A long line, two statements on a line, an unused name: in a test, and in a notebook."
    bad = "import os\nx = 1; y = 2\nlong = '" + 110*"x" + "'\n"
    cell = dict(cell_type="code", metadata={}, outputs=[], execution_count=None, source=[bad])
    notebook = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path/"bad.py").write_text(bad)
    (tmp_path/"bad.ipynb").write_text(json.dumps(notebook))
    for name in ("bad.py", "bad.ipynb"):
        ruff = [Path(sys.executable).parent/"ruff", "check", "--no-cache", "--config", ROOT/"pyproject.toml"]
        done = subprocess.run([*ruff, tmp_path/name], capture_output=True, text=True)
        assert done.returncode == 1
        for rule in ("E501", "E702", "F401"): assert rule in done.stdout
