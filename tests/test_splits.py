"Labelled anomalies: which are drawn, what stays in the test, what a run sees of them, one model or many."
import json, shutil
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
from PIL import Image
from mdd_bench.data.catalog import read_catalog
from mdd_bench.data.synthetic import embedded
from mdd_bench.data.splits import SCHEMES, draw, follow, most, pools, read_manifest, shuffled, write_manifest
from mdd_bench.detectors import detector as registry
from mdd_bench.detectors.detector import Detector, Prediction, Recipe, labelled, normal, textures
from mdd_bench.errors import DataError, SpecError
from mdd_bench.reporting.tables import caption, seen_and_unseen, summary
from mdd_bench.running import run as running
from mdd_bench.running.run import prepare, run, test_maps as maps_of
from mdd_bench.running.spec import make_spec
from mdd_bench.running.sweep import load_study, sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM", "ignore::mdd_bench.evaluation.metrics.UndefinedMetric")
KINDS = dict(bolt=dict(dent=6, rust=5, scratch=4), felt=dict(cut=12), tile=dict(chip=8, crack=6))

def write(root, classes=KINDS):
    "Stripes of one angle per class; a defect is a grey square whose size is its kind's."
    for c in classes:
        rng, angle = np.random.default_rng([*c.encode()]), list(KINDS).index(c)
        y, x = np.mgrid[:64, :64]
        def save(path, a): (root/c/path).parent.mkdir(parents=True, exist_ok=True); Image.fromarray(np.uint8(a)).save(root/c/path)
        def clean(): return 127 + 90*np.sin(.6*(x*np.cos(angle) + y*np.sin(angle)) + rng.uniform(0, 6)) + rng.normal(0, 4, (64, 64))
        for i in range(6): save(f"train/good/{i:03}.png", clean())
        for i in range(4): save(f"test/good/{i:03}.png", clean())
        for size, (kind, n) in enumerate(KINDS[c].items()):
            for i in range(n):
                image, mask, (a, b) = clean(), np.zeros((64, 64)), rng.integers(4, 40, 2)
                mask[a:a + 8 + 4*size, b:b + 10] = 255; image[mask > 0] = 40
                save(f"test/{kind}/{i:03}.png", image.clip(0, 255)); save(f"ground_truth/{kind}/{i:03}_mask.png", mask)
    return root

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write(tmp_path_factory.mktemp("stripes")/"data")

@pytest.fixture
def catalog(folder): return read_catalog(folder)

@pytest.fixture(scope="module", autouse=True)
def learner():
    "The smallest detector that learns from labels: remembers what it was shown."
    @registry.register("toy")
    class Toy(Detector):
        recipe, needs, defects = Recipe(epochs=2, batch=4), frozenset({"labelled", "textures"}), dict(textures="procedural")
        seen = []
        def __init__(self, backbone, classes=1):
            super().__init__(backbone, classes)
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.register_buffer("mean", torch.zeros(backbone.channels[0])); self.register_buffer("bad", torch.zeros(backbone.channels[0]))
        def prepare(self, batches):
            mean = lambda those: torch.cat([b["features"][0].mean((2, 3)) for b in those]).mean(0)
            self.mean = mean(normal(batches)); self.bad = mean(labelled(batches)) if any(True for _ in labelled(batches)) else self.bad
            type(self).seen = [dict(normal=[p for b in normal(batches) for p in b["path"]], labelled=[p for b in labelled(batches) for p in b["path"]], textures=sum(len(b["features"][0]) for b in textures(batches)), steps=[])]
        def losses(self, batch):
            known = batch.get("labelled")
            self.seen[0]["steps"].append(None if known is None else known["index"].tolist())
            if known is not None: assert known["mask"].shape[1:] == (64, 64) and 0 < known["mask"].mean() < 1 and len(known["features"][0]) == len(known["path"])
            return dict(one=(self.weight - 1)**2)
        def predict(self, features, size):
            far = lambda to: (features[0] - to.view(1, -1, 1, 1)).norm(dim=1, keepdim=True)
            return Prediction(torch.nn.functional.interpolate(far(self.mean) - .5*far(self.bad), size, mode="bilinear")[:, 0])
    yield Toy
    registry._registry.pop("toy")

