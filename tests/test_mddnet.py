"MDD-Net: its options, losses and maps, its training through the real loop, and the runs that share weights."
import inspect, itertools, json, shutil
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest, torch
import torch.nn.functional as F
import mdd_bench.running.models as models
from mdd_bench.data.images import Framing
from mdd_bench.data.defects import Defects
from mdd_bench.data.loading import ImageDataset
from mdd_bench.detectors.detector import create_detector, full_options
from mdd_bench.detectors.mddnet import FUSIONS, discrepancy_maps, dist_loss
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone, hash_weights
from mdd_bench.parts.discrepancy import fuse_levels
from mdd_bench.running.identity import resolve
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec
from mdd_bench.running.store import Store
from mdd_bench.running.study import load_study, notebook_parameters
from mdd_bench.running.sweep import sweep
from mdd_bench.running.testing import prediction_quality, predictions
from mdd_bench.running.training import TrainingData, feed, train
from conftest import SMALL, flags_of

UNDEFINED = "ignore::mdd_bench.evaluation.metrics.UndefinedMetric"
pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM", UNDEFINED)
PYRAMIDS = [
    ("resnet18", None, [4, 8, 16], False),
    ("resnet18", [2, 3, 4], [8, 16, 32], False),
    ("mobilenetv3_small_100", None, [4, 8, 16], True),
]
BRANCHES = ("both", "restoration", "distillation")
MEMORIES = ("class", "none", "shared", "cluster")
LIGHT = dict(decoder="light", memory="class", prototypes=4, fusion="sum", scale="raw")
CLASS_MEMORY = dict(memory="class")
MEMORY_TERMS = {"class", "compact", "separate"}

class Interrupted(Exception): pass

@pytest.fixture(scope="module", params=PYRAMIDS, ids=lambda p: f"{p[0]}-{p[2]}")
def pyramid(request):
    name, layers, strides, signed = request.param
    backbone = Backbone(name, "random", layers)
    assert backbone.strides == strides
    assert backbone.signed == [signed]*3
    return backbone

@pytest.fixture(scope="module")
def small(): return Backbone("resnet18", "procedural", [1, 2])

@pytest.fixture(scope="module")
def catalog(): return resolve(make_spec(**SMALL, detector="mddnet")).dataset.catalog

def stripes(n, seed=0, size=64):
    "n images of stripes of two looks, one after the other."
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    look = (torch.arange(n) % 2).view(-1, 1, 1)
    phase = 6.28*torch.rand(n, 1, 1, generator=generator)
    noise = .05*torch.randn(n, size, size, generator=generator)
    waves = .5 + .35*torch.sin(.8*(x + look*y) + phase) + noise
    return waves.clamp(0, 1).unsqueeze(1).expand(-1, 3, -1, -1).clone()

def make_batch(backbone, n=4, classes=2):
    "A training batch with all that any variant needs: the same rectangle of noise in every image."
    normal, mask = stripes(n), torch.zeros(n, 64, 64, dtype=torch.bool)
    mask[:, 10:30, 20:44] = True
    noise = torch.rand(normal.shape, generator=torch.Generator().manual_seed(1))
    abnormal = torch.where(mask[:, None], noise, normal)
    return dict(image=normal, features=backbone(normal), features_abnormal=backbone(abnormal), mask=mask,
                cls=torch.arange(n) % classes)

def create(backbone, classes=2, seed=0, **options):
    "MDD-Net with the options of LIGHT, where they can be, and the given ones."
    torch.manual_seed(seed)
    defaults = dict(LIGHT)
    if options.get("memory") == "none": del defaults["prototypes"]
    if options.get("branches", "both") != "both": del defaults["fusion"]
    return create_detector("mddnet", backbone, classes, **defaults | options)

def call_hook(hook, *args):
    "Call a hook as the training loop does; returns the detector, training again."
    detector = hook.__self__
    detector.eval()
    with torch.no_grad(): hook(*args)
    return detector.train()

def optimizer_of(detector): return torch.optim.Adam(detector.param_groups(), lr=5e-3, betas=(.5, .999))

