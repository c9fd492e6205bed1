"DMAD and its released arithmetic: what the banks hold, which rows a patch finds, what the experts learn."
import pytest, torch
import torch.nn.functional as F
from mdd_bench.detectors.detector import create_detector, full_options
from mdd_bench.detectors.dmad import draw_normal, fake_anomalies, leave_one_out, look_up, score_parts
from mdd_bench.detectors.dmad import score_patches, varied
from mdd_bench.detectors.dmad_banks import BankRows
from mdd_bench.detectors.dmad_released import released_filter
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
    path = [f"bad{i}.png" for i in range(labels)]
    return dict(features=features(labels, 7), mask=mask, index=torch.arange(labels), path=path)

def training_batches(labels):
    "Two batches of five normal images, the labelled one if there is one, and textures."
    normal = [dict(features=features(5, s), index=torch.arange(5*s, 5*s + 5)) for s in range(2)]
    textures = dict(features=features(5, 9), texture=True)
    anomalies = labelled_batch(labels)
    return normal, anomalies, [*normal, *([anomalies] if labels else []), textures]

def make(backbone, labels=3, name="dmad", classes=2, **options):
    "A prepared detector, the normal batches, and the labelled one."
    torch.manual_seed(0)
    options = dict(hidden=16, coreset_ratio=.1) | options
    detector = create_detector(name, backbone, classes=classes, **options)
    normal, anomalies, batches = training_batches(labels)
    detector.eval()
    with torch.no_grad(): detector.prepare(batches)
    return detector.train(), normal, anomalies

# The released arithmetic -----------------------------------------------------------------------------

def batch_norm(x): return (x - x.mean(0))/(x.var(0, unbiased=False) + 1e-5).sqrt()

def nearest_row(patches, bank): return bank[torch.cdist(patches.double(), bank.double()).argmin(1)]

def released_losses(detector, batch, anomalies):
    "Sections 2.6 and 2.7 of our notes on the release, in plain torch, with batch norm in training mode."
    W = dict(detector.named_parameters())
    banks = detector.representation.banks
    def project(x): return x @ W["representation.projection.weight"].T + W["representation.projection.bias"]
    def attention(f):
        return f @ W["representation.knowledge.value.weight"].T + W["representation.knowledge.value.bias"]

    f = rows(batch["features"])
    anomalous = released_filter(anomalies["mask"], (8, 8)).anomalous
    g = rows(anomalies["features"])[anomalous.flatten()]
    e = [batch_norm(f - nearest_row(f, bank) + attention(f)) for bank in banks.values()]
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
    detector, normal, anomalies = make(backbone, name="dmad_released")
    torch.manual_seed(3)
    want = released_losses(detector, normal[0], anomalies)
    torch.manual_seed(3)
    got = detector.losses(normal[0] | dict(labelled=anomalies))
    assert got.keys() == want.keys()
    for name in want: torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)

def test_released_patches_find_themselves(backbone):
    detector, normal, anomalies = make(backbone, name="dmad_released")
    banks, lookup = detector.representation.banks, detector.lookup
    patches = torch.cat([rows(b["features"]) for b in normal])
    found = banks["normal"][lookup.normal["normal"].flatten().long()]
    assert ((patches - found).norm(dim=1) < 1e-6).sum() >= len(banks["normal"])
    chosen = lookup.anomalous.flatten()
    found = banks["abnormal"][lookup.labelled["abnormal"].flatten()[chosen].long()]
    assert ((rows(anomalies["features"])[chosen] - found).norm(dim=1) < 1e-6).all()

def test_the_released_bank_without_labels_holds_textures_and_points_around_normal_centres(backbone):
    detector, normal, _ = make(backbone, labels=0, name="dmad_released")
    assert detector.facts()["banks"] == dict(labelled=0, pseudo=32, texture=32, normal=64, abnormal=64)
    assert set(detector.losses(normal[0])) == {"normal", "noise"}

def test_the_released_bank_holds_as_many_points_as_labelled_patches(backbone):
    detector, _, anomalies = make(backbone, name="dmad_released")
    counts = detector.facts()["banks"]
    assert counts["pseudo"] == counts["labelled"] and counts["best-covered patch only"] == 1
    bank, known = detector.representation.banks["abnormal"], counts["labelled"]
    assert (bank[known:2*known] - bank[:known].mean(0)).abs().max() < 6*.015

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

