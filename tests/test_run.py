"One spec, one record: the same bits again, other bits for another seed, nothing half-made."
import json, os, signal, subprocess, sys, time
from dataclasses import replace
import numpy as np
import pytest, torch
from safetensors.torch import load_file
from mdd_bench.detectors.detector import detector_class
from mdd_bench.errors import DataError, SpecError, TrainingError
from mdd_bench.running.run import epochs_of, prepare, run, sample_rows
from mdd_bench.running.spec import make_spec
from mdd_bench.running.store import Store
from mdd_bench.running.sweep import flags
from conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM", "ignore::mdd_bench.evaluation.metrics.UndefinedMetric")
KEYS = ["I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO", "mAD", "I-FPR95", "P-FPR95", "P-FPR95-good"]

@pytest.fixture(scope="module", params=["rd4ad", "mddnet"])
def made(request, tmp_path_factory):
    spec = make_spec(**SMALL, detector=request.param)
    return spec, run(spec, tmp_path_factory.mktemp("a"), keep_model=True)

def test_same_spec_same_bits(made, tmp_path):
    spec, first = made
    again = run(spec, tmp_path, keep_model=True, store_gb=0)         # computed features instead of stored ones
    assert again.id == first.id and again.metrics == first.metrics and first.cost["features"] == "stored" and again.cost["features"] == "computed"
    assert (again.folder/"scores.csv").read_bytes() == (first.folder/"scores.csv").read_bytes()
    a, b = (load_file(r.folder/"model.safetensors") for r in (first, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_another_seed_other_bits(made, tmp_path):
    spec, first = made
    other = run(replace(spec, seed=1), tmp_path)
    assert other.id != first.id and (other.folder/"scores.csv").read_bytes() != (first.folder/"scores.csv").read_bytes()

def test_a_record_says_everything(made):
    spec, r = made
    assert list(r.metrics["exact"]["mean"]) == KEYS and set(r.metrics["exact"]["per_class"]) == set(r.spec["classes"])
    assert all(set(k) and list(next(iter(k.values()))) == KEYS for k in r.metrics["exact"]["per_kind"].values())
    hand = np.mean([m["P-AP"] for m in r.metrics["exact"]["per_class"].values()])
    assert r.metrics["exact"]["mean"]["P-AP"] == pytest.approx(hand, abs=1e-12)
    s, samples = r.scores(), r.samples()
    assert len(s) == len(prepare(spec).catalog.part(split="test")) and set(s.columns) >= {"path", "cls", "kind", "label", "score"} and (s.label == (s.kind != "good")).all()
    assert samples["maps"].dtype == np.float16 and len(samples["maps"]) == len(samples["paths"]) and not any(os.path.isabs(p) for p in samples["paths"])
    assert {"train_s", "test_s", "ms_per_image", "parameters_trained", "bytes_test", "peak_memory_mb"} <= set(r.cost) and r.cost["bytes_test"] > r.cost["bytes_test_without_backbone"] > 0
    assert {"seed", "versions", "threads", "data_fingerprint", "split_hashes", "weights_hash", "altered", "started"} <= set(r.provenance)
    assert len(r.history()) == 1 and np.isfinite(r.history().loss).all() and not (r.folder/"checkpoint.pt").exists()
    json.loads((r.folder/"record.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))

def test_a_record_answers_the_second_time(made, monkeypatch):
    spec, first = made
    monkeypatch.setattr("mdd_bench.running.run._train_and_test", lambda *a: pytest.fail("ran again"))
    assert run(spec, first.folder.parents[1]).id == first.id

def test_identity_is_content_not_names(made, tmp_path):
    spec = made[0]
    from mdd_bench.data.synthetic import write_embedded
    copy = write_embedded(tmp_path/"elsewhere", "smoke")
    assert prepare(replace(spec, data=str(copy))).id == prepare(spec).id
    assert prepare(replace(spec, protocols=["exact"], skip_broken=True)).id == prepare(spec).id
    assert len({prepare(replace(spec, **v)).id for v in (dict(size=96), dict(epochs=2), dict(batch=8), dict(precision="bfloat16"), dict(layers=[1, 2, 3]), dict(classes=["gear"]))} | {prepare(spec).id}) == 7

def test_a_changed_folder_is_noticed_in_the_same_process(tmp_path):
    from mdd_bench.data.synthetic import write_embedded
    root = write_embedded(tmp_path/"d", "smoke", classes=["gear"]); spec = make_spec(**SMALL | dict(data=str(root), classes=None), detector="rd4ad")
    before = prepare(spec).id
    (root/"gear/train/good/003.png").unlink()
    assert prepare(spec).id != before

def test_samples_follow_from_the_data_alone():
    table = prepare(make_spec(**SMALL, detector="rd4ad")).catalog.part(cls="gear", split="test")
    keep = sample_rows(table)
    assert keep == sample_rows(table) and table.kind[keep[0]] == "good" and len(set(table.kind[keep])) == len(keep) == 4

def test_a_loss_that_explodes_stops_the_run_and_leaves_nothing(tmp_path, monkeypatch):
    import mdd_bench.detectors.rd4ad as rd4ad
    real = rd4ad.RD4AD.losses
    monkeypatch.setattr(rd4ad.RD4AD, "losses", lambda self, b: {k: v*float("nan") for k, v in real(self, b).items()})
    with pytest.raises(TrainingError, match="'distillation' is nan at epoch 0, step 0"): run(make_spec(**SMALL, detector="rd4ad"), tmp_path)
    assert not list((tmp_path/"runs").iterdir())

def test_a_size_that_does_not_fit_leaves_nothing(tmp_path):
    with pytest.raises(SpecError, match="multiple of 16"): run(make_spec(**SMALL | dict(size=72), detector="rd4ad"), tmp_path)
    assert not list((tmp_path/"runs").iterdir())

def test_a_class_without_good_test_images_is_nan_and_says_so(tmp_path):
    import shutil
    from mdd_bench.data.synthetic import write_embedded
    from mdd_bench.evaluation.metrics import UndefinedMetric
    root = write_embedded(tmp_path/"d", "smoke", classes=["gear", "tile"]); shutil.rmtree(root/"gear"/"test"/"good")
    with pytest.warns(UndefinedMetric): r = run(make_spec(**SMALL | dict(data=str(root)), detector="rd4ad"), tmp_path/"out")
    assert np.isnan(r.metrics["exact"]["per_class"]["gear"]["I-AUROC"]) and np.isnan(r.metrics["exact"]["mean"]["I-AUROC"]) and r.metrics["exact"]["per_class"]["tile"]["I-AUROC"] >= 0
    assert np.isnan(Store(tmp_path/"out").load(r.id).metrics["exact"]["mean"]["I-AUROC"])

def test_a_class_without_test_images_is_refused(tmp_path):
    import shutil
    from mdd_bench.data.synthetic import write_embedded
    root = write_embedded(tmp_path/"d", "smoke", classes=["gear", "tile"]); shutil.rmtree(root/"gear"/"test")
    with pytest.raises(DataError, match="'gear'.*no test images"): prepare(make_spec(**SMALL | dict(data=str(root)), detector="rd4ad"))

def test_skipped_images_are_recorded(tmp_path):
    from mdd_bench.data.synthetic import write_embedded
    root = write_embedded(tmp_path/"d", "smoke", classes=["gear", "tile"]); (root/"gear/train/good/001.png").write_bytes(b"x")
    r = run(make_spec(**SMALL | dict(data=str(root), skip_broken=True), detector="rd4ad"), tmp_path/"out")
    assert r.provenance["altered"]["images_skipped"] == 1

@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_is_run_again(tmp_path, signal_):
    "A run that dies in training leaves no record; the next attempt makes the record of an unbroken run."
    spec = make_spec(**SMALL | dict(epochs=40), detector="rd4ad")
    args = [sys.executable, "-c", "from mdd_bench.cli import main; main()", "run", *flags(spec), "--out", str(tmp_path)]
    child = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a shell's background jobs ignore it
    while not list(tmp_path.glob("runs/*/history.csv")) and child.poll() is None: time.sleep(.02)
    child.send_signal(signal_); assert child.wait() != 0
    assert not list(tmp_path.glob("runs/*/record.json"))
    if signal_ == signal.SIGINT: assert not list((tmp_path/"runs").iterdir())
    again, whole = run(spec, tmp_path), run(spec, tmp_path/"unbroken")
    assert again.metrics == whole.metrics and again.history().equals(whole.history()) and len(again.history()) == 40

def test_real_images(real, real_weights, tmp_path):
    "Two real classes, real weights, at a size that takes seconds: far from chance after two epochs."
    r = run(make_spec(data=str(real), classes="cookie,hazelnut_toy", backbone="resnet18", weights=str(real_weights), detector="rd4ad", size=64, epochs=4, batch=8), tmp_path)
    assert r.metrics["exact"]["mean"]["I-AUROC"] > .6 and r.spec["classes"] == ["cookie", "hazelnut_toy"]

@pytest.mark.parametrize("detector, asked, epochs", [("rd4ad", "10%", 10), ("uniad", "10%", 100), ("patchcore", "10%", 0), ("patchcore", 5, 0), ("rd4ad", "0.1%", 1), ("rd4ad", "200%", 200), ("rd4ad", 7, 7), ("uniad", None, 1000)])
def test_epochs_may_be_a_share_of_the_recipe(detector, asked, epochs): assert epochs_of(detector_class(detector).recipe, make_spec(epochs=asked).epochs) == epochs

def test_a_share_and_its_number_are_one_run(): assert prepare(make_spec(**SMALL | dict(detector="rd4ad", epochs="3%"))).id == prepare(make_spec(**SMALL | dict(detector="rd4ad", epochs=3))).id

@pytest.mark.parametrize("asked", ["0%", "-1%", "x%", "%", "nan%", "1.5", -1])
def test_epochs_that_are_none(asked):
    with pytest.raises(SpecError, match="epochs"): make_spec(epochs=asked)

def test_a_detector_brings_its_own_backbone_and_levels():
    "Where the run names none; naming them is the same run."
    own = prepare(make_spec(**SMALL | dict(detector="uniad", weights="random", backbone=None, layers=None)))
    assert own.backbone.name == "efficientnet_b4" and own.backbone.strides == [2, 4, 8, 16] and own.canonical["backbone"] == "efficientnet_b4"
    assert own.id == prepare(make_spec(**SMALL | dict(detector="uniad", weights="random", backbone="efficientnet_b4", layers=[0, 1, 2, 3]))).id