def asked(folder, **kw): return make_spec(**dict(data=str(folder), size=64, weights="procedural", layers=[1], detector="toy") | kw)

# ---- the draw

def test_the_draw_is_what_it_always_was():
    "A seeded shuffle of Python's: the same picks on any machine, or old manifests and papers would mean something else."
    assert shuffled([f"{i:03}" for i in range(8)][::-1], 0) == ["004", "001", "005", "002", "000", "003", "007", "006"]

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_draws_are_nested_and_leave_one_test_set(catalog, scheme, seed):
    classes = ["bolt", "tile"] if scheme == "from_classes" else None
    drawn = [draw(catalog, scheme, n, seed, hold_out=3, classes=classes if n else None) for n in range(4)]
    for less, more in zip(drawn, drawn[1:]): assert set(less.manifest["files"]) < set(more.manifest["files"])
    assert len({d.manifest["test_hash"] for d in drawn}) == 1 and len({d.manifest["labelled_hash"] for d in drawn}) == 4
    for d in drawn:
        t = d.catalog.table
        assert len(t) == len(catalog.table) and not set(d.manifest["files"]) & set(t[t.split == "test"].path) and (t[t.split == "train"].kind == "good").all()
        assert set(t[t.split == "labelled"].path) == set(d.manifest["files"]) and set(t[t.split == "held out"].path) == set(d.manifest["held_out"])
        assert (t[(t.split == "test") & (t.kind != "good")].groupby("cls").size() >= 5).all()
    assert set(drawn[3].manifest["files"]) | set(drawn[3].manifest["held_out"]) == set(drawn[0].manifest["held_out"])

def test_what_each_scheme_takes(catalog):
    kinds = lambda d: d.catalog.part(split="labelled").groupby(["cls", "kind"]).size().to_dict()
    assert draw(catalog, "pooled", 4).catalog.part(split="labelled").groupby("cls").size().to_dict() == dict(bolt=4, felt=4, tile=4)
    assert kinds(draw(catalog, "per_kind", 3)) == {(c, k): 3 for c in KINDS for k in KINDS[c]}
    of_bolt = [kinds(draw(catalog, "one_kind", 3, seed)) for seed in range(4)]
    assert [list(k) for k in of_bolt] == [[("bolt", a), ("tile", b)] for a, b in zip(("dent", "rust", "scratch", "dent"), ("chip", "crack", "chip", "crack"))]      # felt has a single kind
    some = draw(catalog, "from_classes", 4, classes=["tile"])
    assert {c for c, _ in kinds(some)} == {"tile"} and some.manifest["test_hash"] == draw(catalog, "pooled", 4).manifest["test_hash"]

def test_neither_the_order_of_files_nor_the_place_matters(catalog, folder, tmp_path):
    mixed = replace(catalog, table=catalog.table.sample(frac=1, random_state=3))
    copy = write(tmp_path/"copy", list(KINDS)[::-1])
    for scheme in ("pooled", "per_kind", "one_kind"): assert draw(catalog, scheme, 3, 1).manifest == draw(mixed, scheme, 3, 1).manifest == draw(read_catalog(copy), scheme, 3, 1).manifest

def test_a_class_can_give_so_many(catalog):
    with pytest.raises(DataError, match=r"felt \(at most 7\).*at most 7.*--labelled-at-most"): draw(catalog, labelled=8)
    with pytest.raises(DataError, match=r"bolt \(at most 3\)"): draw(catalog, "per_kind", 4)
    given = draw(catalog, labelled=9, at_most=True).catalog.table
    assert given[given.split == "labelled"].groupby("cls").size().to_dict() == dict(bolt=9, felt=7, tile=9)
    few = replace(catalog, table=catalog.table[(catalog.table.kind.isin(["good", "dent"]))])
    with pytest.raises(DataError, match="at most 1"): draw(few, labelled=3)
    with pytest.raises(DataError, match="two kinds"): draw(replace(catalog, table=catalog.table[catalog.table.cls == "felt"]), "one_kind", 1)

