"DMAD: the release's arithmetic, the banks and who finds what in them, with labels and without."
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

def features(n, seed, spread=1.): g = torch.Generator().manual_seed(seed); return [spread*torch.randn(n, 128, 8, 8, generator=g).relu(), spread*torch.randn(n, 256, 4, 4, generator=g).relu()]

def shown(labels=3):
    "Ten normal images in two batches, labelled ones of which the last has a mask below half, five textures."
    mask = torch.zeros(labels, 64, 64); mask[:, 8:24, 8:32] = 1
    if labels: mask[-1] = 0; mask[-1, 40, 41] = .3
    anomalies = dict(features=features(labels, 7), mask=mask, index=torch.arange(labels))
    train = [dict(features=features(5, s), index=torch.arange(5*s, 5*s + 5)) for s in range(2)]
    return train, anomalies, [*train, *[anomalies]*bool(labels), dict(features=features(5, 9), texture=True)]

def made(backbone, labels=3, seed=0, **options):
    torch.manual_seed(seed); d = create_detector("dmad", backbone, classes=2, **dict(hidden=16, coreset_ratio=.1) | options)
    train, anomalies, every = shown(labels)
    with torch.no_grad(): d.eval(); d.prepare(every)
    return d.train(), train, anomalies

rows = lambda f: as_rows(patch_features(f))

def test_released_is_what_the_release_writes(backbone):
    "Sections 2.6 and 2.7 of our notes on it, in a few lines of numpy-like torch, batch norm in training mode."
    d, train, anomalies = made(backbone, variant="released")
    W = dict(d.named_parameters())
    def bn(x): return (x - x.mean(0))/(x.var(0, unbiased=False) + 1e-5).sqrt()
    def m(f, bank): return bank[torch.cdist(f.double(), bank.double()).argmin(1)]
    P = lambda x: x @ W["projection.weight"].T + W["projection.bias"]
    f, bad = rows(train[0]["features"]), released_filter(anomalies["mask"], (8, 8)); bad[2, 5, 5] = bad[2].any() or True
    g = rows(anomalies["features"])[bad.flatten()]
    banks = [d.normal_bank, d.abnormal_bank]
    e = [bn(f - m(f, B) + f @ W[f"knowledge.{b}.attention.weight"].T + W[f"knowledge.{b}.attention.bias"]) for b, B in zip(("normal", "abnormal"), banks)]
    o = torch.cat([P(f), P(e[0]), P(e[1])], 1)
    o_a = torch.cat([P(g), *(P(g - m(g, B)) for B in banks)], 1)
    torch.manual_seed(3); o_p = o + (.015*torch.randn_like(f)).repeat(1, 3)
    x = bn(torch.cat([o, o_p, o_a]) @ W["network.0.weight"].T + W["network.0.bias"])*W["network.1.weight"] + W["network.1.bias"]
    s = (F.leaky_relu(x, .2) @ W["network.3.weight"].T)[:, 0]
    s_n, s_p, s_a = s.split([len(o), len(o), len(o_a)])
    want = dict(normal=(.5 - s_n).clamp(0).mean(), noise=(.5 + s_p).clamp(0).mean(), labelled=10*(.5 + s_a).clamp(0).mean())
    torch.manual_seed(3); got = d.losses(train[0] | dict(labelled=anomalies))
    assert got.keys() == want.keys()
    for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-4, atol=1e-5)

def test_attention_is_the_softmax_over_projected_keys_and_values():
    torch.manual_seed(0); a, f, found = Attention(7), torch.randn(9, 7), torch.randn(9, 4, 7)
    for n in range(9):
        scores = np.array([float((a.key(m) * f[n]).sum()) for m in found[n]])/7**.5
        w = np.exp(scores - scores.max()); w /= w.sum()
        want = sum(float(x)*a.value(m) for x, m in zip(w, found[n]))
        torch.testing.assert_close(a(f, found)[n], want, rtol=1e-4, atol=1e-5)

def test_neighbours_are_those_of_brute_force_without_ones_own():
    g = torch.Generator().manual_seed(0); x, bank = torch.randn(300, 5, generator=g), torch.randn(40, 5, generator=g)
    of, owner = torch.arange(300) % 4, torch.arange(40) % 5
    d = torch.cdist(x, bank); d[of[:, None] == owner] = torch.inf
    distance, index = nearest(x, bank, 3, (of, owner))
    assert torch.equal(index, d.sort(1).indices[:, :3]) and torch.allclose(distance, d.sort(1).values[:, :3], atol=1e-5)
    few = nearest(x[:1], bank[:2], 2, (torch.zeros(1), torch.tensor([0, 1])))                  # one's own come last, at infinity
    assert few[1][0].tolist() == [1, 0] and few[0][0, 1] == torch.inf

