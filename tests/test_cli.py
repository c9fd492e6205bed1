"""The command line as people meet it.

Bad input is one line and exit code 2 with nothing half-written; sweeps skip what is done, go on after a
failure and say what failed; a detector of one's own needs no edit of the package."""
import re, shutil
from pathlib import Path
from types import SimpleNamespace
import pytest
from PIL import Image
from mdd_bench.data.synthetic import write_embedded
from mdd_bench.detectors import detector as registry
from mdd_bench.detectors.detector import create_detector, detector_class, list_detectors
from mdd_bench.errors import SpecError
from mdd_bench.running.identity import resolve
from mdd_bench.running.spec import spec_options
from mdd_bench.running.store import Store
from mdd_bench.running.study import list_studies, load_study
from conftest import run_flags, small_spec, sweep_flags

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*RANDOM", "ignore::mdd_bench.evaluation.metrics.UndefinedMetric"
)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_embedded(tmp_path_factory.mktemp("data")/"d", "smoke", classes=["gear", "tile"])

@pytest.fixture
def copy(data, tmp_path): return shutil.copytree(data, tmp_path/"d")

def error_line(printed):
    "The one line in which an error is told; fails where there is none, or a traceback."
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in printed, printed
    return lines[0]

def one_record(out):
    "The only record below a results folder."
    [record] = Store(out).records()
    return record

# --- bad data

def no_folder(root): shutil.rmtree(root)
def no_training_images(root): shutil.rmtree(root/"gear"/"train")
def no_mask(root): next(root.glob("gear/ground_truth/*/*.png")).unlink()
def mask_of_another_size(root): Image.new("L", (5, 5)).save(next(root.glob("gear/ground_truth/*/*.png")))
def unreadable_image(root): (root/"gear"/"train"/"good"/"000.png").write_bytes(b"x")

@pytest.mark.parametrize("damage, culprit", [
    (no_folder, "/d"),
    (no_training_images, "has no train images"),
    (no_mask, "<stem>_mask"),
    (mask_of_another_size, "5x5"),
    (unreadable_image, "gear/train/good/000.png"),
])
def test_bad_data(cli, copy, tmp_path, damage, culprit):
    damage(copy)
    code, _, err = cli("run", *run_flags(data=copy), "--out", tmp_path/"out")
    assert code == 2 and culprit in error_line(err)
    left = [path for path in (tmp_path/"out").rglob("*") if path.is_file() and ".locks" not in path.parts]
    assert not left, "something half-written"

# --- bad flags

@pytest.mark.parametrize("flag, message", [
    ("--detector=mddnett", "Did you mean 'mddnet'"),
    ("--option=protos=3", "unknown option of rd4ad 'protos'"),
    ("--option=protos", "name=value"),
    ("--backbone=resnet81", "resnet18"),
    ("--classes=geer", "Did you mean 'gear'"),
    ("--weights=nowhere.pth", "nowhere.pth"),
    ("--size=72", "multiple of 16"),
    ("--size=large", "size='large'"),
    ("--device=cuda:99", "no device"),
    ("--precision=half", "bfloat16"),
    ("--layers=7", "strides"),
    ("--protocols=exakt", "Did you mean 'exact'"),
    ("--calibration=1", "above 0 and below 1"),
    ("--manifest=nowhere.json", "nowhere.json"),
])
def test_bad_flags(cli, data, tmp_path, flag, message):
    code, _, err = cli("run", *run_flags(data=data), flag, "--out", tmp_path/"out")
    assert code == 2 and message in error_line(err)
    left = [path for path in (tmp_path/"out").rglob("*") if path.is_file() and ".locks" not in path.parts]
    assert not left, "something half-written"

def test_weights_that_do_not_fit(cli, data, tmp_path):
    import torch
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path/"w.pth")
    code, _, err = cli("run", *run_flags(data=data, weights=tmp_path/"w.pth"), "--out", tmp_path/"out")
    line = error_line(err)
    assert code == 2 and "conv1.weight" in line and "w.pth" in line

@pytest.mark.parametrize("args, culprit", [
    (["run", "--nosuch", "3"], "--nosuch"),
    (["rnu"], "rnu"),
    (["run", "--size"], "--size"),
    (["sweep"], "study"),
    (["sweep", "benchmark", "--workers", "-1"], "workers"),
    (["run", "--workers", "many"], "workers"),
])
def test_misused_commands(cli, args, culprit):
    "A misspelt flag, a missing argument, a wrong type: an explanation and exit code 2, no traceback."
    code, out, err = cli(*args)
    assert code == 2 and culprit in (out + err).lower() and "Traceback" not in out + err