@pytest.mark.parametrize("why, how", {"hold_out": dict(labelled=3, hold_out=2), "'poold'": dict(scheme="poold", labelled=1), "label_classes": dict(scheme="from_classes", labelled=1), "'blt'": dict(scheme="from_classes", labelled=1, classes=["blt"]),
                                      "with from_classes": dict(labelled=1, classes=["bolt"])}.items())
def test_what_cannot_be_asked(catalog, why, how):
    with pytest.raises(SpecError, match=why): draw(catalog, **how)

def test_a_manifest_comes_back_and_is_compared_with_the_files(catalog, folder, tmp_path):
    made, file = draw(catalog, "per_kind", 1, 5, hold_out=2), tmp_path/"m.json"
    write_manifest(made.manifest, file)
    again = follow(catalog, read_manifest(file))
    assert again.catalog.table.equals(made.catalog.table) and again.manifest == made.manifest
    copy = write(tmp_path/"copy"); name = list(made.manifest["files"])[0]
    with Image.open(copy/name) as im: a = np.array(im)
    a[0, 0] ^= 1; Image.fromarray(a).save(copy/name)
    with pytest.raises(DataError, match=f"image {name}"): follow(read_catalog(copy), read_manifest(file))
    (copy/name).unlink()
    with pytest.raises(DataError, match=name): follow(read_catalog(copy), read_manifest(file))
    other = write(tmp_path/"other"); left = made.catalog.part(split="test").path.iloc[-1]; (other/left).unlink()
    with pytest.raises(DataError, match="test images"): follow(read_catalog(other), read_manifest(file))
    (tmp_path/"bad.json").write_text('{"files": {}}')
    for bad in (tmp_path/"bad.json", tmp_path/"gone.json", folder): 
        with pytest.raises(DataError, match="mdd_bench labels"): read_manifest(bad)

def test_a_labelled_anomaly_needs_a_mask(catalog):
    bare = catalog.table.copy(); bare.loc[bare.kind != "good", "mask"] = ""
    with pytest.raises(DataError, match="has no mask"): draw(replace(catalog, table=bare), labelled=1)

# ---- the run

def test_a_run_shows_the_labelled_images_and_tests_the_others(folder, tmp_path, learner):
    r = run(asked(folder, labelled=3, hold_out=5, label_seed=2), tmp_path)
    seen, manifest = learner.seen[0], json.loads((r.folder/"manifest.json").read_text())
    assert sorted(seen["labelled"]) == sorted(manifest["files"]) and len(seen["labelled"]) == 9 and seen["textures"] == 47 and len(seen["normal"]) == 18
    assert all(len(s) == 4 == len(set(s)) for s in seen["steps"]) and len(seen["steps"]) == 2*5 and len({tuple(s) for s in seen["steps"]}) > 1
    tested = set(r.scores().path)
    assert not tested & {*manifest["files"], *manifest["held_out"]} and len(tested) == 12 + (15 + 12 + 14) - 15
    assert r.provenance["test_counts"] == dict(bolt=[4, 10], felt=[4, 7], tile=[4, 9]) and r.provenance["labels"]["images"] == dict(bolt=3, felt=3, tile=3)
    assert r.spec["label_seed"] == 2 and r.spec["hold_out"] == 5 and r.provenance["defect_textures"] == "procedural"
    assert "felt 4 + 7" in caption([r])

def test_with_computed_features_and_again_the_bits_are_the_same(folder, tmp_path):
    spec = asked(folder, labelled=2)
    a, b = run(spec, tmp_path/"a"), run(spec, tmp_path/"b", store_gb=0)
    assert a.metrics == b.metrics and a.scores().equals(b.scores())

def test_the_identity_is_what_was_drawn_not_how(folder, tmp_path):
    spec = asked(folder, labelled=3, hold_out=5)
    file = tmp_path/"m.json"; write_manifest(prepare(spec).manifest, file)
    handed_on = asked(folder, manifest=str(file))
    assert prepare(handed_on).id == prepare(spec).id == prepare(replace(spec, label_seed=0)).id != prepare(replace(spec, label_seed=1)).id
    assert run(handed_on, tmp_path).spec["label_seed"] == 0 and run(spec, tmp_path).spec["labelled"] == 3
    assert prepare(asked(folder, classes="tile,bolt,felt")).id == prepare(asked(folder)).id
    held = [prepare(asked(folder, hold_out=n, label_seed=s)) for n, s in ((None, 0), (5, 0), (5, 1))]
    assert len({p.id for p in held}) == 3 and len({p.trained for p in held}) == 1                     # the test set decides no weight
    assert prepare(asked(folder, scheme="per_kind", label_seed=4)).canonical == prepare(asked(folder)).canonical and "labelled" not in prepare(asked(folder)).canonical

