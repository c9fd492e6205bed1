"The wheel, in an environment outside the checkout, can do what the checkout can."
import os, subprocess, sys, venv
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A fresh environment with the wheel; the dependencies are borrowed from this one (no network), the checkout is not."
    d = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", d, ROOT], check=True)
    venv.create(d/"env", with_pip=True)
    python = d/"env"/"bin"/"python"
    site = Path(subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True).stdout.strip())
    [borrowed] = [p for p in sys.path if p.endswith("site-packages") and Path(p, "torch").is_dir()][:1]
    (site/"borrowed.pth").write_text(borrowed + "\n")               # .pth files inside it are not followed: the editable checkout stays out
    [wheel] = d.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    return d

def test_the_wheel_is_what_is_imported(installed):
    got = subprocess.run([installed/"env"/"bin"/"python", "-c", "import mdd_bench; print(mdd_bench.__file__)"], capture_output=True, text=True, cwd=installed, check=True)
    assert str(installed) in got.stdout

def test_the_command_sweeps_at_smoke_size(installed):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    args = ["-p", "data=embedded-v1-smoke", "-p", "classes=gear,tile", "-p", "size=64", "-p", "layers=1,2", "-p", "epochs=1", "-p", "seed=0", "-p", "detector=rd4ad,mddnet"]
    got = subprocess.run([installed/"env"/"bin"/"mdd_bench", "sweep", "benchmark", *args], capture_output=True, text=True, cwd=installed, env=env)
    assert got.returncode == 0, got.stderr
    assert "| mddnet |" in got.stdout and (installed/"results"/"benchmark"/"benchmark.ipynb").is_file() and len(list((installed/"results"/"benchmark"/"runs").glob("*/record.json"))) == 2
