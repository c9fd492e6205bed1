"PatchCore against a naive reference in numpy, its image score by hand, its coreset's scope, and its record."
import numpy as np
import pytest, torch
import torch.nn.functional as F
from mdd_bench.detectors.detector import create_detector, deciding_options, full_options
from mdd_bench.detectors.patchcore import PatchRows, image_score, subsample
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone
from mdd_bench.parts.bank import k_centres, nearest
from mdd_bench.parts.patches import as_rows, patch_features
from mdd_bench.running.identity import resolve
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec
from conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

@pytest.fixture(scope="module")
def backbone(): return Backbone("resnet18", "procedural", [1, 2])

def pictures(n, seed=0): return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))

def make_batches(backbone, n=12, size=4, labels=None):
    images, labels = pictures(n), torch.tensor(labels or [0]*n)
    parts = [slice(start, start + size) for start in range(0, n, size)]
    return [dict(features=backbone(images[part]), cls=labels[part]) for part in parts]

def prepared(backbone, batches, classes=1, seed=0, **options):
    torch.manual_seed(seed)
    detector = create_detector("patchcore", backbone, classes, **options).eval()
    detector.prepare(batches)
    return detector

# The definition, written out

def bilinear_weights(n, m):
    "[n, m]: what each of n cells takes from each of m, pixel centres aligned."
    position = np.clip((np.arange(n) + .5)*m/n - .5, 0, None)
    low = np.minimum(position.astype(int), m - 1)
    high = np.minimum(low + 1, m - 1)
    weights = np.zeros((n, m))
    weights[np.arange(n), low] += 1 - (position - low)
    weights[np.arange(n), high] += position - low
    return weights

def mean_of_nine(level):
    "The mean of each cell and its eight neighbours, with zeros outside; [B, C, H, W] to the same."
    b, c, h, w = level.shape
    padded = np.zeros((b, c, h + 2, w + 2))
    padded[:, :, 1:-1, 1:-1] = level
    return sum(padded[:, :, i:i+h, j:j+w] for i in range(3) for j in range(3))/9

def naive_patches(features):
    "[B, H, W, D] in double precision: each level's means of nine cells, enlarged to the finest level's grid."
    height, width = features[0].shape[-2:]
    levels = []
    for level in features:
        mean = mean_of_nine(level.double().numpy())
        vertical, horizontal = (bilinear_weights(n, m) for n, m in zip((height, width), mean.shape[-2:]))
        levels.append(np.einsum("yh,xw,bchw->bcyx", vertical, horizontal, mean))
    return np.concatenate(levels, 1).transpose(0, 2, 3, 1)

def naive_greedy(rows, k):
    "k row numbers: the row farthest from the mean first, then always the row farthest from all chosen ones."
    chosen = [int(((rows - rows.mean(0))**2).sum(1).argmax())]
    distance = ((rows - rows[chosen[0]])**2).sum(1)
    while len(chosen) < k:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((rows - rows[chosen[-1]])**2).sum(1))
    return chosen

def test_bank_against_a_naive_reference(backbone):
    "Patches and greedy picks, each written out."
    batches = make_batches(backbone)
    detector = prepared(backbone, batches, coreset_ratio=.02)
    rows = np.concatenate([naive_patches(b["features"]).reshape(-1, sum(backbone.channels)) for b in batches])
    centred = rows - rows[:4*256].mean(0)                               # the first batch's mean is the origin
    centred = centred.astype(np.float16).astype(np.float64)
    bank = rows[sorted(naive_greedy(centred, int(len(rows)*.02)))]
    shared = [bool(np.abs(detector.bank.numpy() - row).max(1).min() < 1e-4) for row in bank]
    assert len(detector.bank) == len(bank) == 61
    assert sum(shared) >= 58                                             # rounding to half precision may tie