def test_without_labels_no_anomalous_image_is_opened_in_training(folder, tmp_path, learner):
    copy = tmp_path/"data"; shutil.copytree(folder, copy)
    p = prepare(asked(copy, hold_out=3))
    for c in KINDS:
        for kind in KINDS[c]: shutil.rmtree(copy/c/"test"/kind)
        shutil.rmtree(copy/c/"ground_truth")
    detector, *_ = running._trained(p, "", tmp_path, torch.device("cpu"), 0, 0, lambda *a: None, None)
    assert learner.seen[0]["labelled"] == [] and set(learner.seen[0]["steps"]) == {None} and detector.mean.abs().sum() > 0

@pytest.mark.parametrize("detector", ["dmad", "bgad"])
def test_those_who_learn_from_labels_need_none(folder, tmp_path, detector):
    "Every anomalous image is gone before the training begins."
    copy = tmp_path/"data"; shutil.copytree(folder, copy)
    p = prepare(asked(copy, hold_out=3, detector=detector, epochs=1))
    for c in KINDS: shutil.rmtree(copy/c/"test"); shutil.rmtree(copy/c/"ground_truth")
    made, *_ = running._trained(p, "", tmp_path, torch.device("cpu"), 0, 0, lambda *a: None, None)
    assert made(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).map.isfinite().all()

def test_the_order_of_classes_does_not_change_the_result(folder, tmp_path):
    copy = write(tmp_path/"copy", list(KINDS)[::-1])
    a, b = run(asked(folder, labelled=2), tmp_path/"a"), run(asked(copy, labelled=2, classes="tile,felt,bolt"), tmp_path/"b")
    assert a.id == b.id and a.metrics == b.metrics

def test_labels_for_a_detector_that_learns_from_none_are_refused(folder):
    with pytest.raises(SpecError, match="rd4ad does not learn.*toy"): prepare(asked(folder, detector="rd4ad", labelled=1))
    prepare(asked(folder, detector="rd4ad", hold_out=1))

def test_an_empty_mask_is_named(folder, tmp_path):
    copy = tmp_path/"data"; shutil.copytree(folder, copy)
    name = next(iter(prepare(asked(copy, labelled=1)).manifest["files"]))
    mask = copy/name.replace("/test/", "/ground_truth/").replace(".png", "_mask.png"); Image.fromarray(np.zeros((64, 64), np.uint8)).save(mask)
    with pytest.raises(DataError, match=f"{mask.name} is empty"): run(asked(copy, labelled=1), tmp_path/"out")

def test_tables_refuse_two_test_sets_in_one_label_seed(folder, tmp_path):
    spec = asked(folder, hold_out=4, epochs=1)
    records = [run(replace(spec, labelled=n, seed=s), tmp_path) for n in (0, 4) for s in (0, 1)]
    assert summary(records, "labelled")["n"].tolist() == [2, 2]
    assert list(seen_and_unseen([run(replace(spec, labelled=n, scheme="one_kind"), tmp_path) for n in (0, 4)]).columns[:2]) == ["I-AUROC seen", "I-AUROC unseen"]
    with pytest.raises(SpecError, match="hold_out"): summary(records + [run(replace(spec, labelled=2, hold_out=3), tmp_path)], "labelled")
    records[3].provenance["labels"]["test_hash"] = "other"
    with pytest.raises(SpecError, match="different images"): summary(records, "labelled")

def test_an_axis_of_labels_has_one_point_for_those_who_learn_from_none():
    study = load_study("labels", detector="toy,rd4ad", labelled="0,1,5", seed=0)
    assert [(s.detector, s.labelled) for s in study.specs()] == [("toy", 0), ("toy", 1), ("toy", 5), ("rd4ad", 0)]

# ---- one model, or one for each class