def test_the_installed_command_ends_with_one_line_and_code_2(shell):
    code, out, err = shell("run", "--detector", "mddnett")
    assert code == 2 and not out
    assert err.startswith("error: unknown detector 'mddnett'") and err.count("\n") == 1

# --- one run

def test_run_prints_the_record(cli, data, tmp_path):
    flags = run_flags(data=data, backbone="resnet18", weights="random")
    code, out, err = cli("run", *flags, "--out", tmp_path/"out")
    assert code == 0, err
    assert "AUPRO" in out and "RANDOM" in out
    assert Path(out.split("record: ")[1].strip()) == one_record(tmp_path/"out").folder

def test_run_shows_a_record_that_is_there(cli, kept_run, monkeypatch):
    _, record, out_folder = kept_run("rd4ad")
    def fail(*args, **kwargs): pytest.fail("ran again")
    monkeypatch.setattr("mdd_bench.running.run.fit_and_test", fail)
    code, out, _ = cli("run", *run_flags(), "--out", out_folder)
    mad = 100*record.metrics["exact"]["mean"]["mAD"]
    assert code == 0 and f"mAD {mad:.1f}" in out and str(record.folder) in out

# --- looking around

def test_datasets(cli, data):
    code, out, _ = cli("datasets", data)
    assert code == 0 and "gear" in out and re.search("fingerprint [0-9a-f]{16}", out)

def test_detectors_are_listed_with_their_options(cli):
    code, out, _ = cli("detectors")
    assert code == 0 and "--option prototypes=32" in out
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == list_detectors()
    assert cli("detectors", "rd*")[1].split()[0] == "rd4ad"

def test_protocols_are_listed(cli):
    from mdd_bench.evaluation.protocols import PROTOCOLS
    out = cli("protocols")[1]
    assert [line.split()[0] for line in out.splitlines()] == list(PROTOCOLS)
    assert all(len(line.split()) > 3 for line in out.splitlines())

@pytest.mark.parametrize("name", list_studies())
def test_every_study_is_listed_with_its_question_and_runs(cli, name):
    code, out, _ = cli("studies")
    lines, study = out.splitlines(), load_study(name)
    heads = [i for i, line in enumerate(lines) if not line.startswith(" ")] + [len(lines)]
    paragraphs = {lines[i].split()[0]: lines[i:j] for i, j in zip(heads, heads[1:])}
    own = paragraphs[name]
    assert code == 0 and list(paragraphs) == list_studies()
    assert study.question.strip().endswith("?") and study.question in own[0]
    if study.parameters: assert all(f"{parameter}=" in own[-1] for parameter in study.parameters)
    else: assert own[-1].strip() == f"{len(study.specs())} runs"

def test_studies_by_pattern(cli):
    assert cli("studies", "mem*")[1].startswith("memory ") and cli("studies", "nosuch*")[1] == ""

def test_help(cli):
    commands = "run", "sweep", "make", "datasets", "detectors", "studies", "labels", "pretrain"
    for args in ([], *([command] for command in commands)):
        code, out, _ = cli(*args, "--help")
        assert code == 0 and "Usage" in out
    assert re.match(r"\d+\.\d+", cli("--version")[1])

@pytest.fixture
def run_help(shell, monkeypatch):
    "{heading: {flag: its line}} of the help of `run`."
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setenv("TERMINAL_WIDTH", "220")
    code, out, _ = shell("run", "--help")
    assert code == 0
    groups, heading = {}, None
    for line in out.splitlines():
        if line.startswith("╭"): groups[heading := line.strip("╭─╮ ")] = {}
        flag = re.search(r"--[\w-]+", line)
        if flag and heading: groups[heading][flag.group()] = line
    return groups

def flag_of(declared):
    return "--option" if declared.type is dict else "--" + declared.name.replace("_", "-")

def test_the_help_of_run_is_in_groups(run_help):
    headings = ["Detector", "Data", "Features", "Training", "Labels", "Scoring"]
    assert [h for h in run_help if h in headings] == headings
    for declared in spec_options().values(): assert flag_of(declared) in run_help[declared.group]
    assert {"--device", "--workers", "--cache-gb"} <= run_help["Runtime"].keys()
    assert {"--out", "--keep-model"} <= run_help["Results"].keys()