def test_map_and_score_against_a_naive_reference(backbone):
    "Distances, map and image score, each written out."
    detector = prepared(backbone, make_batches(backbone), coreset_ratio=.02, neighbours=4)
    bank, images = detector.bank.double().numpy(), pictures(3, 7)
    prediction, patches = detector(images), naive_patches(backbone(images))
    distance = np.sqrt(((patches[:, :, :, None] - bank)**2).sum(-1))     # [B, H, W, M]
    grid = torch.from_numpy(distance.min(-1))[:, None]
    enlarged = F.interpolate(grid, (64, 64), mode="bilinear")[:, 0]
    torch.testing.assert_close(prediction.map.double(), enlarged, atol=1e-4, rtol=1e-4)
    for i in range(3):
        y, x = np.unravel_index(distance[i].min(-1).argmax(), (16, 16))
        nearest_row = distance[i, y, x].argmin()
        around = np.argsort(np.sqrt(((bank - bank[nearest_row])**2).sum(1)))[:4]
        largest = distance[i, y, x, nearest_row]
        share = np.exp(largest)/np.exp(distance[i, y, x][around]).sum()
        assert prediction.score[i].item() == pytest.approx((1 - share)*largest, rel=1e-4)

# The image score

def test_one_neighbour_is_no_weight(backbone):
    detector = prepared(backbone, make_batches(backbone), coreset_ratio=.01, neighbours=1)
    prediction = detector(pictures(2, 3))
    grid = F.interpolate(prediction.map[:, None], (16, 16), mode="area")
    assert (prediction.score >= grid.amax((1, 2, 3)) - 1e-4).all()
    patch, row = torch.tensor([[0., 1.]]), torch.tensor([0])
    assert image_score(patch, torch.ones(1), torch.tensor([[0., 0.]]), row).tolist() == [1.]

def test_few_rows_are_enough(backbone):
    detector = prepared(backbone, make_batches(backbone), coreset_ratio=1e-9)
    assert len(detector.bank) == 1 and torch.isfinite(detector(pictures(2, 3)).score).all()

def test_large_distances_do_not_overflow():
    bank = torch.tensor([[0., 0.], [1., 0.]])
    score = image_score(torch.tensor([[1e4, 0.]]), torch.tensor([9999.]), bank, torch.tensor([1]), 2)
    assert torch.isfinite(score).all()

def test_a_known_image_is_normal_and_a_whole_bank_gives_zero(backbone):
    batches = make_batches(backbone)
    detector = prepared(backbone, batches, coreset_ratio=1.)
    assert len(detector.bank) == 12*256
    assert detector.predict(batches[1]["features"], (64, 64)).map.max() < 1e-4

# The coreset

def test_the_scope_of_the_coreset(backbone):
    "With scope `class` each class has its share of the bank, and is covered as if it were alone."
    batches, share = make_batches(backbone, labels=[0, 1, 2]*4), int(4*256*.05)
    detector = prepared(backbone, batches, 3, coreset_ratio=.05, coreset_scope="class")
    assert len(detector.bank) == 3*share and detector.needs == {"cls"}
    for c in range(3):
        of_class = [dict(features=[f[b["cls"] == c] for f in b["features"]]) for b in batches]
        rows = torch.cat([as_rows(patch_features(b["features"])) for b in of_class])
        alone = prepared(backbone, of_class, coreset_ratio=.05).bank
        in_bank = torch.stack([row for row in detector.bank if (rows == row).all(1).any()])
        assert len(in_bank) == share
        radius, radius_alone = (nearest(rows, bank)[0].max().item() for bank in (in_bank, alone))
        assert radius == pytest.approx(radius_alone, rel=.02)            # another origin rounds otherwise
    assert len(prepared(backbone, batches, 3, coreset_ratio=.05).bank) == int(12*256*.05)

def test_groups_are_the_classes_of_the_rows(backbone):
    rows = PatchRows(make_batches(backbone, labels=[0, 1, 2]*4), by_class=True)
    for _ in range(2):                                                   # a second reading starts anew
        assert sum(len(part) for part in rows) == len(rows.groups) == 12*256
        assert torch.equal(rows.groups, torch.tensor([0, 1, 2]*4).repeat_interleave(256))

