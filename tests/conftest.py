"What all tests share: a cache of their own, the real images where they are, a small dataset."
import os, subprocess, sys, tempfile
from pathlib import Path
import pytest

os.environ["MDD_BENCH_CACHE"] = tempfile.mkdtemp(prefix="mdd_bench_tests_")   # before anything asks for it
ROOT = Path(__file__).resolve().parents[1]

def real_folder():
    "The real images: MDD_BENCH_REAL, or shared/data/real beside the checkout."
    return Path(os.environ.get("MDD_BENCH_REAL") or ROOT.parent/"shared"/"data"/"real")

@pytest.fixture(scope="session")
def real():
    folder = real_folder()
    if not folder.is_dir(): pytest.skip(f"the real images are not there (set MDD_BENCH_REAL; looked in {folder})")
    return folder

@pytest.fixture(scope="session")
def real_weights(real):
    file = real.parent/"weights"/"resnet18_imagenet_layers1to3.pth"
    if not file.is_file(): pytest.skip(f"the ResNet-18 weights are not there (looked for {file})")
    return file

@pytest.fixture
def cli(tmp_path, capsys, monkeypatch):
    "The command line in this process: (exit code, stdout, stderr). What a bug would print as a traceback is raised."
    from mdd_bench.cli import main
    monkeypatch.chdir(tmp_path)
    def call(*args):
        try: main([str(a) for a in args]); code = 0
        except SystemExit as e: code = e.code
        return code or 0, *capsys.readouterr()
    return call

@pytest.fixture
def shell(tmp_path):
    "The installed command in a process of its own: (exit code, stdout, stderr)."
    def call(*args):
        got = subprocess.run([Path(sys.executable).parent/"mdd_bench", *map(str, args)], capture_output=True, text=True, cwd=tmp_path)
        return got.returncode, got.stdout, got.stderr
    return call

SMALL = dict(data="embedded-v1-smoke", classes=["gear", "tile"], size=64, weights="procedural", layers=[1, 2], epochs=1)