@pytest.mark.parametrize("group, flag, words", [
    ("Data", "--size", "INTEGER .*at least 16.*default: 256"),
    ("Data", "--classes", "A,B,.*none: all"),
    ("Data", "--calibration", "NUMBER"),
    ("Features", "--layers", "A,B,"),
    ("Labels", "--scheme", "pooled, per_kind, one_kind, from_classes"),
    ("Detector", "--detector", "TEXT.*path/to/file.py:Class.*default: mddnet"),
    ("Detector", "--option", "NAME=VALUE.*may be repeated"),
    ("Training", "--epochs", "N or N%"),
    ("Training", "--steps", "N or converged"),
    ("Training", "--precision", "float32, bfloat16"),
    ("Scoring", "--protocols", "A,B,.*default: exact"),
])
def test_the_help_of_run_names_types(run_help, group, flag, words):
    assert re.search(words, run_help[group][flag])

# --- sweeps

@pytest.mark.parametrize("args, culprit", [
    (["benchmrk"], "Did you mean 'benchmark'"),
    (["benchmark", "-p", "epoch=1"], "Did you mean 'epochs'"),
    (["benchmark", "-p", "epochs"], "name=value"),
    (["benchmark", "-p", "seed=0", "-p", "seed=1"], "-p seed is given twice. write -p seed=0,1"),
    (["benchmrk", "--jobs", "2", "--scheduler", "tcp://nowhere:1"], "jobs with a scheduler"),
    (["benchmark", "--jobs", "2", "--scheduler", "tcp://nowhere:1", "--dry-run"], "jobs with a scheduler"),
    (["benchmark", "-p", "detector=rd4ad,mddnett"], "Did you mean 'mddnet'"),
    (["benchmark", "-p", "size=64,large"], "size='large'"),
    (["benchmark", "-p", "arms=a"], "'arms'"),
    (["memory", "-p", "arms=nosuch"], "unknown arm of the study memory 'nosuch'"),
    (["speed", "-p", "maps=many"], "maps='many'"),
    (["speed", "--plain"], "is a notebook only"),
    (["labels", "-p", "detector=rd4ad", "-p", "labelled=5"], "rd4ad cannot learn from labels. give"),
])
def test_bad_studies(cli, tmp_path, args, culprit):
    code, _, err = cli("sweep", *args, "--out", tmp_path/"out")
    assert code == 2 and culprit in error_line(err)
    assert not (tmp_path/"out").exists()

@pytest.mark.parametrize("option, message", [
    ("bank=sideways", "unknown bank 'sideways'. .*normal"),
    ("banks=both", "unknown option of dmad 'banks'. Did you mean 'bank'"),
    ("neighbours=0", "neighbours=0"),
    ("bank=normal,textures=images", "textures='images' cannot be with bank=normal"),
])
def test_a_bad_option_stops_a_sweep_before_anything_is_read(cli, tmp_path, monkeypatch, option, message):
    def fail(*args, **kwargs): pytest.fail("read the data")
    monkeypatch.setattr("mdd_bench.running.sweep.resolve", fail)
    parameters = sweep_flags(detector="dmad", options=option, data="nowhere")
    code, _, err = cli("sweep", "benchmark", *parameters, "--out", tmp_path/"out")
    assert code == 2 and re.search(message, error_line(err))
    assert not list(tmp_path.rglob("runs"))

def test_a_plain_sweep_goes_on_after_a_failure_and_skips_what_is_done(shell, data, tmp_path):
    args = ["sweep", "benchmark", "--plain", *sweep_flags(data=data, size=[72, 64]), "--out", tmp_path]
    code, out, err = shell(*args)
    assert code == 1 and "FAILED rd4ad" in err and "multiple of 16" in err and "1 records" in out
    record = one_record(tmp_path/"benchmark").folder/"record.json"
    before = record.stat().st_mtime_ns
    assert shell(*args)[0] == 1 and record.stat().st_mtime_ns == before

FILES_OF_THE_STUDY = {
    "benchmark.ipynb", "benchmark.md", "benchmark.csv", "benchmark.tex",
    "benchmark_per_class.md", "benchmark_per_class.csv", "benchmark_per_class.tex",
    "benchmark_cost.md", "benchmark_cost.csv", "benchmark_cost.tex",
    "benchmark_effects.md", "benchmark_effects.csv", "benchmark_effects.tex", "benchmark_effects.png",
    "benchmark_bars.png", "benchmark_classes.png", "benchmark_pareto.png", "benchmark_maps.png", "worst",
    "runs",
}

