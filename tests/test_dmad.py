"DMAD: the released arithmetic, what the banks hold and which rows a patch finds, with labels and without."
import numpy as np
import pytest, torch
import torch.nn.functional as F
from mdd_bench.detectors.detector import create_detector, full_options
from mdd_bench.detectors.dmad import Attention, released_filter
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone
from mdd_bench.parts.bank import nearest
from mdd_bench.parts.patches import as_rows, patch_features

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

@pytest.fixture(scope="module")
def backbone(): return Backbone("resnet18", "procedural", [2, 3])

def features(n, seed):
    "Two levels of n images, grids of 8 x 8 and 4 x 4."
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 128, 8, 8, generator=g).relu(), torch.randn(n, 256, 4, 4, generator=g).relu()]

def rows(features): return as_rows(patch_features(features))

def labelled_batch(labels):
    "Labelled images; the mask of the last one is nowhere above half."
    mask = torch.zeros(labels, 64, 64)
    mask[:, 8:24, 8:32] = 1
    if labels:
        mask[-1] = 0
        mask[-1, 40, 41] = .3
    return dict(features=features(labels, 7), mask=mask, index=torch.arange(labels))

def make(backbone, labels=3, seed=0, **options):
    "A prepared detector, two batches of five normal images, and the labelled batch."
    torch.manual_seed(seed)
    detector = create_detector("dmad", backbone, classes=2, **dict(hidden=16, coreset_ratio=.1) | options)
    normal = [dict(features=features(5, s), index=torch.arange(5*s, 5*s + 5)) for s in range(2)]
    anomalies = labelled_batch(labels)
    textures = dict(features=features(5, 9), texture=True)
    batches = [*normal, anomalies, textures] if labels else [*normal, textures]
    detector.eval()
    with torch.no_grad(): detector.prepare(batches)
    return detector.train(), normal, anomalies

# The released arithmetic -----------------------------------------------------------------------------

def batch_norm(x): return (x - x.mean(0))/(x.var(0, unbiased=False) + 1e-5).sqrt()

def nearest_row(patches, bank): return bank[torch.cdist(patches.double(), bank.double()).argmin(1)]

def released_losses(detector, batch, anomalies):
    "Sections 2.6 and 2.7 of our notes on the release, in plain torch, with batch norm in training mode."
    W = dict(detector.named_parameters())
    banks = {name: bank.rows for name, bank in detector.representation.banks.items()}
    def project(x): return x @ W["representation.projection.weight"].T + W["representation.projection.bias"]
    def attention(f, name):
        prefix = f"representation.banks.{name}.knowledge.attention"
        return f @ W[f"{prefix}.weight"].T + W[f"{prefix}.bias"]

    f = rows(batch["features"])
    anomalous = released_filter(anomalies["mask"], (8, 8))
    if not anomalous[2].any(): anomalous[2, 5, 5] = True
    g = rows(anomalies["features"])[anomalous.flatten()]
    e = [batch_norm(f - nearest_row(f, bank) + attention(f, name)) for name, bank in banks.items()]
    o = torch.cat([project(f), *(project(known) for known in e)], 1)
    o_labelled = torch.cat([project(g), *(project(g - nearest_row(g, bank)) for bank in banks.values())], 1)
    o_noise = o + (.015*torch.randn_like(f)).repeat(1, 3)

    x = torch.cat([o, o_noise, o_labelled]) @ W["network.0.weight"].T + W["network.0.bias"]
    x = F.leaky_relu(batch_norm(x)*W["network.1.weight"] + W["network.1.bias"], .2)
    scores = (x @ W["network.3.weight"].T)[:, 0]
    normal, noise, labelled = scores.split([len(o), len(o), len(o_labelled)])
    return dict(normal=(.5 - normal).clamp(0).mean(), noise=(.5 + noise).clamp(0).mean(),
                labelled=10*(.5 + labelled).clamp(0).mean())

def test_released_is_what_the_release_writes(backbone):
    detector, normal, anomalies = make(backbone, variant="released")
    assert list(detector.representation.banks) == ["normal", "abnormal"]
    torch.manual_seed(3)
    want = released_losses(detector, normal[0], anomalies)
    torch.manual_seed(3)
    got = detector.losses(normal[0] | dict(labelled=anomalies))
    assert got.keys() == want.keys()
    for name in want: torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)

@torch.no_grad()
def test_attention_is_the_softmax_over_projected_keys_and_values():
    torch.manual_seed(0)
    attention, patches, nearest_rows = Attention(7), torch.randn(9, 7), torch.randn(9, 4, 7)
    got = attention(patches, nearest_rows)
    for n in range(9):
        scores = np.array([float((attention.key(m)*patches[n]).sum()) for m in nearest_rows[n]])/7**.5
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        want = sum(float(w)*attention.value(m) for w, m in zip(weights, nearest_rows[n]))
        torch.testing.assert_close(got[n], want, rtol=1e-4, atol=1e-5)

# Neighbours ------------------------------------------------------------------------------------------

def test_neighbours_are_those_of_brute_force_without_rows_of_the_same_owner():
    g = torch.Generator().manual_seed(0)
    x, bank = torch.randn(300, 5, generator=g), torch.randn(40, 5, generator=g)
    asking, owner = torch.arange(300) % 4, torch.arange(40) % 5
    squared = torch.cdist(x, bank)
    squared[asking[:, None] == owner] = torch.inf
    want = squared.sort(1)
    distance, index = nearest(x, bank, 3, (asking, owner))
    assert torch.equal(index, want.indices[:, :3])
    assert torch.allclose(distance, want.values[:, :3], atol=1e-5)

    distance, index = nearest(x[:1], bank[:2], 2, (torch.zeros(1), torch.tensor([0, 1])))
    assert index[0].tolist() == [1, 0] and distance[0, 1] == torch.inf      # its own come last, at infinity

