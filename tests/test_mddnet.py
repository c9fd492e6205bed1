"MDD-Net: all of its options on several pyramids, terms that fall, a teacher that stays, labels that are not read, weights that are shared, resumed and reproduced bit for bit."
import inspect, itertools, json, shutil
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest, torch
import torch.nn.functional as F
import mdd_bench.running.run as running
from mdd_bench.data.defects import Defects
from mdd_bench.data.loading import ImageDataset
from mdd_bench.detectors.detector import create_detector, full_options
from mdd_bench.detectors.mddnet import FUSIONS, distance_loss
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone, hash_weights
from mdd_bench.parts.clustering import Groups, choose_groups, spherical_kmeans
from mdd_bench.parts.discrepancy import fuse_levels
from mdd_bench.parts.memory import PrototypeMemory, class_logits, init_prototypes, memory_losses, revive
from mdd_bench.running.run import prepare, run
from mdd_bench.running.spec import make_spec
from mdd_bench.running.store import Store
from mdd_bench.running.sweep import flags, load_study, sweep
from mdd_bench.running.training import feed, train
from conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM", "ignore::mdd_bench.evaluation.metrics.UndefinedMetric")
PYRAMIDS = [("resnet18", None, [4, 8, 16], False), ("resnet18", [2, 3, 4], [8, 16, 32], False), ("mobilenetv3_small_100", None, [4, 8, 16], True)]
BRANCHES, MEMORIES = ("both", "restoration", "distillation"), ("class", "none", "shared", "cluster")
LIGHT = dict(decoder="light", memory="class", prototypes=4, fusion="sum")
MEMORY = dict(memory="class")

class Interrupted(Exception): pass

@pytest.fixture(scope="module", params=PYRAMIDS, ids=lambda p: f"{p[0]}-{p[2]}")
def pyramid(request):
    name, layers, strides, signed = request.param
    b = Backbone(name, "random", layers)
    assert b.strides == strides and b.signed == [signed]*3
    return b

@pytest.fixture(scope="module")
def small(): return Backbone("resnet18", "procedural", [1, 2])

@pytest.fixture(scope="module")
def prepared(): return prepare(make_spec(**SMALL, detector="mddnet"))

def pictures(n, seed=0, size=64):
    "Stripes of two looks, one after the other."
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    look = (torch.arange(n) % 2).view(-1, 1, 1)
    return (.5 + .35*torch.sin(.8*(x + look*y) + 6.28*torch.rand(n, 1, 1, generator=g)) + .05*torch.randn(n, size, size, generator=g)).clamp(0, 1).unsqueeze(1).expand(-1, 3, -1, -1).clone()

def a_batch(backbone, n=4, classes=2, size=64):
    normal = pictures(n, 0, size); abnormal, mask = normal.clone(), torch.zeros(n, size, size, dtype=torch.bool)
    mask[:, 10:30, 20:44] = True
    abnormal = torch.where(mask[:, None], torch.rand(normal.shape, generator=torch.Generator().manual_seed(1)), abnormal)
    return dict(image=normal, features=backbone(normal), features_abnormal=backbone(abnormal), mask=mask, cls=torch.arange(n) % classes)

def create(backbone, classes=2, seed=0, **options):
    torch.manual_seed(seed)
    left_out = ["prototypes"]*(options.get("memory") == "none") + ["fusion"]*(options.get("branches", "both") != "both")
    return create_detector("mddnet", backbone, classes, **{k: v for k, v in LIGHT.items() if k not in left_out} | options)

def hook(detector, f, *args):
    detector.eval()
    with torch.no_grad(): f(*args)
    return detector.train()