def test_one_group_is_the_plain_coreset():
    rows = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    one_group = torch.zeros(300, dtype=torch.long)
    assert torch.equal(subsample(rows, one_group, .1, "greedy"), k_centres(rows, 30))

def test_labels_are_not_read_by_the_shared_coreset(backbone):
    "Batches without a label are enough, and no label changes the bank."
    unlabelled = [dict(features=b["features"]) for b in make_batches(backbone)]
    labelled = make_batches(backbone, labels=list(range(12)))
    assert torch.equal(prepared(backbone, unlabelled).bank, prepared(backbone, labelled, 12).bank)

def test_the_order_of_the_images_does_not_matter(backbone):
    images, order = pictures(12), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    one, other = (prepared(backbone, [dict(features=backbone(x))], coreset_ratio=.05).bank
                  for x in (images, images[order]))
    shared = [bool((other == row).all(1).any()) for row in one]
    assert sum(shared) >= .95*len(one)

def test_batches_are_read_twice_and_never_held(backbone):
    readings = []
    class CountedBatches:
        def __iter__(self):
            readings.append(1)
            yield from make_batches(backbone)
    detector = prepared(backbone, CountedBatches(), coreset_ratio=.02)
    assert len(readings) == 2
    assert torch.equal(detector.bank, prepared(backbone, make_batches(backbone), coreset_ratio=.02).bank)

def test_random_rows_follow_the_seed(backbone):
    "As many as the coreset, all of them patches, and others for another seed."
    batches = make_batches(backbone, n=6, size=2)
    def bank(seed, subsampling="random"):
        return prepared(backbone, batches, seed=seed, coreset_ratio=.05, subsampling=subsampling).bank
    drawn = bank(0)
    assert torch.equal(drawn, bank(0)) and not torch.equal(drawn, bank(1))
    assert drawn.shape == bank(0, "greedy").shape
    patches = torch.cat([as_rows(patch_features(b["features"])) for b in batches])
    assert (drawn[:, None] == patches).all(-1).any(1).all() and len(drawn.unique(dim=0)) == len(drawn)

# Options and runs

BAD_OPTIONS = [dict(coreset_ratio=0), dict(coreset_ratio=1.5), dict(coreset_ratio="much"),
               dict(coreset_scope="classes"), dict(neighbours=0), dict(neighbours=2.5), dict(ratio=.1)]

@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options(backbone, options):
    with pytest.raises(SpecError): create_detector("patchcore", backbone, **options)

def small_spec(**values): return make_spec(**SMALL | dict(detector="patchcore") | values)

def test_a_run_trains_nothing_and_records_its_bank(tmp_path):
    "The epochs of a study of many detectors are not PatchCore's; its bank is part of what a test needs."
    spec = small_spec(epochs=7)
    own, asked = resolve(small_spec(epochs=None)), resolve(spec)
    assert own.run_id == asked.run_id and asked.recipe.epochs == 0
    record = run(spec, tmp_path)
    assert record.provenance["bank"]["dim"] == 64 and record.cost["parameters_trained"] == 0
    assert record.cost["bytes_test_without_backbone"] == record.provenance["bank"]["rows"]*64*4
    assert run(spec, tmp_path/"other", Runtime(cache_gb=0)).metrics == record.metrics

def test_levels_are_the_methods_own():
    assert resolve(small_spec(layers=None)).backbone.strides == [8, 16]
    assert resolve(small_spec(layers=None, detector="rd4ad")).backbone.strides == [4, 8, 16]

def test_a_default_that_is_spelt_out_changes_no_identity():
    choices = ({}, dict(subsampling="greedy"), dict(subsampling="random"))
    plain, spelt, random = (resolve(small_spec(options=options)).run_id for options in choices)
    assert plain == spelt != random
    deciding = [deciding_options("patchcore", full_options("patchcore", options)) for options in choices]
    assert deciding == [{}, {}, dict(subsampling="random")]
