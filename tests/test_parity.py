"""The parity study: ours beside anomalib's.

A peer may be absent, may fail, and may answer anything; what a stand-in answers is scored as ours is.
"""
import json, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from mdd_bench import Runtime, make_spec, run
from mdd_bench.data.images import Framing, load_image
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import build_pyramid
from mdd_bench.running.identity import resolve
from mdd_bench.running.reuse import predict_maps
from mdd_bench.running.store import Store
from mdd_bench.running.study import load_study, study_path
from mdd_bench.running.sweep import execute_study, sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")
DATA = dict(data="embedded-v1-smoke", size=64, backbone="resnet18", weights="random", batch=8)
SMOKE = DATA | dict(classes="gear,tile", detector="patchcore", ratio=.05, seed="0")
METRICS = ["I-AUROC", "P-AUROC", "P-AP", "AUPRO", "mAD"]
PEERS = ROOT/".venv-peers"/"bin"/"python"
PLAIN = Runtime(cache_gb=0)

FAKE = """#!{python}
import json, shutil, sys
import numpy as np

script, detector, given, target = sys.argv[1:5]
options = dict(zip(sys.argv[5::2], sys.argv[6::2]))
with open({log!r}, "a") as log: log.write(detector + " " + options["--seed"] + "\\n")
z = np.load(given)
assert z["train"].dtype == np.uint8
assert z["train"].shape[1:] == z["test"].shape[1:] == (3, 64, 64)
assert "backbone.layer1.0.conv1.weight" in z
{body}
steps = {steps} if detector == "rd4ad" else 0
report = dict(train_s=2., test_s=1., steps=steps, keeps="7 things", versions=dict(anomalib="9.9"))
print(json.dumps(report))
"""

@pytest.fixture
def fake(tmp_path, monkeypatch):
    "A peer that does `body`, which must write the file `target`; gives the file that lists its calls."
    def make(body, steps=0):
        peer, log = tmp_path/"python", tmp_path/"calls"
        peer.write_text(FAKE.format(python=sys.executable, log=str(log), body=body, steps=steps))
        peer.chmod(0o755)
        monkeypatch.setenv("MDD_BENCH_PEERS", str(peer))
        return log
    return make

def execute(out, **changes):
    "The CSV and the Markdown of the study."
    execute_study(load_study("parity", **SMOKE | changes), out)
    return pd.read_csv(out/"parity.csv"), (out/"parity.md").read_text()

def rows_of(table, by, detector="patchcore"):
    return table[(table.detector == detector) & (table.by == by)]

def first_row(table, by, detector="patchcore"):
    rows = rows_of(table, by, detector)
    return rows[rows.seed == 0].iloc[0]

def pixels(root, paths):
    "Images as the peer is given them."
    return np.stack([load_image(root/path, Framing(64)).transpose(2, 0, 1) for path in paths])

def all_maps(spec, out):
    return np.concatenate([c.maps for c in predict_maps(spec, out, PLAIN)])

# ---- parameters

def test_parameters_are_the_studys_own_and_typed(tmp_path):
    study = load_study("parity", seed="3,4", ratio="0.25", detector="rd4ad")
    expected = dict(seed=[3, 4], ratio=.25, detector=["rd4ad"], size=128)
    assert study.question and study.specs() == []
    assert {name: study.parameters[name] for name in expected} == expected
    assert sweep(load_study("parity"), tmp_path).records == []

@pytest.mark.parametrize("wrong, message", [
    (dict(sized=3), "Did you mean 'size'"),
    (dict(epochs="many"), "epochs='many' does not fit"),
    (dict(ratio="half"), "ratio='half' does not fit"),
    (dict(seed="a,b"), "seed='a,b' does not fit"),
])
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises(SpecError, match=message): load_study("parity", **wrong)

@pytest.mark.parametrize("wrong, message", [
    (dict(size=48), "size=48. give a multiple of 32"),
    pytest.param(dict(detector="mddnet"), "unknown detector to compare 'mddnet'", marks=pytest.mark.slow),
    pytest.param(dict(epochs=0), "epochs=0. give at least 1", marks=pytest.mark.slow),
    pytest.param(dict(ratio=2), "coreset_ratio=2", marks=pytest.mark.slow),
    pytest.param(dict(classes="gear,bolt"), "bolt", marks=pytest.mark.slow),
])
def test_bad_parameters_stop_it_before_the_first_run(wrong, message, tmp_path):
    with pytest.raises(SpecError, match="the notebook of the study parity failed") as error:
        execute(tmp_path/"out", **wrong)
    assert message in str(error.value)
    assert not (tmp_path/"out"/"runs").exists()

