"PatchCore against a naive reference in numpy, its image score by hand, its coreset's scope, and what a run records of it."
import numpy as np
import pytest, torch
from mdd_bench.detectors.detector import create_detector
from mdd_bench.detectors.patchcore import image_score
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone
from mdd_bench.parts.bank import nearest
from mdd_bench.parts.patches import as_rows, patch_features
from mdd_bench.running.run import prepare, run
from mdd_bench.running.spec import make_spec
from conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

@pytest.fixture(scope="module")
def backbone(): return Backbone("resnet18", "procedural", [1, 2])

def pictures(n, seed=0): return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))

def batches(backbone, n=12, size=4, labels=None):
    x = pictures(n)
    return [dict(features=backbone(x[i:i+size]), cls=torch.tensor((labels or [0]*n)[i:i+size])) for i in range(0, n, size)]

def prepared(backbone, made, classes=1, **options):
    torch.manual_seed(0); d = create_detector("patchcore", backbone, classes, **options).eval(); d.prepare(made)
    return d

def naive_patches(features):
    "[B, H, W, D] in double precision: the mean of nine cells, zeros outside; coarser levels enlarged bilinearly, pixel centres aligned."
    finest = features[0].shape[-2:]
    levels = []
    for f in features:
        f = f.double().numpy(); b, c, h, w = f.shape
        padded = np.zeros((b, c, h + 2, w + 2)); padded[:, :, 1:-1, 1:-1] = f
        mean = sum(padded[:, :, i:i+h, j:j+w] for i in range(3) for j in range(3))/9
        def weights(n, m):
            at = np.clip((np.arange(n) + .5)*m/n - .5, 0, None); low = np.minimum(at.astype(int), m - 1); high = np.minimum(low + 1, m - 1)
            w = np.zeros((n, m)); w[np.arange(n), low] += 1 - (at - low); w[np.arange(n), high] += at - low
            return w
        levels.append(np.einsum("yh,xw,bchw->bcyx", weights(finest[0], h), weights(finest[1], w), mean))
    return np.concatenate(levels, 1).transpose(0, 2, 3, 1)

def test_against_a_naive_reference(backbone):
    "Patches, greedy picks, distances, map and image score, each written out."
    made = batches(backbone); d = prepared(backbone, made, coreset_ratio=.02, neighbours=4)
    rows = np.concatenate([naive_patches(b["features"]).reshape(-1, sum(backbone.channels)) for b in made])
    centred = rows - rows[:4*256].mean(0)                                     # the first batch's mean is the origin
    centred = centred.astype(np.float16).astype(np.float64)
    chosen = [int(((centred - centred.mean(0))**2).sum(1).argmax())]; far = ((centred - centred[chosen[0]])**2).sum(1)
    while len(chosen) < int(len(rows)*.02): chosen.append(int(far.argmax())); far = np.minimum(far, ((centred - centred[chosen[-1]])**2).sum(1))
    bank = rows[sorted(chosen)]
    shared = sum(bool(np.abs(d.bank.numpy() - row).max(1).min() < 1e-4) for row in bank)
    assert len(d.bank) == len(bank) == 61 and shared >= 58                    # rounding to half precision may tie

    bank, x = d.bank.double().numpy(), pictures(3, 7); p = d(x); patches = naive_patches(backbone(x))
    distance = np.sqrt(((patches[:, :, :, None] - bank)**2).sum(-1))          # [B, H, W, M]
    small = torch.from_numpy(distance.min(-1))[:, None]
    torch.testing.assert_close(p.map.double(), torch.nn.functional.interpolate(small, (64, 64), mode="bilinear")[:, 0], atol=1e-4, rtol=1e-4)
    for i in range(3):
        y, x_ = np.unravel_index(distance[i].min(-1).argmax(), (16, 16))
        nearest = distance[i, y, x_].argmin()
        around = np.argsort(np.sqrt(((bank - bank[nearest])**2).sum(1)))[:4]
        e = np.exp(distance[i, y, x_][around])
        assert p.score[i].item() == pytest.approx((1 - np.exp(distance[i, y, x_, nearest])/e.sum())*distance[i, y, x_, nearest], rel=1e-4)

def test_one_neighbour_is_no_weight_and_few_rows_are_enough(backbone):
    made, x = batches(backbone), pictures(2, 3)
    one = prepared(backbone, made, coreset_ratio=.01, neighbours=1)
    grid = torch.nn.functional.interpolate(one(x).map[:, None], (16, 16), mode="area")
    assert (one(x).score >= grid.amax((1, 2, 3)) - 1e-4).all()
    assert len(prepared(backbone, made, coreset_ratio=1e-9).bank) == 1 and torch.isfinite(prepared(backbone, made, coreset_ratio=1e-9)(x).score).all()
    rare = image_score(torch.tensor([[0., 1.]]), torch.ones(1), torch.tensor([[0., 0.]]), torch.tensor([0]))
    assert rare.tolist() == [1.]

def test_large_distances_do_not_overflow():
    bank = torch.tensor([[0., 0.], [1., 0.]])
    assert torch.isfinite(image_score(torch.tensor([[1e4, 0.]]), torch.tensor([9999.]), bank, torch.tensor([1]), 2)).all()