def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def state(module): return {name: tensor.clone() for name, tensor in module.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def items(detector): return detector.network.memory.prototypes.items

def used(detector): return detector.network.memory.prototypes.used

def level_maps(detector, features): return discrepancy_maps(features, detector.network(features))

def training_images(catalog, detector=None, table=None):
    "The normal training images, with the defects that the detector asks for."
    table = catalog.part(split="train") if table is None else table
    images = ImageDataset(catalog.root, table, Framing(64), catalog.classes)
    if detector is not None and detector.defects:
        images.defects = Defects(**detector.defects, seed=0, images=images)
    return images

def train_on(catalog, detector, epochs=1, table=None, folder=None, progress=None, precision="float32"):
    "Train a detector through the real loop, with a checkpoint after each epoch where there is a folder."
    recipe = replace(detector.recipe, epochs=epochs, batch=8)
    runtime = Runtime(progress=progress) if progress else Runtime()
    data = TrainingData(training_images(catalog, detector, table))
    train(detector, data, recipe, runtime, precision=precision, folder=folder, save_every=0)
    return detector

# ---- shapes and ranges

def variants(decoder):
    "(branches, memory): all combinations of the light decoders, a few of the mirrored ones."
    if decoder == "light": return list(itertools.product(BRANCHES, MEMORIES))
    return list(zip([*BRANCHES, "both"], MEMORIES))

def expected_terms(branches, memory):
    terms = {"distillation" if branches == "distillation" else "restoration"}
    if branches == "both": terms |= {"identity", "dist"}
    return terms | (MEMORY_TERMS if memory != "none" else set())

@pytest.mark.parametrize("decoder", ["mirror", "light"])
def test_every_branch_and_memory_gives_a_finite_map_of_the_inputs_size(pyramid, decoder):
    batch = make_batch(pyramid)
    for branches, memory in variants(decoder):
        detector = create(pyramid, branches=branches, memory=memory, decoder=decoder)
        call_hook(detector.prepare, [batch])
        call_hook(detector.on_epoch, 0, [batch])
        assert (detector.network.memory is None) == (memory == "none")
        assert memory == "none" or detector.network.memory.ready
        terms = detector.losses(batch)
        assert all(term.ndim == 0 and torch.isfinite(term) for term in terms.values())
        assert set(terms) == expected_terms(branches, memory)
        detector.eval()
        with torch.no_grad():
            prediction = detector(batch["image"][:3])
            oblong = detector(torch.rand(1, 3, 64, 128))
        assert prediction.map.shape == (3, 64, 64) and oblong.map.shape == (1, 64, 128)
        assert torch.isfinite(prediction.map).all() and prediction.score is None
        assert list(prediction.extra) == {"class": ["predicted_cls"], "cluster": ["group"]}.get(memory, [])
        assert all(value.shape == (3,) for value in prediction.extra.values())

def test_raw_maps_stay_within_their_range(pyramid):
    "A level's discrepancy is at most 1 between rectified features, as a mask is; 2 between signed ones."
    detector, batch = create(pyramid, memory="none").eval(), make_batch(pyramid)
    signed = pyramid.signed[0]
    most = 2. if signed else 1.
    with torch.no_grad(): maps = level_maps(detector, batch["features_abnormal"])
    assert len(maps.tr) == len(maps.ri) == 3
    levels = [*maps.tr, *maps.ri]
    assert all(m.min() > -1e-5 and m.max() < most + 1e-5 for m in levels)
    assert signed == any(m.max() > 1.01 for m in levels)
    for fusion in ("tr", "ri"):
        detector.fusion = fusion
        m = detector(batch["image"]).map.detach()
        assert m.min() > -1e-4
        assert .01 < m.max() < 3*most + 1e-4

def test_fusions_are_made_of_the_two_maps(small):
    detector, features = create(small, memory="none").eval(), make_batch(small)["features"]
    maps = {}
    for fusion in FUSIONS:
        detector.fusion = fusion
        with torch.no_grad(): maps[fusion] = detector.predict(features, (64, 64)).map
    assert not torch.equal(maps["tr"], maps["ri"])
    torch.testing.assert_close(maps["sum"], maps["tr"] + maps["ri"])
    torch.testing.assert_close(maps["product"], maps["tr"]*maps["ri"])

# ---- losses

@pytest.mark.parametrize("i,j", [(0, 0), (61, 61), (0, 61), (15, 33), (30, 7)])
@pytest.mark.parametrize("side", [16, 8, 4])
def test_a_defect_of_three_pixels_exists_at_every_level(i, j, side):
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, i:i+3, j:j+3] = True
    stride = 64//side
    touched = {(row//stride, column//stride) for row in range(i, i + 3) for column in range(j, j + 3)}
    restored = torch.rand(1, 6, side, side, generator=torch.Generator().manual_seed(side)) + .1
    assert dist_loss([restored], [restored], mask).item() == pytest.approx(len(touched)/side**2, abs=1e-5)
    identity = restored.clone()
    for row, column in touched:                        # at right angles there, and nowhere else
        identity[0, :, row, column] = 0
        identity[0, 0, row, column] = 1
        restored[0, 0, row, column] = 0
    assert dist_loss([restored], [identity], mask).item() < 1e-5

@pytest.mark.parametrize("term,most", [
    ("restoration", .9),
    ("identity", .9),
    ("dist", .9),
    ("class", .9),
    ("compact", .9),
    ("separate", .98),
])
def test_each_term_falls_when_it_is_followed(small, term, most):
    "Prototypes start at random, so that the class term has something to learn."
    detector, batch = create(small), make_batch(small)
    detector.network.memory.ready.fill_(True)
    optimizer, values = optimizer_of(detector), []
    for _ in range(15):
        loss = detector.losses(batch)[term]
        values.append(loss.item())
        step(optimizer, loss)
    assert 0 <= values[-1] < most*values[0], values

def test_all_terms_fall_together(small):
    detector, batch = create(small), make_batch(small, 6)
    batch["cls"] = torch.tensor([0, 0, 1, 1, 1, 0])    # names against looks
    call_hook(detector.on_epoch, 0, [batch])
    drawn = torch.rand(items(detector).shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): items(detector).copy_(F.normalize(drawn, dim=-1))
    optimizer, curve = optimizer_of(detector), []
    for _ in range(25):
        terms = detector.losses(batch)
        curve.append({name: term.item() for name, term in terms.items()})
        step(optimizer, sum(terms.values()))
    first, last = curve[0], curve[-1]
    assert set(first) == {"restoration", "identity", "dist"} | MEMORY_TERMS
    assert all(last[name] < .97*first[name] for name in first), (first, last)

def test_the_weight_of_dist_is_a_weight(small):
    batch = make_batch(small)
    tenth, whole = (create(small, memory="none", dist_weight=w).losses(batch) for w in (.1, 1.))
    assert whole["dist"].item() == pytest.approx(10*tenth["dist"].item())
    assert whole["identity"] == tenth["identity"]

@pytest.mark.parametrize("read,softly", [("concat", True), ("replace", False)])
def test_the_memory_opens_softly(small, read, softly):
    "The 1x1 convolution begins as identity, so the decoders see no jump; with read=replace there is one."
    batch, detector = make_batch(small), create(small, read=read).eval()
    with torch.no_grad():
        closed = detector.predict(batch["features"], (64, 64)).map
        detector.on_epoch(0, [batch])
        opened = detector.predict(batch["features"], (64, 64)).map
    assert torch.allclose(closed, opened, atol=1e-5) == softly

# ---- training

def test_the_teacher_stays(catalog, small):
    before, hashed = state(small), hash_weights(small)
    detector = train_on(catalog, create(small), epochs=2)
    detector.train()
    small.train()
    sum(detector.losses(make_batch(small)).values()).backward()
    assert same(state(small), before) and hash_weights(small) == hashed
    assert not any(module.training for module in small.modules())
    assert not any("backbone" in name for name in detector.state_dict())
    assert not any(p is q for p in detector.parameters() for q in small.parameters())

def batch_statistics(detector):
    return {k: v.clone() for k, v in detector.state_dict().items() if "running_" in k or "num_batches" in k}

def watch_hook(detector, name, check, seen):
    "Let `check` see the batches of a hook, and see that the hook leaves the batch statistics alone."
    hook = getattr(detector, name)
    def watched(*args):
        *rest, batches = args
        before, batches = batch_statistics(detector), list(batches)
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in detector.modules())
        check(batches)
        hook(*rest, batches)
        assert before and same(batch_statistics(detector), before)
        seen.append(name)
    detector.__dict__[name] = watched

def test_hooks_see_clean_images_in_order_and_change_no_statistics(catalog, small):
    detector, seen = create(small), []
    images = training_images(catalog, detector)
    clean = small(torch.stack([torch.from_numpy(images.image(i)) for i in range(len(images))]))
    def check(batches):
        assert [path for b in batches for path in b["path"]] == list(images.paths)
        assert torch.cat([b["index"] for b in batches]).tolist() == list(range(len(images)))
        assert not any({"abnormal", "features_abnormal", "mask"} & set(b) for b in batches)
        for k, level in enumerate(clean):
            given = torch.cat([b["features"][k] for b in batches])
            assert torch.allclose(given, level, atol=1e-2, rtol=1e-2)
    for name in ("prepare", "on_epoch", "finish"): watch_hook(detector, name, check, seen)
    train_on(catalog, detector, epochs=3)
    assert seen == ["prepare"] + ["on_epoch"]*3 + ["finish"]
    assert detector.network.memory.ready

@pytest.mark.parametrize("branches", ["both", "restoration"])
def test_normal_scale_is_mean_and_deviation_of_the_training_normals(catalog, small, branches):
    detector = train_on(catalog, create(small, branches=branches, memory="none", scale="normal")).eval()
    images, scale = training_images(catalog), detector.level_scale
    features = small(torch.stack([torch.from_numpy(images.image(i)) for i in range(len(images))]))
    with torch.no_grad():
        maps = [levels for levels in level_maps(detector, features) if levels is not None]
        predicted = detector.predict(features, (64, 64)).map
    assert len(maps) == (2 if branches == "both" else 1)
    by_hand = 0
    for k, levels in enumerate(maps):
        for i, m in enumerate(levels):
            mean, deviation = m.double().mean().item(), m.double().std(unbiased=False).item()
            assert scale.mean[k, i].item() == pytest.approx(mean, rel=1e-4)
            assert scale.deviation[k, i].item() == pytest.approx(deviation, rel=1e-3)
        by_hand = by_hand + fuse_levels([(m - m.mean())/m.std(unbiased=False) for m in levels], (64, 64))
    torch.testing.assert_close(predicted, by_hand, atol=1e-2, rtol=1e-2)

@pytest.mark.parametrize("memory", ["class", "cluster"])
def test_an_interrupted_training_goes_on_to_the_same_bits(catalog, small, memory, tmp_path):
    "Stopped in epoch 1 (the memory has just opened) and in epoch 2 of four; buffers included."
    def start(**how): return train_on(catalog, create(small, memory=memory, prototypes=24), 4, **how)
    steps = -(-len(training_images(catalog))//8)
    whole = start()
    assert whole.network.memory.ready and whole.network.memory.revived > 0
    assert used(whole).sum() > 0 and whole.level_scale.deviation.std() > 0
    names = ("ready", "revived", "prototypes.used")
    kept = {f"network.memory.{name}" for name in names} | {"level_scale.mean", "level_scale.deviation"}
    assert kept <= set(whole.state_dict())
    if memory == "cluster":
        clusters = whole.network.memory.groups.clusters
        assert clusters.centres.abs().sum() > 0 and len(items(whole)) == len(clusters)
    for stop in (1, 2):
        folder, calls = tmp_path/str(stop), []
        folder.mkdir()
        def interrupt(stage, done, total):
            if done == stop*steps + 1: raise Interrupted
        with pytest.raises(Interrupted): start(folder=folder, progress=interrupt)
        assert torch.load(folder/"checkpoint.pt", weights_only=True)["epoch"] == stop
        resumed = start(folder=folder, progress=lambda stage, done, total: calls.append(done))
        assert calls[0] == stop*steps + 1
        assert same(state(resumed), state(whole))

def test_bfloat16_trains_past_a_revival(catalog, small):
    "Embeddings kept under autocast are bfloat16, prototypes float32; `revive` brings them together."
    detector = train_on(catalog, create(small, prototypes=64), epochs=2, precision="bfloat16")
    assert all(torch.isfinite(tensor.float()).all() for tensor in detector.state_dict().values())

def test_a_batch_of_one_image_and_one_prototype(small):
    detector = create(small, prototypes=1)
    call_hook(detector.on_epoch, 0, [make_batch(small)])
    assert all(torch.isfinite(term) for term in detector.losses(make_batch(small, 1)).values())
    call_hook(detector.on_epoch, 1, [])
    assert detector.facts()["memory"]["prototypes"] == 1
    assert torch.isfinite(items(detector)).all()

# ---- no labels

def all_batches(catalog, detector, table):
    "What a detector is fed for its hooks, and in the first epoch."
    images = training_images(catalog, detector, table)
    return [b for epoch in (None, 0) for b in feed(detector, images, 8, Runtime(), epoch=epoch)]

def same_batch(a, b):
    "Whether two batches hold the same, level by level where a value has levels."
    def tensors(value): return value if isinstance(value, list) else [value]
    if a.keys() != b.keys() or a["path"] != b["path"]: return False
    for name in a.keys() - {"path"}:
        pairs = zip(tensors(a[name]), tensors(b[name]), strict=True)
        if not all(torch.equal(p, q) for p, q in pairs): return False
    return True

def shuffled_classes(table):
    shuffled = table.assign(cls=np.random.default_rng(0).permutation(table.cls.to_numpy()))
    assert (shuffled.cls != table.cls).any()
    return shuffled

def test_clusters_are_fed_no_class(catalog, small):
    detector, table = create(small, memory="cluster"), catalog.part(split="train")
    assert detector.needs == {"pairs"} and create(small).needs == {"pairs", "cls"}
    as_named, as_shuffled = (all_batches(catalog, detector, t) for t in (table, shuffled_classes(table)))
    for a, b in zip(as_named, as_shuffled, strict=True):
        assert "cls" not in a and same_batch(a, b)

def test_clusters_train_without_the_class(catalog, small):
    shuffled = shuffled_classes(catalog.part(split="train"))
    def trained(classes=2, table=None):
        return state(train_on(catalog, create(small, classes, memory="cluster"), epochs=3, table=table))
    expected = trained()
    assert same(expected, trained(table=shuffled))
    assert same(expected, trained(classes=7))
    as_named, as_shuffled = (state(train_on(catalog, create(small), 2, table)) for table in (None, shuffled))
    assert not same(as_named, as_shuffled)                      # with memory=class it would show

@pytest.mark.parametrize("memory", ["class", "cluster"])
def test_a_test_sees_features_only(catalog, small, memory):
    detector = train_on(catalog, create(small, memory=memory)).eval()
    assert list(inspect.signature(detector.predict).parameters) == ["features", "size"]
    def test_maps(table):
        images = ImageDataset(catalog.root, table, Framing(64), catalog.classes)
        return np.concatenate([batch.maps.numpy() for batch in predictions(detector, images, 8, Runtime())])
    table = catalog.part(split="test")
    renamed = table.assign(cls=list(reversed(table.cls)), kind="good", mask="")
    assert np.array_equal(test_maps(table), test_maps(renamed))

# ---- clusters

def test_groups_are_found_kept_and_loaded(small):
    batch = dict(features=small(stripes(12)))
    for number, found in ((None, 2), (4, 4), (40, 12)):         # more than there are images
        detector = create(small, memory="cluster", groups=number)
        call_hook(detector.prepare, [batch])
        clusters = detector.network.memory.groups.clusters
        assert len(clusters) == len(items(detector)) == len(used(detector)) == found
        assert torch.isfinite(clusters.centres).all()
        assert items(detector).requires_grad
        assert any(p is items(detector) for p in detector.param_groups()[1]["params"])
        loaded = create(small, memory="cluster", groups=number, seed=1)
        loaded.load_state_dict(detector.state_dict())
        assert same(state(detector), state(loaded))
        assert torch.equal(detector.network.memory.groups(batch), loaded.network.memory.groups(batch))
        with torch.no_grad():
            assert torch.equal(detector.eval()(stripes(2, 9)).map, loaded.eval()(stripes(2, 9)).map)

def test_groups_are_the_looks(small):
    detector, batch = create(small, memory="cluster"), dict(features=small(stripes(12)))
    call_hook(detector.prepare, [batch])
    group = detector.network.memory.groups(batch)
    assert torch.equal(group, (torch.arange(12) + group[0]) % 2)

def test_more_groups_than_the_only_image(small):
    "The state has one centre and one group of prototypes, the new detector three centres and one group."
    detector = create(small, memory="cluster", groups=3)
    call_hook(detector.prepare, [dict(features=small(stripes(1)))])
    loaded = create(small, memory="cluster", groups=3)
    loaded.load_state_dict(detector.state_dict())
    assert same(state(detector), state(loaded))

# ---- RD4AD as a special case

RD4AD_OPTIONS = dict(branches="distillation", memory="none", scale="raw")

def test_distillation_without_a_memory_has_rd4ads_weights(catalog, small):
    detector = train_on(catalog, create(small, decoder="mirror", **RD4AD_OPTIONS), epochs=2)
    torch.manual_seed(0)
    parent = train_on(catalog, create_detector("rd4ad", small, 2), epochs=2)
    weights = [tensor for name, tensor in detector.state_dict().items() if not name.startswith("level_scale")]
    parent_weights = list(parent.state_dict().values())
    assert len(weights) == len(parent_weights)
    assert all(torch.equal(a, b) for a, b in zip(weights, parent_weights))

def test_distillation_without_a_memory_is_fed_as_rd4ad(catalog, small):
    detector = create(small, **RD4AD_OPTIONS)
    assert detector.needs == frozenset() and detector.defects is None
    for batch in feed(detector, training_images(catalog), 8, Runtime(), epoch=0):
        assert not {"abnormal", "features_abnormal", "cls"} & set(batch)

def test_distillation_without_a_memory_has_rd4ads_record(tmp_path):
    settings = SMALL | dict(epochs=2)
    parent = run(make_spec(**settings, detector="rd4ad"), tmp_path)
    special_case = run(make_spec(**settings, detector="mddnet", options=RD4AD_OPTIONS), tmp_path)
    assert parent.id != special_case.id
    assert parent.metrics == special_case.metrics
    assert parent.scores().equals(special_case.scores())
    assert np.array_equal(parent.samples().maps, special_case.samples().maps)
    assert list(special_case.history()) == ["epoch", "step", "loss", "distillation"]
    assert parent.history().equals(special_case.history())

# ---- options

REFUSED = [    # (options, what the message must name, and the reason or the remedy)
    (dict(branches="restoration", fusion="sum"), "fusion='sum'", "branches!=both"),
    (dict(branches="restoration", bottleneck="separate"), "bottleneck='separate'", "branches!=both"),
    (dict(branches="distillation", dist_weight=.1), "dist_weight=0.1", "branches!=both"),
    (dict(branches="distillation", anomaly_probability=1.),
     "anomaly_probability=1.0", "branches=distillation"),
    (dict(branches="distillation", textures="images"), "textures='images'", "branches=distillation"),
    (dict(branches="restoration", memory="class", memory_at="both"), "memory_at='both'", "branches!=both"),
    (dict(memory="none", prototypes=8), "prototypes=8", "memory=none"),
    (dict(memory="none", read="concat"), "read='concat'", "memory=none"),
    (dict(memory="none", memory_at="both"), "memory_at='both'", "memory=none"),
    (dict(memory="class", groups=3), "groups=3", "memory!=cluster"),
    (dict(groups=3), "groups=3", "memory!=cluster"),
    (dict(memory="none", groups=1), "groups=1", "memory!=cluster"),
    (dict(memory="class", memory_at="both", bottleneck="separate"),
     "bottleneck='separate'", "memory_at=both"),
    (dict(scale="normal", fusion="product"), "scale='normal'", "fusion=product"),
    (dict(fusion="max"), "fusion 'max'", "product"),
    (dict(memory="clas"), "memory 'clas'", "Did you mean 'class'"),
    (dict(branches="all"), "branches 'all'", "restoration"),
    (dict(prototype=3), "'prototype'", "prototypes"),
    (dict(scale="std"), "scale 'std'", "normal"),
    (dict(read="add"), "read 'add'", "replace"),
    (dict(read="add", **CLASS_MEMORY), "read 'add'", "replace"),
    (dict(decoder="heavy"), "decoder 'heavy'", "light"),
    (dict(memory_at="identity"), "memory_at 'identity'", "both"),
    (dict(memory_at="identity", **CLASS_MEMORY), "memory_at 'identity'", "both"),
    (dict(prototypes=0, **CLASS_MEMORY), "prototypes=0", "1"),
    (dict(dist_weight=-.1), "dist_weight=-0.1", "0"),
    (dict(dist_weight=float("nan")), "dist_weight=nan", "0"),
    (dict(anomaly_probability=1.5), "anomaly_probability=1.5", "0 to 1"),
    (dict(memory="cluster", groups=0), "groups=0", "1"),
    (dict(prototypes="many", **CLASS_MEMORY), "prototypes='many'", "number"),
    (dict(prototypes=True, **CLASS_MEMORY), "prototypes=True", "number"),
    (dict(prototypes=None, **CLASS_MEMORY), "prototypes=None", "32"),
    (dict(dist_weight=None), "dist_weight=None", "0.1"),
    (dict(anomaly_probability=None), "anomaly_probability=None", "1.0"),
    (dict(fusion=None), "fusion", "tr"),
    (dict(branches=None), "branches", "both"),
    (dict(prototypes=2.5, **CLASS_MEMORY), "prototypes=2.5", "number"),
    (dict(memory="cluster", groups=1.5), "groups=1.5", "number"),
    (dict(branches="bth", fusion="sum"), "branches 'bth'", "both"),
]

def option_names(value):
    return ",".join(f"{name}={chosen}" for name, chosen in value.items()) if isinstance(value, dict) else ""

@pytest.mark.parametrize("options,culprit,reason", REFUSED, ids=option_names)
def test_what_cannot_be_is_refused_with_its_reason(small, options, culprit, reason):
    with pytest.raises(SpecError) as error: create_detector("mddnet", small, classes=2, **options)
    message = str(error.value)
    assert culprit in message and reason in message and "\n" not in message
    with pytest.raises(SpecError): resolve(make_spec(**SMALL, detector="mddnet", options=options))

IMPLIED = [    # (options, what they imply)
    (dict(), full_options("mddnet", {})),
    (dict(branches="restoration"),
     dict(fusion="tr", dist_weight=None, bottleneck=None, memory_at="restoration", groups=None)),
    (dict(branches="distillation", memory="none"),
     dict(anomaly_probability=None, textures=None, prototypes=None, read=None, memory_at=None)),
    (CLASS_MEMORY | dict(memory_at="both"), dict(bottleneck="shared")),
    (CLASS_MEMORY | dict(branches="restoration"), dict(memory_at="restoration")),
    (dict(fusion="product"), dict(scale="raw")),
    (dict(memory="cluster"), dict(groups=None)),
    (dict(memory=None), dict(memory="none", prototypes=None)),
    (dict(), dict(anomaly_probability=1)),      # JSON tells 1 from 1.0, the identity does not
    (dict(dist_weight=0), dict(dist_weight=0.)),
]

def resolved(options): return resolve(make_spec(**SMALL, detector="mddnet", options=options))

@pytest.mark.parametrize("options,implied", IMPLIED, ids=lambda o: ",".join(o))
def test_one_method_has_one_id(options, implied):
    short, long = resolved(options), resolved(options | implied)
    complete = resolved(short.options)
    assert short.run_id == long.run_id == complete.run_id
    assert short.training_id == long.training_id
    arguments = flags_of(complete.spec)
    written = [value for flag, value in zip(arguments, arguments[1:]) if flag == "--option"]
    from_text = resolved(dict(text.split("=", 1) for text in written))
    assert written and from_text.run_id == short.run_id
    assert from_text.options == short.options                  # as the command line would say it

def test_other_options_are_other_ids():
    trainings = [resolved(options) for options in (
        dict(),
        dict(memory="none"),
        dict(memory="shared"),
        dict(memory="cluster"),
        dict(memory="cluster", groups=2),
        dict(read="replace"),
        dict(memory_at="both"),
        dict(bottleneck="separate"),
        dict(decoder="light"),
        dict(dist_weight=0),
        dict(branches="restoration"),
        dict(branches="distillation"),
    )]
    assert len({r.run_id for r in trainings}) == len({r.training_id for r in trainings}) == len(trainings)

def test_fusion_and_scale_share_a_training():
    options = (dict(), dict(fusion="sum"), dict(fusion="ri"), dict(scale="raw"), dict(fusion="product"))
    tests = [resolved(o) for o in options]
    assert len({r.run_id for r in tests}) == len(tests)
    assert len({r.training_id for r in tests}) == 1
    distillation = [resolved(dict(branches="distillation", scale=scale)) for scale in ("raw", "normal")]
    assert len({r.training_id for r in distillation}) == 1

def test_without_a_memory_from_the_command_line(cli):
    arguments = []
    for name, value in SMALL.items():
        arguments += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else value]
    arguments += ["--detector", "mddnet", "--option", "memory=none"]
    code, _, err = cli("run", *arguments, "--epochs", 0, "--option", "decoder=light", "--out", "r")
    assert code == 0, err
    record, = Store("r").records()
    options = record.spec["options"]
    assert options["memory"] == "none" and options["prototypes"] is None
    assert "predicted_cls" not in record.scores()
    spec = make_spec(**SMALL | dict(epochs=0), detector="mddnet", options=options)
    assert resolve(spec).run_id == record.id
    code, _, err = cli("run", *arguments, "--option", "prototypes=3")
    assert code == 2
    assert "prototypes=3" in err and "memory=none" in err and err.count("\n") == 1

# ---- runs that share their weights

@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "The spec, record and results folder of a run with its model."
    spec, out = make_spec(**SMALL, detector="mddnet", options=LIGHT), tmp_path_factory.mktemp("kept")
    return spec, run(spec, out, keep_model=True), out

def refuse_training(monkeypatch):
    def refused(*args, **options): raise Interrupted
    monkeypatch.setattr(models, "train", refused)

TEST_ONLY = [dict(fusion="tr", scale="normal"), dict(fusion="product")]

def test_fusion_and_scale_need_no_training(kept, tmp_path, monkeypatch):
    spec, first, out = kept
    out = shutil.copytree(out, tmp_path/"copy")
    specs = [replace(spec, options=LIGHT | options) for options in TEST_ONLY]
    scratch = run(specs[0], tmp_path/"scratch")                # no model is kept there: it is trained
    refuse_training(monkeypatch)
    shared = [run(s, out) for s in specs]
    for record in shared:
        assert record.id != first.id and record.provenance["trained_by"] == first.id
        assert record.history().empty and record.cost["train_s"] == first.cost["train_s"]
        assert not (record.folder/"model.safetensors").exists()
        for name in ("training_id", "memory", "defect_textures"):
            assert record.provenance[name] == first.provenance[name]
    assert "trained_by" not in scratch.provenance and len(scratch.history())
    assert shared[0].id == scratch.id
    assert shared[0].metrics == scratch.metrics != first.metrics
    assert (shared[0].folder/"scores.csv").read_bytes() == (scratch.folder/"scores.csv").read_bytes()
    assert np.array_equal(shared[0].samples().maps, scratch.samples().maps)

def test_a_protocol_is_added_from_a_siblings_model(kept, tmp_path, monkeypatch):
    spec, _, out = kept
    out = shutil.copytree(out, tmp_path/"copy")
    refuse_training(monkeypatch)
    normal_scale, product = (replace(spec, options=LIGHT | options) for options in TEST_ONLY)
    before, other = run(normal_scale, out), run(product, out)
    after = run(replace(normal_scale, protocols=["exact", "dinomaly"]), out)
    assert after.id == before.id
    assert list(after.metrics) == ["exact", "dinomaly"]
    assert after.metrics["exact"] == before.metrics["exact"]
    assert after.metrics["exact"]["mean"] != after.metrics["dinomaly"]["mean"]
    assert run(product, out).metrics == other.metrics

@pytest.mark.parametrize("why", ["other training", "no record", "no model", "other epochs", "other option"])
def test_a_model_that_was_trained_otherwise_is_not_taken(kept, tmp_path, monkeypatch, why):
    spec, first, out = kept
    out = shutil.copytree(out, tmp_path/"copy")
    record_file = out/"runs"/first.id/"record.json"
    other = replace(spec, options=LIGHT | TEST_ONLY[0])
    if why == "other training":
        record = json.loads(record_file.read_text())
        record["provenance"]["training_id"] = "0"*12
        record_file.write_text(json.dumps(record))
    elif why == "no record": record_file.unlink()
    elif why == "no model": (record_file.parent/"model.safetensors").unlink()
    elif why == "other epochs": other = replace(other, epochs=2)
    elif why == "other option": other = replace(other, options=other.options | dict(dist_weight=.2))
    refuse_training(monkeypatch)
    with pytest.raises(Interrupted): run(other, out)

def test_the_record_says_how_often_the_class_was_right(kept):
    spec, record, _ = kept
    scores, facts = record.scores(), record.provenance
    right = [record.spec["classes"][number] == cls for number, cls in zip(scores.predicted_cls, scores.cls)]
    assert facts["predicted_cls_right"] == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) <= 1
    assert "group_purity" not in facts
    assert set(facts["memory"]) == {"groups", "prototypes", "dead", "revived"}
    assert facts["memory"]["groups"] == 2 and facts["memory"]["prototypes"] == 4