def times_of(folder): return {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/record.json")}

def test_sweep_by_papermill(shell, tmp_path):
    "The demo's way, at smoke size: records with their notebooks, tables, pictures, the executed study."
    args = ["sweep", "benchmark", *sweep_flags(detector=["rd4ad", "patchcore"]), "--out", tmp_path]
    folder = tmp_path/"benchmark"
    code, out, err = shell(*args)
    assert code == 0, err
    assert {p.name for p in folder.iterdir()} == FILES_OF_THE_STUDY
    assert len(list(folder.glob("runs/*/run.ipynb"))) == 2 and not list(folder.rglob("*.part*"))
    assert "| rd4ad † |" in out and "weights lite0" in out and "RANDOM" not in out
    assert str(folder/"benchmark_bars.png") in out
    assert "1/2" in err and "2/2" in err

    for name in ("samples.npz", "replicates.npz", "history.csv", "run.ipynb"):      # as in a clone
        for path in folder.glob(f"runs/*/{name}"): path.unlink()
    before = times_of(folder)
    code, out, err = shell(*args)
    assert code == 0, err
    assert "| rd4ad † |" in out and times_of(folder) == before

# --- a detector in a file

MINE = '''
import torch
from mdd_bench.detectors.detector import Detector, Prediction
from mdd_bench.options import option

class Mine(Detector):
    "How strong the features are."
    gain: float = option(1., least=0, help="of the maps")

    def predict(self, features, size):
        strength = self.gain*features[0].norm(dim=1, keepdim=True)
        return Prediction(torch.nn.functional.interpolate(strength, size)[:, 0])

class NoDetector: pass
'''

@pytest.fixture
def mine(tmp_path):
    "A file with a detector of one's own."
    file = tmp_path/"mine.py"
    file.write_text(MINE)
    return file

def test_a_detector_in_a_file_runs(cli, mine, tmp_path):
    name = f"{mine}:Mine"
    code, _, err = cli("run", *run_flags(detector=name), "--option", "gain=2", "--out", tmp_path/"out")
    assert code == 0, err
    record = one_record(tmp_path/"out")
    assert record.spec["detector"] == name and record.spec["options"] == dict(gain=2.)
    assert record.cost["parameters_trained"] == 0 and len(record.scores()) == 12
    assert record.metrics["exact"]["mean"]["P-AUROC"] > 0

def test_a_path_from_the_current_folder_is_the_same_run(cli, mine, tmp_path):
    for name in (f"{mine}:Mine", "mine.py:Mine"):
        assert cli("run", *run_flags(detector=name), "--out", tmp_path/"out")[0] == 0
    assert one_record(tmp_path/"out").spec["detector"] == f"{mine}:Mine"

def test_a_file_counts_by_its_content(mine, tmp_path):
    elsewhere = tmp_path/"elsewhere.py"
    shutil.copyfile(mine, elsewhere)
    def run_id(file): return resolve(small_spec(detector=f"{file}:Mine")).run_id
    before = run_id(mine)
    assert run_id(elsewhere) == before
    mine.write_text(MINE.replace("self.gain*", "2*self.gain*"))
    assert run_id(mine) != before and run_id(elsewhere) == before

def test_a_detector_in_a_file_has_options(cli, mine, tmp_path):
    def error_of(option):
        code, _, err = cli("run", *run_flags(detector=f"{mine}:Mine"), "--option", option)
        assert code == 2
        return error_line(err)
    assert "unknown option of" in error_of("gian=2") and "Did you mean 'gain'" in error_of("gian=2")
    assert "gain=-1.0. give a number of at least 0" in error_of("gain=-1")

def test_an_option_is_given_once(cli):
    code, _, err = cli("run", *run_flags(detector="dmad"), "--option", "bank=both", "--option", "bank=normal")
    assert code == 2 and "--option bank is given twice. give it once" in error_line(err)

def test_a_detector_in_a_file_can_be_swept(shell, mine, tmp_path):
    parameters = sweep_flags(detector=["mine.py:Mine", "patchcore"])
    code, out, err = shell("sweep", "benchmark", "--plain", *parameters, "--out", tmp_path)
    assert code == 0 and "2 records" in out, err

def test_the_model_of_a_detector_without_weights_can_be_kept(cli, mine, tmp_path):
    "It is not trained again for another protocol, as any other."
    args = ["run", *run_flags(detector=f"{mine}:Mine"), "--out", tmp_path/"out"]
    assert cli(*args, "--keep-model")[0] == 0
    code, out, err = cli(*args, "--protocols", "exact,ader")
    assert code == 0 and "ader:" in out, err

@pytest.mark.parametrize("name, content, message", [
    ("gone.py:Mine", None, "no file .*gone.py. write --detector path/to/file.py:ClassName"),
    ("mine.py:Yours", MINE, "mine.py has no Detector 'Yours'"),
    ("mine.py:NoDetector", MINE, "mine.py has no Detector 'NoDetector'"),
    ("mine.py:", MINE, "mine.py has no Detector ''"),
    ("mine.py", MINE, "unknown detector 'mine.py'"),
    ("mine.py:Mine", "import nosuchmodule", "mine.py cannot be imported .*No module named 'nosuchmodule'"),
    ("mine.py:Mine", "class Mine(", "mine.py cannot be imported .SyntaxError"),
    ("mine.py:Mine", "raise ValueError('a\\nb')", "mine.py cannot be imported .ValueError: a b"),
    ("mine.py:Mine", MINE.replace("of the maps", "").replace("option(1.", "option(-1."), "gain=-1.0"),
])
def test_a_file_that_cannot_be_used(cli, tmp_path, name, content, message):
    if content: (tmp_path/"mine.py").write_text(content)
    code, _, err = cli("run", *run_flags(detector=name), "--out", tmp_path/"out")
    assert code == 2 and re.search(message, error_line(err))
    assert not list((tmp_path/"out").rglob("*.*"))

def test_a_file_with_postponed_annotations(tmp_path):
    "`from __future__ import annotations` makes every annotation a text."
    (tmp_path/"mine.py").write_text("from __future__ import annotations\n" + MINE)
    cls = detector_class(f"{tmp_path}/mine.py:Mine")
    assert cls(None, gain="2").gain == 2.

# --- a detector of an installed package

class EntryPoint(SimpleNamespace):
    "What `importlib.metadata` gives for one line of a package's entry points."
    def load(self):
        if isinstance(self.value, Exception): raise self.value
        return self.value

@pytest.fixture
def packages(monkeypatch):
    "Two installed packages that offer detectors, one of them broken."
    class Theirs(registry.Detector):
        "From another package."
        def predict(self, features, size):
            strength = features[0].norm(dim=1, keepdim=True)
            return registry.Prediction(registry.nn.functional.interpolate(strength, size)[:, 0])

    dist = SimpleNamespace(name="their-package"), SimpleNamespace(name="broken-package")
    group = "mdd_bench.detectors"
    offered = [
        EntryPoint(name="theirs", group=group, value=Theirs, dist=dist[0]),
        EntryPoint(name="broken", group=group, value=ImportError("no module named x"), dist=dist[1]),
        EntryPoint(name="other", group="another.group", value=Theirs, dist=dist[0]),
    ]

    def entry_points(**wanted):
        return [e for e in offered if all(getattr(e, key) == value for key, value in wanted.items())]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    return Theirs

def test_an_entry_point_is_found_and_listed(packages):
    assert detector_class("theirs") is packages and packages.name == "theirs"
    assert "theirs" in list_detectors() and list_detectors("their*") == ["theirs"]
    assert "other" not in list_detectors()
    assert isinstance(create_detector("theirs", None), packages)

def test_an_entry_point_runs(cli, packages, tmp_path):
    code, _, err = cli("run", *run_flags(detector="theirs"), "--out", tmp_path/"out")
    assert code == 0, err
    record = one_record(tmp_path/"out")
    assert record.spec["detector"] == "theirs"
    assert resolve(small_spec(detector="theirs")).identity["detector"] == "theirs"

def test_a_broken_package_is_an_error_when_it_is_asked_for(cli, packages, tmp_path):
    with pytest.raises(SpecError, match="detector 'broken' of the package broken-package cannot be imported"):
        detector_class("broken")
    code, _, err = cli("run", *run_flags(detector="broken"), "--out", tmp_path/"out")
    assert code == 2 and "broken-package" in error_line(err)

def test_a_broken_package_disturbs_nobody_else(packages):
    assert "broken" in list_detectors() and detector_class("rd4ad").name == "rd4ad"
    with pytest.raises(SpecError, match="unknown detector 'mddnett'"): detector_class("mddnett")
    assert list_detectors(needs="labelled") == ["bgad", "dmad", "dmad_released"]

def test_a_broken_package_is_named_in_the_list(cli, packages):
    code, out, err = cli("detectors")
    assert code == 0, err
    assert "rd4ad" in out and "theirs" in out and "broken-package" in out + err