def test_separate_models_are_those_of_single_classes(folder, tmp_path):
    spec = asked(folder, setting="separate", labelled=2, hold_out=3)
    many = run(spec, tmp_path, keep_model=True)
    assert not (many.folder/"models").exists() and set(many.history().cls) == set(KINDS)
    assert many.cost["parameters_trained"] == 3 and many.cost["bytes_test"] - many.cost["bytes_test_without_backbone"] > 0
    alone = {c: run(asked(folder, classes=c, labelled=2, hold_out=3), tmp_path) for c in KINDS}
    assert many.metrics["exact"]["per_class"] == {c: r.metrics["exact"]["per_class"][c] for c, r in alone.items()}
    assert many.cost["bytes_test_without_backbone"] == sum(r.cost["bytes_test_without_backbone"] for r in alone.values())
    assert many.metrics != run(replace(spec, setting="unified"), tmp_path).metrics
    held = run(replace(spec, hold_out=4), tmp_path)                                                    # other test images, the same weights
    assert held.provenance["trained_by"] == many.id != held.id and held.cost["train_s"] == many.cost["train_s"]
    both = run(replace(spec, protocols=["exact", "ader"]), tmp_path)                                  # from the kept models
    assert both.id == many.id and list(both.metrics) == ["exact", "ader"] and [m["cls"] for m in maps_of(spec, tmp_path)] == list(KINDS)

def test_separate_models_that_are_done_are_not_trained_again(folder, tmp_path, monkeypatch):
    spec, real, calls = asked(folder, setting="separate", detector="rd4ad", epochs=1), running.train, []
    def stop_after_two(detector, rows, *a, **kw):
        calls.append(rows.paths[0].split("/")[0])
        if len(calls) == 3: raise KeyboardInterrupt
        return real(detector, rows, *a, **kw)
    monkeypatch.setattr(running, "train", stop_after_two)
    with pytest.raises(KeyboardInterrupt): run(spec, tmp_path/"broken")
    monkeypatch.setattr(running, "train", real)
    steps = []
    import mdd_bench.running.training as training
    monkeypatch.setattr(training, "train_step", lambda *a, f=training.train_step: steps.append(1) or f(*a))
    again = run(spec, tmp_path/"broken")
    assert len(steps) == 1 and again.metrics == run(spec, tmp_path/"whole").metrics

# ---- the command line

def test_the_command_draws_writes_and_checks(cli, folder, tmp_path):
    code, out, _ = cli("labels", folder, "--labelled", 2, "--hold-out", 4, "--out", tmp_path/"m.json")
    assert code == 0 and "labelled" in out and read_manifest(tmp_path/"m.json")["hold_out"] == 4
    code, out, _ = cli("labels", folder, "--manifest", tmp_path/"m.json")
    assert code == 0 and read_manifest(tmp_path/"m.json")["test_hash"] in out
    code, _, err = cli("labels", folder, "--labelled", 8)
    assert code == 2 and "--labelled-at-most" in err and err.count("\n") == 1
    assert cli("labels", folder, "--labelled", 8, "--labelled-at-most")[0] == 0
    code, _, err = cli("run", "--data", folder, "--manifest", tmp_path/"m.json", "--labelled", 2)
    assert code == 2 and "manifest" in err

def test_the_largest_arm_decides_what_is_held_out():
    "Along an axis of labelled anomalies, unless something else is said."
    held = lambda **kw: {s.hold_out for s in load_study("labels", detector="dmad", seed=0, **kw).specs()}
    assert held() == {10} and held(labelled="0,2") == {2} and held(labelled="0,2", hold_out=4) == {4} and held(labelled="0,2", hold_out="none") == {2}
    assert {s.hold_out for s in load_study("benchmark", detector="dmad").specs()} == {None}

def test_the_study_of_kinds_can_be_drawn_on_its_own_data(tmp_path):
    "And leaves images of the labelled kind to test."
    spec = next(s for s in load_study("kinds", seed=0).specs() if s.labelled)
    split = draw(read_catalog(embedded(spec.data)), spec.scheme, spec.labelled, 0, spec.hold_out)
    left = split.catalog.part(split="test").merge(split.catalog.part(split="labelled")[["cls", "kind"]].drop_duplicates())
    assert set(left.cls) == set(split.catalog.classes)
