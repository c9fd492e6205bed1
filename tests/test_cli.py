"The command line as people meet it: one line and exit code 2 for bad input, nothing half-written; sweeps that skip, go on and say what failed."
import re, shutil
import pytest
from pathlib import Path
from conftest import SMALL
from mdd_bench.data.synthetic import write_embedded

RUN = ["run", "--size", 64, "--weights", "procedural", "--layers", "1,2", "--epochs", 1, "--detector", "rd4ad"]

@pytest.fixture(scope="module")
def data(tmp_path_factory): return write_embedded(tmp_path_factory.mktemp("data")/"d", "smoke", classes=["gear", "tile"])

def damage(root, how):
    mask = next(root.glob("gear/ground_truth/*/*.png"))
    if how == "no folder": return root/"nowhere"
    if how == "no train/good": shutil.rmtree(root/"gear"/"train")
    if how == "no mask": mask.unlink()
    if how == "mask size":
        from PIL import Image
        Image.new("L", (5, 5)).save(mask)
    if how == "unreadable": (root/"gear/train/good/000.png").write_bytes(b"x")
    return root

@pytest.mark.parametrize("how,said", [("no folder", "nowhere"), ("no train/good", "gear/train/good"), ("no mask", "_mask.png"), ("mask size", "5x5"), ("unreadable", "gear/train/good/000.png"),
    ("--detector=mddnett", "Did you mean 'mddnet'"), ("--option=protos=3", "unknown option of rd4ad 'protos'"), ("--option=protos", "name=value"), ("--backbone=resnet81", "resnet18"),
    ("--classes=geer", "Did you mean 'gear'"), ("--weights=nowhere.pth", "nowhere.pth"), ("--size=72", "multiple of 16"), ("--size=large", "size='large'"), ("--device=cuda:99", "no device"), ("--precision=half", "bfloat16"), ("--layers=7", "strides")])
def test_bad_input(cli, data, tmp_path, how, said):
    root = tmp_path/"d"; shutil.copytree(data, root)
    extra = [how] if how.startswith("--") else []
    code, out, err = cli(*RUN, "--data", root if extra else damage(root, how), *extra, "--out", tmp_path/"out")
    lines = [l for l in err.splitlines() if l.startswith("error:")]
    assert code == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err + out, err
    assert not list((tmp_path/"out").rglob("*.*")), "something half-written"

def test_weights_that_do_not_fit(cli, data, tmp_path):
    import torch
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path/"w.pth")
    code, _, err = cli(*RUN, "--data", data, "--weights", tmp_path/"w.pth", "--out", tmp_path/"out")
    assert code == 2 and "conv1.weight" in err and "w.pth" in err and "Traceback" not in err

@pytest.mark.parametrize("args", [["sweep", "benchmrk"], ["sweep", "benchmark", "-p", "epoch=1"], ["sweep", "benchmark", "-p", "epochs"], ["sweep", "benchmark", "-p", "detector=rd4ad,mddnett"]])
def test_bad_studies(cli, tmp_path, args):
    code, out, err = cli(*args, "--out", tmp_path/"out")
    assert code == 2 and err.strip().splitlines()[-1].startswith("error:") and "Traceback" not in err and not (tmp_path/"out").exists()

def test_the_installed_command_ends_with_one_line_and_code_2(shell):
    code, out, err = shell("run", "--detector", "mddnett")
    assert code == 2 and err.startswith("error: unknown detector 'mddnett'") and err.count("\n") == 1 and not out

def test_run_prints_the_record(cli, data, tmp_path):
    code, out, err = cli(*RUN, "--data", data, "--out", tmp_path/"out", "--backbone", "resnet18", "--weights", "random")
    assert code == 0 and "AUPRO" in out and "RANDOM" in out and (tmp_path/"out"/"runs").is_dir(), err
    folder = Path(out.split("record: ")[1].strip())
    assert (folder/"record.json").is_file()

def test_datasets(cli, data):
    code, out, _ = cli("datasets", data)
    assert code == 0 and "gear" in out and re.search("fingerprint [0-9a-f]{16}", out)

def test_detectors_and_help(cli):
    assert "--option prototypes=32" in cli("detectors")[1]
    for args in ([], ["run"], ["sweep"], ["datasets"], ["detectors"]): code, out, _ = cli(*args, "--help"); assert code == 0 and "Usage" in out
    assert re.match(r"\d+\.\d+", cli("--version")[1])

def test_plain_sweep_goes_on_after_a_failure_and_skips_what_is_done(shell, data, tmp_path):
    args = ["sweep", "benchmark", "--plain", "-p", f"data={data}", "-p", "detector=rd4ad", "-p", "size=72,64", "-p", "layers=1,2", "-p", "epochs=1", "-p", "seed=0", "--out", tmp_path]
    code, out, err = shell(*args)
    assert code == 1 and "FAILED rd4ad" in err and "multiple of 16" in err and "1 records" in out
    [record] = tmp_path.glob("benchmark/runs/*/record.json"); before = record.stat().st_mtime_ns
    assert shell(*args)[0] == 1 and record.stat().st_mtime_ns == before

def test_sweep_by_papermill(shell, tmp_path):
    "The demo's way, at smoke size: records with their notebooks, tables, pictures, the executed study."
    small = [x for k, v in SMALL.items() for x in ("-p", f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}")]
    code, out, err = shell("sweep", "benchmark", *small, "-p", "seed=0", "-p", "detector=rd4ad,patchcore", "--out", tmp_path)
    folder = tmp_path/"benchmark"
    assert code == 0, err
    assert {p.name for p in folder.iterdir()} == {"benchmark.ipynb", "benchmark.md", "benchmark.csv", "benchmark_per_class.md", "benchmark_per_class.csv", "benchmark_cost.csv", "benchmark_bars.png", "benchmark_maps.png", "runs"}
    assert len(list(folder.glob("runs/*/run.ipynb"))) == 2 and not list(folder.rglob("*.part*"))
    assert "| rd4ad |" in out and "weights procedural" in out and "RANDOM" not in out and str(folder/"benchmark_bars.png") in out
    assert "1/2" in err and "2/2" in err
    for name in ("samples.npz", "history.csv", "run.ipynb"):                       # as in a clone: version control keeps records and scores
        for p in folder.glob(f"runs/*/{name}"): p.unlink()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/record.json")}
    code, out, err = shell("sweep", "benchmark", *small, "-p", "seed=0", "-p", "detector=rd4ad,patchcore", "--out", tmp_path)
    assert code == 0 and "| rd4ad |" in out and {p: p.stat().st_mtime_ns for p in before} == before, err