@pytest.mark.parametrize("variant", ["repaired", "released"])
def test_a_patch_does_not_find_itself_unless_released(backbone, variant):
    detector, normal, anomalies = make(backbone, variant=variant, knowledge="distance")
    banks, lookup = detector.representation.banks, detector.lookup
    patches = torch.cat([rows(b["features"]) for b in normal]).view(10, 64, -1)
    found = banks["normal"].rows[lookup.normal["normal"][..., 0].long()]
    itself = (patches - found).norm(dim=2) < 1e-6
    assert itself.any() == (variant == "released")

    patches = rows(anomalies["features"]).view(3, 64, -1)
    found = banks["abnormal"].rows[lookup.labelled["abnormal"][..., 0].long()]
    distance = (patches - found).norm(dim=2)[lookup.anomalous]
    assert (distance < 1e-6).all() if variant == "released" else (distance > 1e-3).all()
    assert lookup.normal["normal"].shape == (10, 64, 1) and lookup.normal["normal"].dtype == torch.int32

def test_a_step_takes_its_neighbours_from_the_table(backbone):
    "Searching anew finds the same: the table belongs to the images of the batch, in any order."
    detector, normal, _ = make(backbone)
    bank = detector.representation.banks["normal"].rows
    mixed = torch.tensor([3, 0, 4])
    batch = dict(features=[f[mixed] for f in normal[1]["features"]], index=normal[1]["index"][mixed])
    table = detector.lookup.normal["normal"][batch["index"]].flatten(0, 1)
    every = torch.cat([rows(b["features"]) for b in normal])
    owner = torch.cdist(bank, every).argmin(1)//64
    asking = batch["index"].repeat_interleave(64)
    assert torch.equal(nearest(rows(batch["features"]), bank, 5, (asking, owner))[1].int(), table)

# What the banks hold ---------------------------------------------------------------------------------

def test_what_the_banks_hold(backbone):
    detector, _, anomalies = make(backbone)
    counts = detector.facts()["banks"]
    assert counts["labelled"] == 2*2*3 + 1 and counts["pseudo"] == counts["labelled"]
    assert counts["texture"] == int(.1*5*64) and counts["normal"] == int(.1*10*64)
    bank = detector.representation.banks["abnormal"].rows
    assert counts["abnormal"] == len(bank) == counts["labelled"] + counts["pseudo"] + counts["texture"]
    assert counts["labelled images"] == 3 and counts["best-covered patch only"] == 1

    known = rows(anomalies["features"]).view(3, 8, 8, -1)
    assert torch.equal(bank[0], known[0, 1, 1]) and torch.equal(bank[12], known[2, 5, 5])
    centre = bank[:13].mean(0)
    assert (bank[13:26] - centre).abs().max() < 6*.015

def test_without_labels_there_is_no_third_term_and_textures_fill_the_bank(backbone):
    detector, normal, _ = make(backbone, labels=0)
    counts = detector.facts()["banks"]
    assert counts["labelled"] == 0 and counts["pseudo"] == counts["texture"] == 32
    assert "labelled images" not in counts
    assert set(detector.losses(normal[0])) == {"normal", "noise"}

def test_a_normal_bank_alone_needs_no_textures(backbone):
    assert "textures" not in create_detector("dmad", backbone, bank="normal").needs
    assert "textures" in create_detector("dmad", backbone, bank="abnormal").needs
    detector, normal, anomalies = make(backbone, bank="normal")
    assert list(detector.representation.banks) == ["normal"]
    assert "labelled" in detector.losses(normal[0] | dict(labelled=anomalies))
    assert detector.network[0].in_features == 2*384

# The detector ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, dict(variant="released"), dict(knowledge="distance"), dict(knowledge="attention"),
    dict(bank="normal"), dict(bank="abnormal"), dict(variant="released", bank="abnormal"),
])
def test_gradients_and_a_saved_model(backbone, options):
    detector, normal, anomalies = make(backbone, **options)
    sum(detector.losses(normal[0] | dict(labelled=anomalies)).values()).backward()
    given = {id(p) for group in detector.param_groups() for p in group["params"]}
    for name, p in detector.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (id(p) in given), name
        assert p.requires_grad != (options.get("variant") == "released" and ".attention." in name), name

    detector.eval()
    torch.manual_seed(9)
    loaded = create_detector("dmad", backbone, classes=2, **dict(hidden=16) | options)
    loaded.load_state_dict(detector.state_dict())
    loaded.eval()
    x = features(3, 20)
    with torch.no_grad(): one, two = detector.predict(x, (64, 64)), loaded.predict(x, (64, 64))
    assert torch.equal(one.map, two.map) and torch.equal(one.score, two.score) and one.map.std() > 0

def test_options_that_leave_no_choice():
    assert full_options("dmad", dict(variant="released"))["neighbours"] == 1
    assert full_options("dmad", {})["neighbours"] == 5
    with pytest.raises(SpecError, match="neighbours"):
        full_options("dmad", dict(knowledge="distance", neighbours=3))