# ---- the peer is absent, or a stand-in

def test_without_peers_ours_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_PEERS", str(tmp_path/"nowhere"))
    table, md = execute(tmp_path/"out", seed="0,1")
    assert list(table.by) == ["mdd_bench"]*2
    assert "| patchcore | anomalib: not installed | - |" in md
    assert "difference" not in md.split("\n\n")[1] and str(tmp_path) not in md
    files = {path.name for path in (tmp_path/"out").iterdir()}
    assert {"parity.csv", "parity.ipynb", "parity.md", "parity.png"} <= files and "peers" not in files

    row = first_row(table, "mdd_bench")
    record = Store(tmp_path/"out").load(row.id)
    assert record.spec["classes"] == ["gear", "tile"]
    assert row[METRICS].tolist() == [record.metrics["exact"]["mean"][name] for name in METRICS]

@pytest.mark.slow
def test_our_own_maps_from_a_peer_get_our_own_numbers(tmp_path, fake):
    "The peer is given the loader's pixels; what it gives is scored like a record, and it is asked once."
    spec = make_spec(**DATA, classes="gear,tile", detector="patchcore", options=dict(coreset_ratio=.05))
    ours = run(spec, tmp_path/"kept", PLAIN, keep_model=True)
    copied, seen, out = tmp_path/"ours.npz", tmp_path/"seen.npz", tmp_path/"out"
    np.savez(copied, maps=all_maps(spec, tmp_path/"kept"), scores=ours.scores().score.to_numpy())
    keep = f"np.savez({str(seen)!r}, train=z['train'], test=z['test'])"
    calls = fake(f"{keep}\nshutil.copy({str(copied)!r}, target)")
    table, md = execute(out)

    expected = [ours.metrics["exact"]["mean"][name] for name in METRICS]
    np.testing.assert_allclose(first_row(table, "anomalib")[METRICS].astype(float), expected, rtol=1e-12)
    no_difference = "| patchcore | difference | " + " | ".join(["+0.0"]*5) + " | - | - | - |"
    assert no_difference in md.replace("-0.0", "+0.0")
    assert "| 2 | 1 | 7 things |" in md and "anomalib 9.9" in md

    catalog = resolve(spec).dataset.catalog
    with np.load(seen) as given:
        assert np.array_equal(given["train"], pixels(catalog.root, catalog.part(split="train").path))
        assert np.array_equal(given["test"], pixels(catalog.root, ours.scores().path))

    more, _ = execute(out, seed="0,1")
    assert calls.read_text() == "patchcore 0\npatchcore 1\n"
    for by in ("mdd_bench", "anomalib"): assert first_row(more, by).equals(first_row(table, by))
    left = [path for path in out.rglob("*") if path.suffix in (".npz", ".part")]
    assert all(path.parent.parent.name == "runs" for path in left)

@pytest.mark.slow
def test_a_mean_a_deviation_and_a_difference(tmp_path, fake):
    "Two detectors, two seeds, a peer that guesses."
    guess = """
rng, n = np.random.default_rng(int(options["--seed"])), len(z["test"])
guesses = dict(maps=rng.random((n, 64, 64)).astype(np.float32))
if detector == "patchcore": guesses["scores"] = rng.random(n)
np.savez(target, **guesses)
"""
    fake(guess, steps='int(options["--epochs"])*-(-len(z["train"])//8)')
    table, md = execute(tmp_path/"out", seed="0,1", detector="rd4ad,patchcore", epochs=2)
    for name in ("rd4ad", "patchcore"):
        ours, theirs = (100*rows_of(table, by, name)["P-AUROC"] for by in ("mdd_bench", "anomalib"))
        assert len(ours) == len(theirs) == 2 and theirs.std() > 0
        difference, error = ours.mean() - theirs.mean(), np.sqrt(ours.std()**2/2 + theirs.std()**2/2)
        assert f"{difference:+.1f} ± {error:.1f}" in md
        assert f"{theirs.mean():.1f} ± {theirs.std():.1f}" in md
    assert "rd4ad: 2 steps on both sides, lr 0.005, x 0.1 after 80% of the epochs" in md
    assert "patchcore: 0 steps" not in md and md.count(" of the epochs") == 1

