"The parity study: ours beside anomalib's; a peer may be absent, fail, or answer what it likes, and a stand-in's answer is judged as ours is."
import json, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from mdd_bench.data.loading import load_image
from mdd_bench.errors import SpecError
from mdd_bench.running.run import prepare, run, test_maps as maps_of
from mdd_bench.running.spec import make_spec
from mdd_bench.running.store import Store
from mdd_bench.running.sweep import execute_study, load_study, study_path, sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")
DATA = dict(data="embedded-v1-smoke", size=64, backbone="resnet18", weights="random", batch=8)
SMOKE = DATA | dict(classes="gear,tile", detector="patchcore", ratio=.05, seed="0")
METRICS = ["I-AUROC", "P-AUROC", "P-AP", "AUPRO", "mAD"]
PEERS = ROOT/".venv-peers"/"bin"/"python"

FAKE = """#!{python}
import json, sys, numpy as np
script, detector, given, target = sys.argv[1:5]
options = dict(zip(sys.argv[5::2], sys.argv[6::2]))
with open({log!r}, "a") as f: f.write(detector + " " + options["--seed"] + "\\n")
z = np.load(given)
assert z["train"].dtype == np.uint8 and z["train"].shape[1:] == z["test"].shape[1:] == (3, 64, 64) and "backbone.layer1.0.conv1.weight" in z
{body}
print(json.dumps(dict(train_s=2., test_s=1., steps=({steps} if detector == "rd4ad" else 0), keeps="7 things", versions=dict(anomalib="9.9"))))
"""

@pytest.fixture
def fake(tmp_path, monkeypatch):
    "A peer that does `body`, which must write the file `target`; gives the file that each of its calls is written to."
    def make(body, steps=0):
        peer = tmp_path/"python"
        peer.write_text(FAKE.format(python=sys.executable, log=str(tmp_path/"calls"), body=body, steps=steps)); peer.chmod(0o755)
        monkeypatch.setenv("MDD_BENCH_PEERS", str(peer))
        return tmp_path/"calls"
    return make

def study(out, **changes):
    execute_study(load_study("parity", **SMOKE | changes), out)
    return pd.read_csv(out/"parity.csv"), (out/"parity.md").read_text()

def row(table, by, seed=0, detector="patchcore"): return table[(table.detector == detector) & (table.by == by) & (table.seed == seed)].iloc[0]

def test_parameters_are_the_studys_own_and_typed(tmp_path):
    chosen = load_study("parity", seed="3,4", ratio="0.25", detector="rd4ad")
    assert chosen.specs() == [] and {k: chosen.parameters()[k] for k in ("seed", "ratio", "detector", "size")} == dict(seed=[3, 4], ratio=.25, detector=["rd4ad"], size=128)
    assert sweep(load_study("parity"), tmp_path).records == []
    for wrong, said in ((dict(sized=3), "Did you mean 'size'"), (dict(epochs="many"), "epochs='many' does not fit"), (dict(ratio="half"), "ratio='half' does not fit"), (dict(seed="a,b"), "seed='a,b' does not fit")):
        with pytest.raises(SpecError, match=said): load_study("parity", **wrong)

@pytest.mark.parametrize("wrong, said", [(dict(size=48), "size=48. give a multiple of 32"),
    *(pytest.param(wrong, said, marks=pytest.mark.slow) for wrong, said in ((dict(detector="mddnet"), "unknown detector to compare 'mddnet'"), (dict(epochs=0), "epochs=0. give at least 1"), (dict(ratio=2), "coreset_ratio=2"), (dict(classes="gear,bolt"), "bolt")))])
def test_bad_parameters_stop_it_before_the_first_run(wrong, said, tmp_path):
    with pytest.raises(SpecError, match="the notebook of the study parity failed") as e: study(tmp_path/"out", **wrong)
    assert said in str(e.value) and not (tmp_path/"out"/"runs").exists()

def test_without_peers_ours_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_PEERS", str(tmp_path/"nowhere"))
    table, md = study(tmp_path/"out", seed="0,1")
    assert list(table.by) == ["mdd_bench"]*2 and "| patchcore | anomalib: not installed | - |" in md and "difference" not in md.split("\n\n")[1]
    assert {"parity.csv", "parity.ipynb", "parity.md", "parity.png"} <= {p.name for p in (tmp_path/"out").iterdir()} and not (tmp_path/"out"/"peers").exists()
    assert str(tmp_path) not in md
    r = Store(tmp_path/"out").load(row(table, "mdd_bench").id)
    assert row(table, "mdd_bench")[METRICS].tolist() == [r.metrics["exact"]["mean"][m] for m in METRICS] and r.spec["classes"] == ["gear", "tile"]

def test_our_own_maps_from_a_peer_get_our_own_numbers_and_are_asked_for_once(tmp_path, fake):
    "What the peer is given are the loader's pixels, what it gives is judged like a record; the difference is nothing."
    spec = make_spec(**DATA, classes="gear,tile", detector="patchcore", options=dict(coreset_ratio=.05))
    ours = run(spec, tmp_path/"kept", keep_model=True, store_gb=0)
    np.savez(tmp_path/"ours.npz", maps=np.concatenate([c["maps"] for c in maps_of(spec, tmp_path/"kept", store_gb=0)]), scores=ours.scores().score.to_numpy())
    calls = fake(f"np.savez({str(tmp_path/'handed.npz')!r}, train=z['train'], test=z['test']); import shutil; shutil.copy({str(tmp_path/'ours.npz')!r}, target)")
    table, md = study(tmp_path/"out")
    np.testing.assert_allclose(row(table, "anomalib")[METRICS].astype(float), [ours.metrics["exact"]["mean"][m] for m in METRICS], rtol=1e-12)
    assert "| patchcore | difference | " + " | ".join(["+0.0"]*5) + " | - | - | - |" in md.replace("-0.0", "+0.0") and "| 2 | 1 | 7 things |" in md and "anomalib 9.9" in md
    prepared = prepare(spec)
    for split, path in (("train", prepared.catalog.part(split="train").path), ("test", ours.scores().path)):
        with np.load(tmp_path/"handed.npz") as z: assert np.array_equal(z[split], [load_image(prepared.catalog.root/x, 64).transpose(2, 0, 1) for x in path])
    more, _ = study(tmp_path/"out", seed="0,1")
    assert calls.read_text() == "patchcore 0\npatchcore 1\n" and all(row(more, by).equals(row(table, by)) for by in ("mdd_bench", "anomalib"))
    assert not [p for p in (tmp_path/"out").rglob("*") if p.suffix in (".npz", ".part") and p.parent.parent.name != "runs"]