@pytest.mark.parametrize("variant", ["repaired", "released"])
def test_nobody_finds_himself_unless_released(backbone, variant):
    d, train, anomalies = made(backbone, variant=variant, knowledge="distance")
    f = torch.cat([rows(b["features"]) for b in train]).view(10, 64, -1)
    at = d.normal_bank[d.found["normal"][..., 0].long()]
    nearest_is_own = (f - at).norm(dim=2) < 1e-6
    assert nearest_is_own.any() == (variant == "released")
    g, bad = rows(anomalies["features"]).view(3, 64, -1), d.bad_known
    own = (g - d.abnormal_bank[d.found_known["abnormal"][..., 0].long()]).norm(dim=2)[bad]
    assert (own < 1e-6).all() if variant == "released" else (own > 1e-3).all()
    assert d.found["normal"].shape == (10, 64, 1) and d.found["normal"].dtype == torch.int32

def test_what_the_banks_hold(backbone):
    d, train, anomalies = made(backbone)
    said = d.facts()["banks"]
    assert said["labelled"] == 2*2*3 + 1 and said["pseudo"] == said["labelled"] and said["texture"] == int(.1*5*64) and said["normal"] == int(.1*10*64)
    assert said["abnormal"] == len(d.abnormal_bank) == said["labelled"] + said["pseudo"] + said["texture"]
    assert said["labelled images"] == 3 and said["best-covered patch only"] == 1
    known = rows(anomalies["features"]).view(3, 8, 8, -1)
    assert torch.equal(d.abnormal_bank[0], known[0, 1, 1]) and torch.equal(d.abnormal_bank[12], known[2, 5, 5])
    centre = d.abnormal_bank[:13].mean(0)
    assert (d.abnormal_bank[13:26] - centre).abs().max() < 6*.015

def test_without_labels_there_is_no_third_term_and_textures_fill_the_bank(backbone):
    d, train, _ = made(backbone, labels=0)
    said = d.facts()["banks"]
    assert said["labelled"] == 0 and said["pseudo"] == said["texture"] == 32 and "labelled images" not in said
    assert set(d.losses(train[0])) == {"normal", "noise"}

def test_one_bank_needs_no_textures_or_says_so(backbone):
    assert "textures" not in create_detector("dmad", backbone, bank="normal").needs and "textures" in create_detector("dmad", backbone, bank="abnormal").needs
    d, train, anomalies = made(backbone, bank="normal")
    assert not hasattr(d, "abnormal_bank") and "labelled" in d.losses(train[0] | dict(labelled=anomalies)) and d.network[0].in_features == 2*384

@pytest.mark.parametrize("options", [{}, dict(variant="released"), dict(knowledge="distance"), dict(knowledge="attention"), dict(bank="normal"), dict(bank="abnormal"), dict(variant="released", bank="abnormal")])
def test_gradients_and_a_saved_model(backbone, options):
    d, train, anomalies = made(backbone, **options)
    sum(d.losses(train[0] | dict(labelled=anomalies)).values()).backward()
    given = {id(p) for g in d.param_groups() for p in g["params"]}
    for n, p in d.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (id(p) in given), n
        assert p.requires_grad != (options.get("variant") == "released" and ".attention." in n), n
    d.eval(); x = features(3, 20)
    torch.manual_seed(9); fresh = create_detector("dmad", backbone, classes=2, **dict(hidden=16) | options); fresh.load_state_dict(d.state_dict()); fresh.eval()
    with torch.no_grad(): p, q = d.predict(x, (64, 64)), fresh.predict(x, (64, 64))
    assert torch.equal(p.map, q.map) and torch.equal(p.score, q.score) and p.map.std() > 0

def test_a_step_takes_its_neighbours_from_the_table(backbone, monkeypatch):
    "Searching anew gives the same loss: the table belongs to the images of the batch, in whatever order they come."
    d, train, anomalies = made(backbone)
    mixed = torch.tensor([3, 0, 4]); b = dict(features=[f[mixed] for f in train[1]["features"]], index=train[1]["index"][mixed])
    table = d.found["normal"][b["index"]].flatten(0, 1)
    f, of = rows(b["features"]), b["index"].repeat_interleave(64)
    every = torch.cat([rows(t["features"]) for t in train])
    owner = (torch.cdist(d.normal_bank, every).argmin(1))//64
    assert torch.equal(nearest(f, d.normal_bank, 5, (of, owner))[1].int(), table)

def test_options_that_leave_no_choice():
    assert full_options("dmad", dict(variant="released"))["neighbours"] == 1 and full_options("dmad", {})["neighbours"] == 5
    with pytest.raises(SpecError, match="neighbours"): full_options("dmad", dict(knowledge="distance", neighbours=3))