@pytest.mark.slow
def test_a_peer_that_fails_is_asked_again(tmp_path, fake):
    calls = fake("raise RuntimeError('no such layer | at all')")
    for times in (1, 2):
        _, md = execute(tmp_path/"out")
        assert "| patchcore | anomalib: RuntimeError: no such layer / at all | - |" in md
        assert len(calls.read_text().splitlines()) == times

@pytest.mark.slow
def test_a_peer_is_asked_again_for_other_arguments(tmp_path, fake):
    calls = fake("np.savez(target, maps=np.random.rand(len(z['test']), 64, 64).astype(np.float32))")
    for times, ratio in enumerate((.05, .01, .05)):
        execute(tmp_path/"out", ratio=ratio)
        assert len(calls.read_text().splitlines()) == min(times + 1, 2)

@pytest.mark.slow
def test_other_steps_are_no_comparison(tmp_path, fake):
    fake("np.savez(target, maps=np.zeros((len(z['test']), 64, 64), np.float32))", steps=999)
    with pytest.raises(SpecError, match="anomalib took 999 steps"):
        execute(tmp_path/"out", detector="rd4ad", epochs=1)

# ---- anomalib itself

installed = pytest.mark.skipif(not PEERS.is_file(), reason="anomalib is not installed (make peers)")

def centres(maps):
    "The means around the centres of 8 x 8 patches, where bilinear values are nearly the own ones."
    return maps.reshape(-1, 8, 8, 8, 8)[:, :, 3:5, :, 3:5].mean((2, 4))

@installed
@pytest.mark.slow
def test_patchcore_is_anomalibs_where_nothing_is_drawn(tmp_path):
    "With all patches kept, scores and maps agree up to half precision and the way maps are enlarged."
    spec = make_spec(**DATA, detector="patchcore", options=dict(coreset_ratio=1))
    ours, resolved = run(spec, tmp_path, PLAIN, keep_model=True), resolve(spec)
    catalog, backbone = resolved.dataset.catalog, resolved.backbone
    pyramid = build_pyramid(backbone.name, backbone.weights, backbone.layers)
    tensors = {f"backbone.{name}": t for name, t in pyramid.state_dict().items()}
    train = pixels(catalog.root, catalog.part(split="train").path)
    test = pixels(catalog.root, ours.scores().path)
    mean, std = backbone.mean.flatten(), backbone.std.flatten()
    np.savez(tmp_path/"in.npz", train=train, test=test, mean=mean, std=std, **tensors)

    files = [tmp_path/"in.npz", tmp_path/"out.npz"]
    command = [PEERS, study_path("peer_maps", ".py"), "patchcore", *files, "--layers", "2,3", "--ratio", "1"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["keeps"] == f"{ours.provenance['bank']['rows']:,} patches"

    with np.load(tmp_path/"out.npz") as arrays: maps, scores = arrays["maps"], arrays["scores"]
    np.testing.assert_allclose(scores, ours.scores().score, rtol=1e-2)
    blocks = maps.reshape(-1, 8, 8, 8, 8)
    assert (blocks == blocks[:, :, :1, :, :1]).all()      # the distance of each patch, not blurred
    correlation = np.corrcoef(centres(maps).ravel(), centres(all_maps(spec, tmp_path)).ravel())[0, 1]
    assert correlation > .99

@installed
@pytest.mark.slow
def test_the_real_peer_is_within_a_few_points(tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_PEERS", str(PEERS))
    table, md = execute(tmp_path/"out", classes="", detector="rd4ad,patchcore", ratio=1, epochs=1)
    ours, theirs = first_row(table, "mdd_bench"), first_row(table, "anomalib")
    assert ours["keeps"] == theirs["keeps"]
    assert all(abs(ours[name] - theirs[name]) < .05 for name in METRICS)
    ours, theirs = first_row(table, "mdd_bench", "rd4ad"), first_row(table, "anomalib", "rd4ad")
    assert ours["keeps"] == theirs["keeps"] and "weights" in ours["keeps"]    # as many weights are trained
    assert "rd4ad: 3 steps on both sides" in md