def test_a_mean_a_deviation_and_a_difference(tmp_path, fake):
    "Two detectors, two seeds, a peer that guesses."
    fake("rng = np.random.default_rng(int(options['--seed'])); n = len(z['test']); np.savez(target, maps=rng.random((n, 64, 64)).astype(np.float32), **({} if detector == 'rd4ad' else dict(scores=rng.random(n))))", steps="int(options['--epochs'])*-(-len(z['train'])//8)")
    table, md = study(tmp_path/"out", seed="0,1", detector="rd4ad,patchcore", epochs=2)
    for name in ("rd4ad", "patchcore"):
        ours, theirs = (table[(table.detector == name) & (table.by == by)]["P-AUROC"]*100 for by in ("mdd_bench", "anomalib"))
        assert len(ours) == len(theirs) == 2 and theirs.std() > 0
        cell = f"{ours.mean() - theirs.mean():+.1f} ± {np.sqrt(ours.std()**2/2 + theirs.std()**2/2):.1f}"
        assert cell in md and f"{theirs.mean():.1f} ± {theirs.std():.1f}" in md
    assert "rd4ad: 2 steps on both sides, lr 0.005, x 0.1 after 80% of the epochs" in md and "patchcore: 0 steps" not in md and md.count(" of the epochs") == 1

@pytest.mark.slow
def test_a_peer_that_fails_says_why_and_is_asked_again(tmp_path, fake):
    calls = fake("raise RuntimeError('no such layer | at all')")
    for n in (1, 2):
        _, md = study(tmp_path/"out")
        assert "| patchcore | anomalib: RuntimeError: no such layer / at all | - |" in md and len(calls.read_text().splitlines()) == n

@pytest.mark.slow
def test_other_steps_are_no_comparison(tmp_path, fake):
    fake("np.savez(target, maps=np.zeros((len(z['test']), 64, 64), np.float32))", steps=999)
    with pytest.raises(SpecError, match="anomalib took 999 steps"): study(tmp_path/"out", detector="rd4ad", epochs=1)

installed = pytest.mark.skipif(not PEERS.is_file(), reason="anomalib is not installed (make peers)")

@installed
@pytest.mark.slow
def test_patchcore_is_anomalibs_where_nothing_is_drawn(tmp_path):
    "With all patches in the bank: the same image scores, the same map but for how it is enlarged, up to half precision."
    spec = make_spec(**DATA, detector="patchcore", options=dict(coreset_ratio=1))
    ours, p = run(spec, tmp_path, keep_model=True, store_gb=0), prepare(spec)
    pixels = lambda paths: np.stack([load_image(p.catalog.root/x, 64).transpose(2, 0, 1) for x in paths])
    np.savez(tmp_path/"in.npz", train=pixels(p.catalog.part(split="train").path), test=pixels(ours.scores().path), mean=p.backbone.mean.flatten(), std=p.backbone.std.flatten(), **{f"backbone.{k}": v for k, v in p.backbone.pyramid.state_dict().items()})
    got = subprocess.run([PEERS, study_path("peer_maps", ".py"), "patchcore", tmp_path/"in.npz", tmp_path/"out.npz", "--layers", "2,3", "--ratio", "1"], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    assert json.loads(got.stdout.splitlines()[-1])["keeps"] == f"{ours.provenance['bank']['rows']:,} patches"
    with np.load(tmp_path/"out.npz") as z: maps, scores = z["maps"], z["scores"]
    np.testing.assert_allclose(scores, ours.scores().score, rtol=1e-2)
    cells = maps.reshape(-1, 8, 8, 8, 8)
    assert (cells == cells[:, :, :1, :, :1]).all()                                  # each patch's distance, not blurred
    mine = np.concatenate([c["maps"] for c in maps_of(spec, tmp_path, store_gb=0)])
    middles = lambda m: m.reshape(-1, 8, 8, 8, 8)[:, :, 3:5, :, 3:5].mean((2, 4))     # bilinear values around a patch's middle are nearly its own
    assert np.corrcoef(middles(maps).ravel(), middles(mine).ravel())[0, 1] > .99

@installed
@pytest.mark.slow
def test_the_real_peer_is_within_a_few_points(tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_PEERS", str(PEERS))
    table, md = study(tmp_path/"out", classes="", detector="rd4ad,patchcore", ratio=1, epochs=1)
    ours, theirs = row(table, "mdd_bench"), row(table, "anomalib")
    assert ours["keeps"] == theirs["keeps"] and all(abs(ours[m] - theirs[m]) < .05 for m in METRICS)
    ours, theirs = (row(table, by, detector="rd4ad") for by in ("mdd_bench", "anomalib"))
    assert ours["keeps"] == theirs["keeps"] and "weights" in ours["keeps"]          # as many weights are trained; a few steps decide nothing else
    assert "rd4ad: 3 steps on both sides" in md