def state(module): return {k: v.clone() for k, v in module.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def make_rows(prepared, detector=None, table=None):
    p = prepared; rows = ImageDataset(p.catalog.root, p.catalog.part(split="train") if table is None else table, 64, p.catalog.classes)
    if detector is not None and detector.defects: rows.defects = Defects(**detector.defects, seed=0, images=rows)
    return rows

def trained(prepared, small, epochs=1, classes=2, table=None, folder=None, progress=lambda *a: None, name="mddnet", **options):
    "A detector through the real loop."
    detector = create(small, classes, **options) if name == "mddnet" else (torch.manual_seed(0), create_detector(name, small, classes))[1]
    train(detector, make_rows(prepared, detector, table), replace(detector.recipe, epochs=epochs, batch=8), folder=folder, save_every=0, progress=progress)
    return detector

# ---- shapes, ranges

@pytest.mark.parametrize("decoder", ["mirror", "light"])
def test_every_branch_and_memory_gives_a_finite_map_of_the_inputs_size(pyramid, decoder):
    batch = a_batch(pyramid)
    for branches, memory in itertools.product(BRANCHES, MEMORIES) if decoder == "light" else zip(BRANCHES + ("both",), MEMORIES):
        d = create(pyramid, branches=branches, memory=memory, decoder=decoder)
        hook(d, d.prepare, [batch]); hook(d, d.on_epoch, 0, [batch])
        assert d.bank is None or d.branches.memory.ready
        terms = d.losses(batch)
        assert all(t.ndim == 0 and torch.isfinite(t) for t in terms.values())
        assert set(terms) == ({"distillation"} if branches == "distillation" else {"restoration"}) | ({"identity", "dist"} if branches == "both" else set()) | ({"class", "compact", "separate"} if d.bank else set())
        d.eval()
        with torch.no_grad(): p, oblong = d(batch["image"][:3]), d(torch.rand(1, 3, 64, 128))
        assert p.map.shape == (3, 64, 64) and oblong.map.shape == (1, 64, 128) and torch.isfinite(p.map).all() and p.score is None
        assert list(p.extra) == {"class": ["predicted_cls"], "cluster": ["group"]}.get(memory, []) and all(v.shape == (3,) for v in p.extra.values())

def test_raw_maps_stay_within_their_range(pyramid):
    "A level's discrepancy is at most 1 between rectified features, and a mask is; 2 between signed ones."
    d, batch, most = create(pyramid, memory="none").eval(), a_batch(pyramid), 2. if pyramid.signed[0] else 1.
    with torch.no_grad(): maps = d.levels(batch["features_abnormal"])[0]
    assert len(maps) == 2 and all(len(m) == 3 for m in maps)
    assert all(m.min() > -1e-5 and m.max() < most + 1e-5 for level in maps for m in level)
    assert pyramid.signed[0] == any(m.max() > 1.01 for level in maps for m in level)
    for fusion in ("tr", "ri"):
        d.fusion = fusion; m = d(batch["image"]).map.detach()
        assert m.min() > -1e-4 and .01 < m.max() < 3*most + 1e-4

def test_fusions_are_made_of_the_two_maps(small):
    d, f = create(small, memory="none").eval(), a_batch(small)["features"]
    with torch.no_grad(): maps = {k: setattr(d, "fusion", k) or d.predict(f, (64, 64)).map for k in FUSIONS}
    assert not torch.equal(maps["tr"], maps["ri"])
    torch.testing.assert_close(maps["sum"], maps["tr"] + maps["ri"]); torch.testing.assert_close(maps["product"], maps["tr"]*maps["ri"])

# ---- losses

@pytest.mark.parametrize("at", [(0, 0), (61, 61), (0, 61), (15, 33), (30, 7)])
def test_a_defect_of_three_pixels_exists_at_every_level(at):
    i, j = at; mask = torch.zeros(1, 64, 64, dtype=torch.bool); mask[0, i:i+3, j:j+3] = True
    for n in (16, 8, 4):
        x = torch.rand(1, 6, n, n, generator=torch.Generator().manual_seed(n)) + .1
        s = 64//n; cells = {(a//s, b//s) for a in range(i, i + 3) for b in range(j, j + 3)}
        assert distance_loss([x], [x], mask).item() == pytest.approx(len(cells)/n**2, abs=1e-5)
        other = x.clone()                                                         # at right angles there, and nowhere else
        for a, b in cells: other[0, :, a, b] = 0; other[0, 0, a, b] = 1; x[0, 0, a, b] = 0
        assert distance_loss([x], [other], mask).item() < 1e-5

@pytest.mark.parametrize("term,most", [("restoration", .9), ("identity", .9), ("dist", .9), ("class", .9), ("compact", .9), ("separate", .98)])
def test_each_term_falls_when_it_is_followed(small, term, most):
    "Prototypes start at random, so that the class term has something to learn."
    d, batch = create(small), a_batch(small)
    d.branches.memory.ready.fill_(True)
    optimizer, values = torch.optim.Adam(d.param_groups(), lr=5e-3, betas=(.5, .999)), []
    for _ in range(15):
        loss = d.losses(batch)[term]; values.append(loss.item())
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert 0 < values[-1] < most*values[0], values

def test_all_terms_fall_together(small):
    d, batch = create(small), a_batch(small, 6)
    batch["cls"] = torch.tensor([0, 0, 1, 1, 1, 0])                               # names against looks
    hook(d, d.on_epoch, 0, [batch])
    with torch.no_grad(): d.bank.items.copy_(F.normalize(torch.rand(d.bank.items.shape, generator=torch.Generator().manual_seed(0)), dim=-1))
    optimizer, curve = torch.optim.Adam(d.param_groups(), lr=5e-3, betas=(.5, .999)), []
    for _ in range(25):
        terms = d.losses(batch); curve.append({k: v.item() for k, v in terms.items()})
        optimizer.zero_grad(); sum(terms.values()).backward(); optimizer.step()
    assert set(curve[0]) == {"restoration", "identity", "dist", "class", "compact", "separate"}
    assert all(curve[-1][k] < .97*curve[0][k] for k in curve[0]), (curve[0], curve[-1])

def test_the_weight_of_dist_is_a_weight(small):
    one, ten = (create(small, memory="none", dist_weight=w).losses(a_batch(small)) for w in (.1, 1.))
    assert ten["dist"].item() == pytest.approx(10*one["dist"].item()) and ten["identity"] == one["identity"]

def test_the_memory_opens_softly(small):
    "A 1x1 convolution that begins as identity: the decoders see no jump. With read=replace there is one."
    batch = a_batch(small)
    for read, equal in (("concat", True), ("replace", False)):
        d = create(small, read=read).eval(); maps = []
        for step in range(2):
            with torch.no_grad(): maps.append(d.predict(batch["features"], (64, 64)).map); d.on_epoch(0, [batch])
        assert torch.allclose(*maps, atol=1e-5) == equal

# ---- training

def test_the_teacher_stays(prepared, small):
    before, hashed = state(small), hash_weights(small)
    d = trained(prepared, small, epochs=2)
    d.train(); small.train(); sum(d.losses(a_batch(small)).values()).backward()
    assert same(state(small), before) and hash_weights(small) == hashed and not any(m.training for m in small.modules())
    assert not any("backbone" in k for k in d.state_dict()) and not any(p is q for p in d.parameters() for q in small.parameters())

def test_hooks_see_clean_images_in_order_and_change_no_statistics(prepared, small):
    seen, d = [], create(small)
    rows = make_rows(prepared, d)
    stats = lambda: {k: v.clone() for k, v in d.state_dict().items() if "running_" in k or "num_batches" in k}
    def watch(name, real):
        def watched(*args):
            *rest, passes = args
            got, before = list(passes), stats()
            assert not d.training and not any(m.training for m in d.modules()) and not torch.is_grad_enabled()
            assert [p for b in got for p in b["path"]] == rows.paths and not any({"abnormal", "features_abnormal", "mask"} & set(b) for b in got)
            index = torch.cat([b["index"] for b in got]); clean = small(torch.stack([torch.from_numpy(rows.image(int(i))) for i in index]))
            assert all(torch.allclose(torch.cat([b["features"][k] for b in got]), clean[k], atol=1e-2, rtol=1e-2) for k in range(2))
            real(*rest, got)
            assert same(stats(), before) and stats()
            seen.append(name)
        return watched
    for name in ("prepare", "on_epoch", "finish"): d.__dict__[name] = watch(name, getattr(d, name))
    train(d, rows, replace(d.recipe, epochs=3, batch=8))
    assert seen == ["prepare"] + ["on_epoch"]*3 + ["finish"] and d.branches.memory.ready

@pytest.mark.parametrize("branches", ["both", "restoration"])
def test_normal_scale_is_mean_and_deviation_of_the_training_normals(prepared, small, branches):
    d = trained(prepared, small, branches=branches, memory="none", scale="normal").eval()
    rows = make_rows(prepared); f = small(torch.stack([torch.from_numpy(rows.image(i)) for i in range(len(rows))]))
    with torch.no_grad(): maps, _ = d.levels(f)
    assert len(maps) == (2 if branches == "both" else 1)
    for k, levels in enumerate(maps):
        for i, m in enumerate(levels):
            assert d.centre[k, i].item() == pytest.approx(m.double().mean().item(), rel=1e-4) and d.spread[k, i].item() == pytest.approx(m.double().std(unbiased=False).item(), rel=1e-3)
    by_hand = sum(fuse_levels([(m - m.mean())/m.std(unbiased=False) for m in levels], (64, 64)) for levels in maps)
    with torch.no_grad(): torch.testing.assert_close(d.predict(f, (64, 64)).map, by_hand, atol=1e-2, rtol=1e-2)

@pytest.mark.parametrize("memory", ["class", "cluster"])
def test_an_interrupted_training_goes_on_to_the_same_bits(prepared, small, memory, tmp_path):
    "Stopped in epoch 1 (the memory has just opened) and in epoch 2 of four; buffers included."
    steps = -(-len(make_rows(prepared))//8)
    whole = trained(prepared, small, 4, memory=memory, prototypes=24)
    assert whole.branches.memory.ready and whole.branches.memory.revived > 0 and whole.bank.used.sum() > 0 and whole.spread.std() > 0
    if memory == "cluster": assert whole.groups.centres.abs().sum() > 0 and len(whole.bank.items) == len(whole.groups)
    for stop in (1, 2):
        folder = tmp_path/str(stop); folder.mkdir()
        def progress(stage, done, total):
            if done == stop*steps + 1: raise Interrupted
        with pytest.raises(Interrupted): trained(prepared, small, 4, memory=memory, prototypes=24, folder=folder, progress=progress)
        assert torch.load(folder/"checkpoint.pt", weights_only=True)["epoch"] == stop
        calls = []
        resumed = trained(prepared, small, 4, memory=memory, prototypes=24, folder=folder, progress=lambda s, d, t: calls.append(d))
        assert calls[0] == stop*steps + 1 and {"branches.memory.ready", "branches.memory.revived", "branches.memory.bank.used", "centre", "spread"} <= set(whole.state_dict())
        assert same(state(resumed), state(whole))

def test_bfloat16_trains_past_a_revival(prepared, small):
    "Embeddings kept under autocast are bfloat16, prototypes float32; `revive` brings them together."
    d = create(small, prototypes=64)
    train(d, make_rows(prepared, d), replace(d.recipe, epochs=2, batch=8), precision="bfloat16")
    assert all(torch.isfinite(v.float()).all() for v in d.state_dict().values())

# ---- no labels

def test_clusters_never_read_the_class(prepared, small):
    table = prepared.catalog.part(split="train")
    shuffled = table.assign(cls=np.random.default_rng(0).permutation(table.cls.to_numpy()))
    assert (shuffled.cls != table.cls).any() and (create(small).needs, create(small, memory="cluster").needs) == ({"pairs", "cls"}, {"pairs"})
    fed = []
    for t in (table, shuffled): d = create(small, memory="cluster"); fed.append([b for e in (None, 0) for b in feed(d, make_rows(prepared, d, t), 8, epoch=e)])
    for a, b in zip(*fed, strict=True):
        assert a.keys() == b.keys() and "cls" not in a and a["path"] == b["path"]
        assert all(torch.equal(p, q) for k in a if k != "path" for p, q in zip(*((x[k] if isinstance(x[k], list) else [x[k]]) for x in (a, b))))
    plain, random, more = (state(trained(prepared, small, 3, memory="cluster", **k)) for k in ({}, dict(table=shuffled), dict(classes=7)))
    assert same(plain, random) and same(plain, more)
    assert not same(*(state(trained(prepared, small, 2, table=t)) for t in (table, shuffled)))     # with memory=class it would show

def test_a_test_sees_features_only(prepared, small):
    assert list(inspect.signature(create(small).predict).parameters) == ["features", "size"]
    table = prepared.catalog.part(split="test")
    for memory in ("class", "cluster"):
        d = trained(prepared, small, memory=memory).eval()
        maps = [np.concatenate([b["maps"] for b in running.predictions(d, ImageDataset(prepared.catalog.root, t, 64, prepared.catalog.classes), 8, None, 0, "cpu")])
                for t in (table, table.assign(cls=list(reversed(table.cls)), kind="good", mask=""))]
        assert np.array_equal(*maps)

# ---- RD4AD as a special case

def test_distillation_without_a_memory_is_rd4ad(prepared, small, tmp_path):
    d = trained(prepared, small, 2, branches="distillation", memory="none", decoder="mirror"); parent = trained(prepared, small, 2, name="rd4ad")
    assert d.needs == frozenset() and d.defects is None and not any({"abnormal", "features_abnormal", "cls"} & set(b) for b in feed(d, make_rows(prepared), 8, epoch=0))
    ours = [v for k, v in d.state_dict().items() if k not in ("centre", "spread")]
    assert len(ours) == len(parent.state_dict()) and all(torch.equal(a, b) for a, b in zip(ours, parent.state_dict().values()))
    a, b = (run(make_spec(**SMALL | dict(epochs=2), detector=n, options=o), tmp_path) for n, o in (("rd4ad", {}), ("mddnet", dict(branches="distillation", memory="none"))))
    assert a.id != b.id and a.metrics == b.metrics and a.scores().equals(b.scores()) and np.array_equal(a.samples()["maps"], b.samples()["maps"])
    assert list(b.history()) == ["epoch", "step", "loss", "distillation"] and a.history().equals(b.history())

# ---- options

@pytest.mark.parametrize("options,option,why", [
    (dict(branches="restoration", fusion="sum"), "fusion='sum'", "branches=restoration"), (dict(branches="restoration", bottleneck="separate"), "bottleneck='separate'", "branches=restoration"),
    (dict(branches="distillation", dist_weight=.1), "dist_weight=0.1", "branches=distillation"), (dict(branches="distillation", anomaly_probability=1.), "anomaly_probability=1.0", "branches=distillation"),
    (dict(branches="distillation", textures="images"), "textures='images'", "branches=distillation"), (dict(branches="restoration", memory="class", memory_at="both"), "memory_at='both'", "branches=restoration"),
    (dict(memory="none", prototypes=8), "prototypes=8", "memory=none"), (dict(memory="none", read="concat"), "read='concat'", "memory=none"), (dict(memory="none", memory_at="both"), "memory_at='both'", "memory=none"),
    (dict(memory="class", groups=3), "groups=3", "memory=class"), (dict(groups=3), "groups=3", "memory=none"), (dict(memory="none", groups=1), "groups=1", "memory=none"),
    (dict(memory="class", memory_at="both", bottleneck="separate"), "bottleneck='separate'", "memory_at=both"), (dict(scale="normal", fusion="product"), "scale='normal'", "fusion=product"),
    (dict(fusion="max"), "fusion 'max'", "product"), (dict(memory="clas"), "memory 'clas'", "Did you mean 'class'"), (dict(branches="all"), "branches 'all'", "restoration"), (dict(prototype=3), "'prototype'", "prototypes"),
    (dict(scale="std"), "scale 'std'", "normal"), (dict(read="add"), "read 'add'", "replace"), (dict(decoder="heavy"), "decoder 'heavy'", "light"), (dict(memory_at="identity"), "memory_at 'identity'", "both"),
    (MEMORY | dict(prototypes=0), "prototypes=0", "1"), (dict(dist_weight=-.1), "dist_weight=-0.1", "0"), (dict(dist_weight=float("nan")), "dist_weight=nan", "0"), (dict(anomaly_probability=1.5), "anomaly_probability=1.5", "0 to 1"),
    (dict(memory="cluster", groups=0), "groups=0", "1"), (MEMORY | dict(prototypes="many"), "prototypes='many'", "number"), (MEMORY | dict(prototypes=True), "prototypes=True", "number"),
    (MEMORY | dict(prototypes=None), "prototypes=None", "32"), (dict(dist_weight=None), "dist_weight=None", "0.1"), (dict(anomaly_probability=None), "anomaly_probability=None", "1.0"), (dict(fusion=None), "fusion", "tr"), (dict(branches=None), "branches", "both"),
    (MEMORY | dict(prototypes=2.5), "prototypes=2.5", "number"), (dict(memory="cluster", groups=1.5), "groups=1.5", "number"), (dict(branches="bth", fusion="sum"), "branches 'bth'", "both"),
], ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "")
def test_what_cannot_be_is_refused_with_its_reason(small, options, option, why):
    with pytest.raises(SpecError) as e: create_detector("mddnet", small, classes=2, **options)
    assert option in str(e.value) and why in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(SpecError): prepare(make_spec(**SMALL, detector="mddnet", options=options))

IMPLIED = [(dict(), full_options("mddnet", {})), (dict(branches="restoration"), dict(fusion="tr", dist_weight=None, bottleneck=None, memory="none", memory_at=None, groups=None)),
           (dict(branches="distillation", memory="none"), dict(anomaly_probability=None, textures=None, prototypes=None, read=None, memory_at=None)), (MEMORY | dict(memory_at="both"), dict(bottleneck="shared")), (MEMORY | dict(branches="restoration"), dict(memory_at="restoration")),
           (dict(fusion="product"), dict(scale="raw")), (dict(memory="cluster"), dict(groups=None)), (dict(memory=None), dict(memory="none", prototypes=None)),
           # JSON tells 1 from 1.0, the identity does not
           (dict(), dict(anomaly_probability=1)), (dict(dist_weight=0), dict(dist_weight=0.))]

@pytest.mark.parametrize("options,spelled", IMPLIED, ids=lambda o: ",".join(o))
def test_one_method_has_one_id(options, spelled):
    of = lambda o: prepare(make_spec(**SMALL, detector="mddnet", options=o))
    short = of(options); long = of(options | spelled); again = of(short.canonical["options"])
    assert short.id == long.id == again.id and short.trained == long.trained
    text = flags(again.spec); text = dict(t.split("=", 1) for t in text[1:] if "=" in t and not t.startswith("--"))
    assert text and of(text).id == short.id and of(text).canonical["options"] == short.canonical["options"]     # as the command line would say it

def test_other_options_are_other_ids():
    of = lambda **o: prepare(make_spec(**SMALL, detector="mddnet", options=o))
    runs = [of(), of(memory="class"), of(memory="shared"), of(memory="cluster"), of(memory="cluster", groups=2), of(memory="class", read="replace"), of(memory="class", memory_at="both"), of(bottleneck="shared"), of(decoder="light"), of(dist_weight=0), of(branches="restoration")]
    assert len({p.id for p in runs}) == len({p.trained for p in runs}) == len(runs)
    test = [of(), of(fusion="sum"), of(fusion="ri"), of(scale="normal"), of(fusion="product")]
    assert len({p.id for p in test}) == len(test) and len({p.trained for p in test}) == 1
    assert of(branches="restoration").trained != of().trained and of(branches="distillation").trained == of(branches="distillation", scale="normal").trained

def test_without_a_memory_from_the_command_line(cli):
    args = [x for k, v in SMALL.items() for x in (f"--{k}", ",".join(map(str, v)) if isinstance(v, list) else v)]
    code, _, err = cli("run", *args, "--epochs", 0, "--detector", "mddnet", "--option", "memory=none", "--option", "decoder=light", "--out", "r")
    assert code == 0, err
    record, = Store("r").records()
    assert record.spec["options"]["memory"] == "none" and record.spec["options"]["prototypes"] is None and "predicted_cls" not in record.scores()
    assert prepare(make_spec(**SMALL | dict(epochs=0), detector="mddnet", options=record.spec["options"])).id == record.id
    code, _, err = cli("run", *args, "--detector", "mddnet", "--option", "memory=none", "--option", "prototypes=3")
    assert code == 2 and "prototypes=3" in err and "memory=none" in err and err.count("\n") == 1

# ---- runs that share their weights

@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "The spec, record and results folder of a run with its model."
    spec, out = make_spec(**SMALL, detector="mddnet", options=LIGHT), tmp_path_factory.mktemp("kept")
    return spec, run(spec, out, keep_model=True), out

def refuse_training(monkeypatch):
    def refused(*a, **k): raise Interrupted
    monkeypatch.setattr(running, "train", refused)

OTHERS = [dict(fusion="tr", scale="normal"), dict(fusion="product")]

def test_fusion_and_scale_need_no_training(kept, tmp_path, monkeypatch):
    spec, first, out = kept
    out = shutil.copytree(out, tmp_path/"copy")
    specs = [replace(spec, options=LIGHT | o) for o in OTHERS]
    scratch = [run(s, tmp_path/"scratch") for s in specs[:1]]                     # the model is not kept: each is trained
    refuse_training(monkeypatch)
    shared = [run(s, out) for s in specs]
    for r in shared:
        assert r.id != first.id and r.provenance["trained_by"] == first.id and r.provenance["trained"] == first.provenance["trained"] and r.history().empty and r.cost["train_s"] == first.cost["train_s"]
        assert not (r.folder/"model.safetensors").exists() and {k: r.provenance[k] for k in ("memory", "defect_textures")} == {k: first.provenance[k] for k in ("memory", "defect_textures")}
    a, b = shared[0], scratch[0]
    assert "trained_by" not in b.provenance and len(b.history()) and a.id == b.id and a.metrics == b.metrics and a.metrics != first.metrics
    assert (a.folder/"scores.csv").read_bytes() == (b.folder/"scores.csv").read_bytes() and np.array_equal(a.samples()["maps"], b.samples()["maps"])
    later = run(replace(specs[0], protocols=["exact", "dinomaly"]), out)                      # from the sibling's model
    assert later.id == a.id and later.metrics["exact"] == a.metrics["exact"] and list(later.metrics) == ["exact", "dinomaly"]
    assert later.metrics["exact"]["mean"] != later.metrics["dinomaly"]["mean"] and run(specs[1], out).metrics == shared[1].metrics

@pytest.mark.parametrize("how", ["other training", "no record", "no model", "other epochs", "other option"])
def test_a_model_that_was_trained_otherwise_is_not_taken(kept, tmp_path, monkeypatch, how):
    spec, first, out = kept
    out = shutil.copytree(out, tmp_path/"copy"); folder = out/"runs"/first.id; path = folder/"record.json"
    if how == "other training": d = json.loads(path.read_text()); d["provenance"]["trained"] = "0"*12; path.write_text(json.dumps(d))
    if how == "no record": path.unlink()
    if how == "no model": (folder/"model.safetensors").unlink()
    refuse_training(monkeypatch)
    other = replace(spec, options=LIGHT | OTHERS[0] | (dict(dist_weight=.2) if how == "other option" else {}), epochs=2 if how == "other epochs" else 1)
    with pytest.raises(Interrupted): run(other, out)

def test_the_record_says_how_often_the_class_was_right(kept):
    _, r, _ = kept
    s = r.scores(); right = [r.spec["classes"][g] == c for g, c in zip(s.predicted_cls, s.cls)]
    assert r.provenance["predicted_cls_right"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) <= 1 and "group_purity" not in r.provenance
    assert set(r.provenance["memory"]) == {"groups", "prototypes", "dead", "revived"} and r.provenance["memory"]["groups"] == 2 and r.provenance["memory"]["prototypes"] == 4

def test_the_class_number_is_the_catalogs_not_the_asked_order():
    "Asked for in another order, the same run."
    a, b = (prepare(make_spec(**SMALL | dict(classes=c), detector="mddnet")) for c in (["tile", "gear"], ["gear", "tile"]))
    assert a.id == b.id and a.catalog.classes == b.catalog.classes

def test_the_record_says_how_pure_the_groups_were(tmp_path):
    r = run(make_spec(**SMALL, detector="mddnet", options=LIGHT | dict(memory="cluster", groups=3)), tmp_path)
    s = r.scores(); most = sum(pd.Series(list(part.cls)).value_counts().iloc[0] for _, part in s.groupby("group"))
    assert r.provenance["group_purity"] == pytest.approx(most/len(s)) and "predicted_cls_right" not in r.provenance and set(s.group) <= {0, 1, 2} and r.provenance["memory"]["groups"] == 3

@pytest.mark.parametrize("scores,column,expected", [([("a", 0), ("a", 0), ("b", 0), ("b", 1)], "group", .75), ([("a", 1), ("b", 1), ("b", 0)], "predicted_cls", 1/3)])
def test_shares_by_hand(scores, column, expected):
    rows = pd.DataFrame(scores, columns=["cls", column])
    got = running.predicted_right({c: dict(scores=rows[rows.cls == c]) for c in ("a", "b")})
    assert list(got.values()) == [pytest.approx(expected)] and list(got) == ["group_purity" if column == "group" else "predicted_cls_right"]

# ---- clustering

def bundles(k, each, d=16, noise=.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.eye(d)[:k].repeat_interleave(each, 0) + noise*torch.randn(k*each, d, generator=g), dim=-1)

def test_kmeans_is_deterministic_and_takes_any_vectors():
    x = bundles(3, 20)[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    a = spherical_kmeans(x, 3); torch.rand(5)
    assert torch.equal(a, spherical_kmeans(x, 3)) and torch.allclose(a, spherical_kmeans(x*torch.linspace(.1, 9, 60)[:, None], 3), atol=1e-4)     # length does not count
    assert sorted(torch.bincount((x @ a.T).argmax(1)).tolist()) == [20, 20, 20] and torch.allclose(a.norm(dim=-1), torch.ones(3))
    for vectors, k in ((x[:2], 5), (x[:1].expand(30, -1), 4), (x[:1], 1)):
        c = spherical_kmeans(vectors, k)
        assert c.shape == (k, 16) and torch.isfinite(c).all() and (c @ F.normalize(vectors, dim=-1).T).amax(1).min() > .999
    assert torch.isfinite(spherical_kmeans(torch.zeros(5, 4), 3)).all()

def test_the_number_of_groups():
    centred = lambda x: F.normalize(x - x.mean(0), dim=-1)
    assert choose_groups(centred(bundles(3, 20))) == 3 and choose_groups(centred(bundles(5, 12))) == 5
    assert choose_groups(centred(torch.randn(80, 64, generator=torch.Generator().manual_seed(0)))) == 1
    assert choose_groups(centred(bundles(1, 1).expand(30, -1))) == 1 and all(choose_groups(bundles(1, n)) == 1 for n in (1, 2, 3))

def test_identical_images_are_one_group(small):
    x = pictures(1)
    g = Groups(small.channels)
    assert g.fit([dict(features=small(x.expand(n, -1, -1, -1))) for n in (8, 8, 3)]) == 1 and torch.isfinite(g.centres).all() and g(small(pictures(3, 5))).tolist() == [0]*3

def test_groups_are_found_kept_and_loaded(small):
    batch = dict(features=small(pictures(12)))
    for number, found in ((None, 2), (4, 4), (40, 12)):                                       # more than there are images
        d = create(small, memory="cluster", groups=number); hook(d, d.prepare, [batch])
        assert len(d.groups) == len(d.bank.items) == len(d.bank.used) == found and torch.isfinite(d.groups.centres).all()
        other = create(small, memory="cluster", groups=number, seed=1); other.load_state_dict(d.state_dict())
        assert same(state(d), state(other)) and torch.equal(d.groups(batch["features"]), other.groups(batch["features"]))
        with torch.no_grad(): assert torch.equal(d.eval()(pictures(2, 9)).map, other.eval()(pictures(2, 9)).map)
        assert d.bank.items.requires_grad and any(p is d.bank.items for p in d.param_groups()[1]["params"])

def test_groups_are_the_looks(small):
    d, batch = create(small, memory="cluster"), dict(features=small(pictures(12)))
    hook(d, d.prepare, [batch]); group = d.group_of(batch)
    assert torch.equal(group, (torch.arange(12) + group[0]) % 2)

def test_more_groups_than_the_only_image(small):
    "The state has one centre, the bank one group, and the new detector three empty centres: both must be brought to one."
    d = create(small, memory="cluster", groups=3); hook(d, d.prepare, [dict(features=small(pictures(1)))])
    other = create(small, memory="cluster", groups=3); other.load_state_dict(d.state_dict())
    assert same(state(d), state(other))

# ---- memory

def embedding(b=3, d=8, n=4, seed=0): return torch.randn(b, d, n, n, generator=torch.Generator().manual_seed(seed))

def test_a_group_with_fewer_positions_than_prototypes():
    torch.manual_seed(0); m, z = PrototypeMemory(3, 40, 8), embedding(1, n=2)
    before = m.items.detach().clone()
    init_prototypes(m, z, torch.tensor([1]))
    assert torch.isfinite(m.items).all() and torch.equal(m.items[0], before[0]) and torch.equal(m.items[2], before[2])      # groups without an image keep theirs
    near = F.normalize(m.items[1].detach(), dim=-1) @ F.normalize(z.flatten(2)[0].T, dim=-1).T
    assert near.amax(1).min() > .999 and near.amax(0).min() > .999                        # each prototype is a position, each position has one

def test_many_positions_are_thinned_over_all_of_them():
    "The last image's positions are as good as the first's."
    z = torch.stack([torch.eye(8)[i].view(8, 1, 1).expand(8, 30, 30) for i in range(5)]) + .01*embedding(5, n=30)
    torch.manual_seed(0); m = PrototypeMemory(1, 5, 8); init_prototypes(m, z, torch.zeros(5, dtype=torch.long), most=50)
    assert sorted(m.items[0].detach().argmax(1).tolist()) == list(range(5))

def test_revival_moves_the_dead_only():
    torch.manual_seed(0); m = PrototypeMemory(2, 6, 8); m.used[0, :3] = 2; m.used[1] = 1; before, z = m.items.detach().clone(), embedding(4).flatten(2).transpose(1, 2).flatten(0, 1)
    assert revive(m, {0: z, 1: z}) == 3
    now = F.normalize(m.items.detach(), dim=-1)
    assert torch.equal(m.items[0, :3], before[0, :3]) and torch.equal(m.items[1], before[1]) and torch.isfinite(m.items).all() and m.used.sum() == 0
    assert (now[0, 3:] @ F.normalize(z, dim=-1).T).amax(1).min() > .9999                   # each is an embedding,
    assert (now[0] @ now[0].T - 2*torch.eye(6)).max() < .999                               # and no two are one
    far = (F.normalize(z, dim=-1) @ F.normalize(before[0, :3], dim=-1).T).amax(1).argmin()
    assert torch.allclose(now[0, 3], F.normalize(z[far], dim=-1))                          # the one served worst comes first

def test_revival_of_a_wholly_unused_group():
    torch.manual_seed(0); m = PrototypeMemory(1, 3, 8); z = embedding(1).flatten(2)[0].T
    assert revive(m, {0: z}) == 3 and torch.isfinite(m.items).all() and (torch.pdist(m.items[0].detach()) > 1e-3).all()

def test_revival_with_fewer_embeddings_than_dead():
    "Three embeddings give three prototypes: four copies would be dead again at once, and counted as revived in every epoch."
    torch.manual_seed(0); m = PrototypeMemory(1, 8, 8); m.used[0, 0] = 1
    revived = revive(m, {0: embedding(1, n=4).flatten(2)[0].T[:3]})
    assert torch.isfinite(m.items).all() and revived <= 3 and (torch.pdist(F.normalize(m.items[0].detach(), dim=-1)) > 1e-3).all()

def test_revival_never_takes_an_embedding_without_a_direction():
    "After a ReLU a position may be all zero; its cosine, 0, is the smallest, yet it is no direction."
    torch.manual_seed(0); m = PrototypeMemory(1, 4, 8); m.items.data.abs_(); m.used[0, :3] = 1
    z = embedding(1).flatten(2)[0].T.abs() + .1; z[5] = 0
    revive(m, {0: z})
    assert (m.items.detach().norm(dim=-1) > .5).all()

@pytest.mark.parametrize("prototypes", [1, 2, 5])
def test_one_image_and_one_prototype_give_finite_terms(prototypes):
    torch.manual_seed(0); m = PrototypeMemory(2, prototypes, 8)
    terms = memory_losses(m, m.similarity(embedding(1)), torch.tensor([1])); sum(terms.values()).backward()
    assert all(torch.isfinite(t) for t in terms.values()) and torch.isfinite(m.items.grad).all() and class_logits(m.similarity(embedding(1))).shape == (1, 2)
    q, p = F.normalize(embedding(1).flatten(2)[0].T, dim=-1), F.normalize(m.items[1].detach(), dim=-1); d = torch.cdist(q, p).square().sort(1).values
    assert terms["compact"].item() == pytest.approx(d[:, 0].mean().item(), abs=1e-4)
    assert terms["separate"].item() == pytest.approx((d[:, 0] - d[:, min(1, prototypes - 1)] + 1).clamp(min=0).mean().item(), abs=1e-4)

def test_a_batch_of_one_image_and_one_prototype(small):
    d, batch = create(small, prototypes=1), a_batch(small, 1)
    hook(d, d.on_epoch, 0, [a_batch(small)])
    assert all(torch.isfinite(t) for t in d.losses(batch).values()); hook(d, d.on_epoch, 1, [])
    assert d.facts()["memory"]["prototypes"] == 1 and torch.isfinite(d.bank.items).all()

# ---- studies

def test_arms_by_name():
    small_ = dict(data="embedded-v1-smoke", size=64, layers="1,2", epochs=1)
    study = load_study("decoders", arms="RI,TR", seed="0,1", **small_)
    named = study.named_specs()
    assert [(a, s.seed) for a, s in named] == [("TR", 0), ("TR", 1), ("RI", 0), ("RI", 1)]        # the study's order
    names = study.names()
    assert names == {prepare(s).id: a for a, s in named} and list(names.values()) == ["TR", "TR", "RI", "RI"] and study.parameters()["arms"] == ["TR", "RI"]
    assert [s.options["fusion"] for _, s in named] == ["tr", "tr", "ri", "ri"] and all(s.options["decoder"] == "light" for _, s in named)
    with pytest.raises(SpecError, match="unknown arm of the study decoders 'TRI'.*'TR'"): load_study("decoders", arms="TRI")
    with pytest.raises(SpecError, match="arms"): load_study("benchmark", arms="TR")

@pytest.mark.parametrize("name", ["decoders", "memory"])
def test_no_two_arms_are_the_same_run_and_all_can_be(name):
    study = load_study(name, data="embedded-v1-smoke", size=64, layers="1,2", seed=0)
    assert list(study.names().values()) == list(study.arms)

def test_two_arms_that_share_weights_are_trained_once(tmp_path):
    swept = sweep(load_study("decoders", arms="TR,RI", seed=0, data="embedded-v1-smoke", classes="gear,tile", size=64, layers="1,2", epochs=1), tmp_path, plain=True)
    assert not swept.failures, swept.failures
    a, b = swept.records
    assert a.provenance["trained"] == b.provenance["trained"] and (a.spec["options"]["fusion"], b.spec["options"]["fusion"]) == ("tr", "ri") and a.metrics != b.metrics
    assert b.provenance["trained_by"] == a.id and "trained_by" not in a.provenance and len(a.history()) and b.history().empty and b.cost["train_s"] == a.cost["train_s"]
