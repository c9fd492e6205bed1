"What all tests share: a cache of their own, the real images where they are, a small spec, records made once."
import os, subprocess, sys, tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple
import pytest

os.environ["MDD_BENCH_CACHE"] = tempfile.mkdtemp(prefix="mdd_bench_tests_")   # before anything asks for it
ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(
    data="embedded-v1-smoke", classes=["gear", "tile"], size=64,
    weights="lite0", layers=[1, 2], epochs=1,
)

# --- small runs

def small_spec(**fields):
    "A spec of a run that takes about a second."
    from mdd_bench.running.spec import make_spec
    return make_spec(**SMALL | dict(detector="rd4ad") | fields)

def text_of(value):
    "A value as a command line has it."
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)

def run_flags(**fields):
    "Flags of `mdd_bench run` for a small run."
    values = SMALL | dict(detector="rd4ad") | fields
    flags = []
    for name, value in values.items(): flags += ["--" + name.replace("_", "-"), text_of(value)]
    return flags

def flags_of(spec):
    "A spec as flags of `mdd_bench run`; fields that are None are left out."
    flags = []
    for name, value in asdict(spec).items():
        flag = "--" + name.replace("_", "-")
        if name == "options":
            for option, chosen in value.items(): flags += ["--option", f"{option}={chosen}"]
        elif isinstance(value, bool): flags += [flag]*value
        elif value is not None: flags += [flag, text_of(value)]
    return flags

def sweep_flags(**parameters):
    "Flags of `mdd_bench sweep` for small runs with seed 0."
    values = SMALL | dict(detector="rd4ad", seed=0) | parameters
    flags = []
    for name, value in values.items(): flags += ["-p", f"{name}={text_of(value)}"]
    return flags

class KeptRun(NamedTuple):
    "A run whose model was kept: not to be changed, tests that would change it take a copy of `out`."
    spec: object
    record: object
    out: Path      # its results folder

@pytest.fixture(scope="session")
def kept_run(tmp_path_factory):
    "A function: the small run of a detector, made once in a session."
    from mdd_bench.running.run import run
    made = {}
    def get(detector):
        if detector not in made:
            spec, out = small_spec(detector=detector), tmp_path_factory.mktemp(f"kept_{detector}")
            made[detector] = KeptRun(spec, run(spec, out, keep_model=True), out)
        return made[detector]
    return get

# --- the command line

@pytest.fixture
def cli(tmp_path, capsys, monkeypatch):
    """The command line in this process, started in the test's folder.

    Returns (exit code, stdout, stderr). What a bug would print as a traceback is raised."""
    from mdd_bench.cli import main
    monkeypatch.chdir(tmp_path)
    def call(*args):
        try:
            main([str(a) for a in args])
            code = 0
        except SystemExit as e: code = e.code
        return code or 0, *capsys.readouterr()
    return call

@pytest.fixture
def shell(tmp_path):
    "The installed command in a process of its own, in the test's folder: (exit code, stdout, stderr)."
    command = Path(sys.executable).parent/"mdd_bench"
    def call(*args):
        done = subprocess.run([command, *map(str, args)], capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr
    return call

# --- the real images

def real_folder():
    "The real images: MDD_BENCH_REAL, or shared/data/real beside the checkout."
    return Path(os.environ.get("MDD_BENCH_REAL") or ROOT.parent/"shared"/"data"/"real")

@pytest.fixture(scope="session")
def real():
    folder = real_folder()
    if not folder.is_dir():
        pytest.skip(f"the real images are not there (set MDD_BENCH_REAL; looked in {folder})")
    return folder

@pytest.fixture(scope="session")
def real_weights(real):
    file = real.parent/"weights"/"resnet18_imagenet_layers1to3.pth"
    if not file.is_file(): pytest.skip(f"the ResNet-18 weights are not there (looked for {file})")
    return file