def test_attention_is_the_mixture_of_the_nearest_rows_by_distance():
    g = torch.Generator().manual_seed(0)
    patches, bank = torch.randn(9, 7, generator=g), torch.randn(30, 7, generator=g)
    found = look_up(bank, patches, 4)
    for patch, difference, attention, number in zip(patches, *found):
        distances, order = (patch - bank).norm(dim=1).sort()
        weights = (-(distances[:4]/distances[0])**2).exp()
        mixture = sum(w*bank[i] for w, i in zip(weights/weights.sum(), order))
        torch.testing.assert_close(attention, patch - mixture, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(difference, patch - bank[order[0]])
        assert abs(number.item() - distances[0].log().item()) < 1e-3

def test_a_forbidden_row_has_no_part_in_the_mixture():
    bank, owner = torch.tensor([[0.], [.1], [9.]]), torch.tensor([0, 0, 1])
    found = look_up(bank, torch.tensor([[.05]]), 3, (torch.tensor([0]), owner))
    assert found.difference.item() == found.attention.item() == pytest.approx(.05 - 9)

def test_one_neighbour_leaves_no_mixture():
    patches, bank = torch.randn(5, 3), torch.randn(4, 3)
    found = look_up(bank, patches, 1)
    assert torch.equal(found.attention, found.difference)

def test_a_training_patch_finds_no_row_of_the_image_that_is_nearest():
    "Whoever asks: a labelled patch, or a normal one. Rows without an image are always found."
    bank = BankRows(torch.tensor([[0.], [1.], [10.], [20.]]), torch.tensor([0, 0, 1, -1]))
    found = leave_one_out(bank, torch.tensor([[.2], [11.], [19.]]), 1)
    assert found.difference[:, 0].tolist() == pytest.approx([.2 - 10, 11 - 20, 19 - 20])

def test_normal_patches_find_no_row_of_their_own_image(backbone):
    detector, normal, _ = make(backbone)
    with torch.no_grad(): patches, found = draw_normal(normal[0], detector.banks["normal"], 5)
    in_bank = (patches[:, None] == detector.banks["normal"].rows[None]).all(2).any(1)
    assert in_bank.any() and (found.difference.norm(dim=1) > 1e-3).all()

# What is drawn ---------------------------------------------------------------------------------------

def test_a_fake_lies_on_a_line_from_its_patch_along_a_difference():
    g = torch.Generator().manual_seed(0)
    patches, differences = torch.randn(500, 4, generator=g), torch.randn(500, 4, generator=g)
    moved = fake_anomalies(patches, differences) - patches
    cosine = F.normalize(moved, dim=1) @ F.normalize(differences, dim=1).T
    along = cosine.max(1)
    assert (along.values > 1 - 1e-5).all()
    times = moved.norm(dim=1)/differences[along.indices].norm(dim=1)
    assert times.min() > .59 and times.max() < 4.01 and (times > 2).float().mean().item() > .2
    own = (along.indices == torch.arange(500)).float().mean().item()
    assert .4 < own < .6

def test_labelled_patches_are_varied_in_four_ways(backbone):
    detector, normal, _ = make(backbone)
    pool, patches = detector.pool, rows(normal[0]["features"])
    drawn = varied(pool, 800, patches, detector.banks["normal"].rows.std(0))
    known = pool.rows
    as_they_are = (drawn[:, None] == known[None]).all(2).any(1).float().mean()
    assert drawn.isfinite().all() and .17 < as_they_are < .33

def test_clean_patches_lie_away_from_the_defect(backbone):
    detector, _, anomalies = make(backbone)
    grid = rows(anomalies["features"]).view(3, 8, 8, -1)
    defect_and_margin = grid[0, 0:4, 0:5].reshape(-1, grid.shape[-1])
    assert not (defect_and_margin[:, None] == detector.pool.clean[None]).all(2).any()
    assert len(detector.pool.clean) == 2*(64 - 4*5) + 64 - 3*3

def test_small_defects_are_not_drowned(backbone):
    "The patch of a defect of one has a larger chance than each of a defect of six; together, the six lead."
    chance = make(backbone)[0].pool.chance
    assert chance[12] > chance[0] and chance[:6].sum() > chance[12]

# What the banks hold ---------------------------------------------------------------------------------

def test_what_the_banks_hold(backbone):
    detector, _, anomalies = make(backbone)
    counts = detector.facts()["banks"]
    assert counts == {"normal": 64, "labelled": 2*2*3 + 1, "pseudo": 3, "texture": 32,
                      "second expert's weight": pytest.approx(1/3, abs=1e-3), "best-covered patch only": 1}
    known = rows(anomalies["features"]).view(3, 8, 8, -1)
    assert torch.equal(detector.banks["abnormal"].rows[0], known[0, 1, 1])
    assert torch.equal(detector.banks["abnormal"].rows[12], known[2, 5, 5])

def test_an_image_in_several_orientations_is_one_image(backbone):
    detector = create_detector("dmad", backbone, classes=1, hidden=16, coreset_ratio=.1)
    normal, anomalies, batches = training_batches(3)
    again = anomalies | dict(features=features(3, 8), index=torch.arange(3, 6))
    detector.eval()
    with torch.no_grad(): detector.prepare([*batches, again])
    assert detector.pool.image.unique().tolist() == [0, 1, 2]
    assert detector.weight.item() == pytest.approx(.5)

def test_one_labelled_image_in_all_is_enough(backbone):
    "Left out, it leaves textures and pseudo points to be found."
    detector, normal, anomalies = make(backbone, labels=1, classes=1)
    terms = detector.losses(normal[0] | dict(labelled=anomalies))
    assert set(terms) == {"normal", "fake", "normal_both", "labelled"}
    assert all(term.isfinite() for term in terms.values())

def test_a_bank_of_one_row_is_enough(backbone):
    detector, normal, anomalies = make(backbone, coreset_ratio=1e-9)
    assert len(detector.banks["normal"].rows) == 1
    terms = detector.losses(normal[0] | dict(labelled=anomalies))
    assert all(term.isfinite() for term in terms.values())

def test_without_labels_the_second_expert_is_silent_and_nothing_is_looked_up_for_it(backbone):
    detector, normal, _ = make(backbone, labels=0)
    assert detector.weight == 0 and len(detector.banks["abnormal"].rows) == 0
    assert set(detector.losses(normal[0])) == {"normal", "fake"}
    detector.eval()
    distance, first, second = score_parts(detector, rows(normal[1]["features"]))
    assert (second == 0).all() and first.std() > 0

def test_the_more_labels_the_more_the_second_expert_says(backbone):
    weights = [make(backbone, labels=n)[0].weight.item() for n in (0, 1, 3, 5)]
    assert weights == sorted(set(weights)) and weights[0] == 0 and weights[-1] < 1

# The detector ----------------------------------------------------------------------------------------

OPTIONS = [{}, dict(knowledge="distance"), dict(knowledge="attention"), dict(bank="normal"),
           dict(bank="abnormal")]

@pytest.mark.parametrize("name, options", [*(("dmad", o) for o in OPTIONS), ("dmad_released", {})])
def test_gradients_and_a_saved_model(backbone, name, options):
    detector, normal, anomalies = make(backbone, name=name, **options)
    sum(detector.losses(normal[0] | dict(labelled=anomalies)).values()).backward()
    given = {id(p) for group in detector.param_groups() for p in group["params"]}
    for parameter, p in detector.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (id(p) in given), parameter
        assert p.requires_grad != (name == "dmad_released" and ".knowledge." in parameter), parameter

    detector.eval()
    torch.manual_seed(9)
    loaded = create_detector(name, backbone, classes=2, **dict(hidden=16) | options)
    loaded.load_state_dict(detector.state_dict())
    loaded.eval()
    x = features(3, 20)
    with torch.no_grad(): one, two = detector.predict(x, (64, 64)), loaded.predict(x, (64, 64))
    assert torch.equal(one.map, two.map) and torch.equal(one.score, two.score) and one.map.std() > 0

def test_chunks_change_nothing(backbone, monkeypatch):
    detector, normal, _ = make(backbone)
    detector.eval()
    patches = rows(normal[0]["features"])
    with torch.no_grad():
        whole = score_patches(detector, patches)
        parts = torch.cat([score_patches(detector, part) for part in patches.split(7)])
    torch.testing.assert_close(whole, parts)

def test_options_that_leave_no_choice():
    assert full_options("dmad", {})["neighbours"] == 5
    with pytest.raises(SpecError, match="neighbours"):
        full_options("dmad", dict(knowledge="distance", neighbours=3))
    assert full_options("dmad", dict(bank="normal"))["textures"] is None

def test_only_who_needs_textures_asks_for_them(backbone):
    assert "textures" not in create_detector("dmad", backbone, bank="normal").needs
    assert {"textures", "turned", "labelled"} <= create_detector("dmad", backbone).needs

def test_training_separates_what_it_was_shown(backbone):
    "Normal patches of new images score lower than the labelled defect's, once trained on both."
    detector, normal, anomalies = make(backbone, labels=5)
    shifted = [f + 1.5 for f in anomalies["features"]]
    batches = [*normal, anomalies | dict(features=shifted), dict(features=features(5, 9), texture=True)]
    detector.eval()
    with torch.no_grad(): detector.prepare(batches)
    detector.train()
    optimizer = torch.optim.AdamW(detector.param_groups(), lr=1e-3)
    for i in range(30):
        loss = sum(detector.losses(normal[i % 2]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    detector.eval()
    with torch.no_grad():
        good = score_patches(detector, rows(features(5, 30)))
        bad = score_patches(detector, rows([f + 1.5 for f in features(5, 31)]))
    assert bad.min() > good.max()