def test_the_class_number_is_the_catalogs_not_the_asked_order():
    "Asked for in another order, the same run."
    orders = (["tile", "gear"], ["gear", "tile"])
    a, b = (resolve(make_spec(**SMALL | dict(classes=classes), detector="mddnet")) for classes in orders)
    assert a.run_id == b.run_id
    assert a.dataset.classes == b.dataset.classes == a.dataset.catalog.classes

def test_the_record_says_how_pure_the_groups_were(tmp_path):
    options = LIGHT | dict(memory="cluster", groups=3)
    record = run(make_spec(**SMALL, detector="mddnet", options=options), tmp_path)
    scores, facts = record.scores(), record.provenance
    most_frequent = sum(part.cls.value_counts().iloc[0] for _, part in scores.groupby("group"))
    assert facts["group_purity"] == pytest.approx(most_frequent/len(scores))
    assert "predicted_cls_right" not in facts
    assert set(scores.group) <= {0, 1, 2} and facts["memory"]["groups"] == 3

@pytest.mark.parametrize("rows,column,name,share", [
    ([("a", 0), ("a", 0), ("b", 0), ("b", 1)], "group", "group_purity", .75),
    ([("a", 1), ("b", 1), ("b", 0)], "predicted_cls", "predicted_cls_right", 1/3),
])
def test_shares_by_hand(rows, column, name, share):
    scores = pd.DataFrame(rows, columns=["cls", column])
    assert prediction_quality(scores, ["a", "b"]) == {name: pytest.approx(share)}