def test_a_known_image_is_normal_and_a_whole_bank_gives_zero(backbone):
    made = batches(backbone); d = prepared(backbone, made, coreset_ratio=1.)
    assert len(d.bank) == 12*256 and d.predict(made[1]["features"], (64, 64)).map.max() < 1e-4

def test_the_scope_of_the_coreset(backbone):
    "With scope `class` each class has its share of the bank, and is covered as if it were alone."
    made = batches(backbone, labels=[0, 1, 2]*4); both = prepared(backbone, made, 3, coreset_ratio=.05, coreset_scope="class")
    assert len(both.bank) == 3*int(4*256*.05) and both.needs == {"cls"}
    for c in range(3):
        alone = [dict(features=[f[b["cls"] == c] for f in b["features"]]) for b in made]
        rows, own = torch.cat([as_rows(patch_features(b["features"])) for b in alone]), prepared(backbone, alone, coreset_ratio=.05).bank
        of_c = torch.stack([row for row in both.bank if (rows == row).all(1).any()])
        assert len(of_c) == int(4*256*.05)
        radius = [nearest(rows, bank)[0].max().item() for bank in (of_c, own)]
        assert radius[0] == pytest.approx(radius[1], rel=.02)                                     # another origin rounds otherwise
    assert len(prepared(backbone, made, 3, coreset_ratio=.05).bank) == int(12*256*.05)

def test_labels_are_not_read_by_the_shared_coreset(backbone):
    "Batches without a label are enough, and no label changes the bank."
    made = batches(backbone); bank = prepared(backbone, [dict(features=b["features"]) for b in made]).bank
    assert torch.equal(bank, prepared(backbone, batches(backbone, labels=list(range(12))), 12).bank)

def test_the_order_of_the_images_does_not_matter(backbone):
    x, order = pictures(12), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    one, other = (prepared(backbone, [dict(features=backbone(part)) for part in (x, x[order])[k].split(12)], coreset_ratio=.05) for k in range(2))
    assert sum(bool((other.bank == row).all(1).any()) for row in one.bank) >= .95*len(one.bank)

def test_batches_are_read_twice_and_never_held(backbone):
    read = []
    class Twice:
        def __iter__(self):
            read.append(1)
            for b in batches(backbone): yield b
    d = prepared(backbone, Twice(), coreset_ratio=.02)
    assert len(read) == 2 and torch.equal(d.bank, prepared(backbone, batches(backbone), coreset_ratio=.02).bank)

@pytest.mark.parametrize("options", [dict(coreset_ratio=0), dict(coreset_ratio=1.5), dict(coreset_ratio="much"), dict(coreset_scope="classes"), dict(neighbours=0), dict(neighbours=2.5), dict(ratio=.1)])
def test_bad_options(backbone, options):
    with pytest.raises(SpecError): create_detector("patchcore", backbone, **options)

def test_a_run_trains_nothing_and_says_what_it_keeps(tmp_path):
    "Epochs asked for in a study of many detectors are not PatchCore's; its bank is part of what a test needs."
    spec = make_spec(**SMALL | dict(detector="patchcore", epochs=7))
    assert prepare(spec).id == prepare(make_spec(**SMALL | dict(detector="patchcore", epochs=None))).id and prepare(spec).recipe.epochs == 0
    r = run(spec, tmp_path)
    assert r.provenance["bank"]["dim"] == 192 and r.cost["parameters_trained"] == 0
    assert r.cost["bytes_test_without_backbone"] == r.provenance["bank"]["rows"]*192*4
    assert run(spec, tmp_path/"other", store_gb=0).metrics == r.metrics

def test_levels_are_the_methods_own():
    spec = make_spec(**SMALL | dict(detector="patchcore", layers=None))
    assert prepare(spec).backbone.strides == [8, 16] and prepare(make_spec(**SMALL | dict(detector="rd4ad", layers=None))).backbone.strides == [4, 8, 16]

def test_rows_by_lot_are_the_seeds(backbone):
    "As many as the coreset, all of them patches, and others for another seed."
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches = [dict(features=backbone(images[i:i+2]), cls=torch.zeros(2, dtype=torch.long)) for i in (0, 2, 4)]
    def bank(seed, **options):
        torch.manual_seed(seed); d = create_detector("patchcore", backbone, coreset_ratio=.05, **options); d.prepare(batches)
        return d.bank
    lot, again, other, greedy = bank(0, subsampling="random"), bank(0, subsampling="random"), bank(1, subsampling="random"), bank(0)
    every = torch.cat([as_rows(patch_features(b["features"])) for b in batches])
    assert torch.equal(lot, again) and not torch.equal(lot, other) and lot.shape == greedy.shape
    assert (lot[:, None] == every).all(-1).any(1).all() and len(lot.unique(dim=0)) == len(lot)

def test_an_option_that_came_later_changes_no_identity():
    plain, said, random = (prepare(make_spec(**SMALL | dict(detector="patchcore", options=o))) for o in ({}, dict(subsampling="greedy"), dict(subsampling="random")))
    assert plain.id == said.id != random.id and "subsampling" not in plain.canonical["options"] and random.canonical["options"]["subsampling"] == "random"