# ---- studies

TINY = dict(data="embedded-v1-smoke", size=64, layers="1,2")

def test_arms_by_name():
    study = load_study("decoders", arms="RI,TR", seed="0,1", epochs=1, **TINY)
    named, names = study.named_specs(), study.names()
    assert [(arm, spec.seed) for arm, spec in named] == [("TR", 0), ("TR", 1), ("RI", 0), ("RI", 1)]
    assert names == {resolve(spec).run_id: arm for arm, spec in named}
    assert list(names.values()) == ["TR", "TR", "RI", "RI"]    # the study's order
    assert notebook_parameters(study)["arms"] == ["TR", "RI"]
    assert [spec.options["fusion"] for _, spec in named] == ["tr", "tr", "ri", "ri"]
    assert all(spec.options["decoder"] == "light" for _, spec in named)

def test_unknown_arms():
    with pytest.raises(SpecError, match="unknown arm of the study decoders 'TRI'.*'TR'"):
        load_study("decoders", arms="TRI")
    with pytest.raises(SpecError, match="options='decoder:light'.*'a=1,b=2'"):
        load_study("decoders", options="decoder:light")
    with pytest.raises(SpecError, match="arms"):
        load_study("benchmark", arms="TR")

@pytest.mark.parametrize("name", ["decoders", "memory"])
def test_no_two_arms_are_the_same_run_and_all_can_be(name):
    study = load_study(name, seed=0, **TINY)
    assert list(study.names().values()) == list(study.arms)

def test_two_arms_that_share_weights_are_trained_once(tmp_path):
    study = load_study("decoders", arms="TR,RI", seed=0, classes="gear,tile", epochs=1, **TINY)
    swept = sweep(study, tmp_path, plain=True)
    assert not swept.failures, swept.failures
    tr, ri = swept.records
    assert [record.spec["options"]["fusion"] for record in (tr, ri)] == ["tr", "ri"]
    assert tr.provenance["training_id"] == ri.provenance["training_id"]
    assert tr.metrics != ri.metrics
    assert "trained_by" not in tr.provenance and ri.provenance["trained_by"] == tr.id
    assert len(tr.history()) and ri.history().empty
    assert ri.cost["train_s"] == tr.cost["train_s"]
