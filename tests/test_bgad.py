"BGAD: flows and their determinant, the loss against numpy, labels and none, constants, thin masks."
import numpy as np
import pytest, torch
import torch.nn.functional as F
from mdd_bench.detectors.bgad import Flow, at_most, boundary, level_likelihood, likelihood, push_pull
from mdd_bench.detectors.bgad import sinusoids
from mdd_bench.detectors.detector import create_detector, detector_class
from mdd_bench.parts.backbone import Backbone
from mdd_bench.parts.patches import defective
from mdd_bench.running.training import make_optimizer, rate_factor, train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

@pytest.fixture(scope="module")
def backbone(): return Backbone("resnet18", "procedural", [2, 3])

def pictures(n, seed=0): return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))

def labelled_batch(backbone, n, seed=5):
    mask = torch.zeros(n, 64, 64)
    mask[:, 10:30, 40:60] = 1
    return dict(features=backbone(pictures(n, seed)), mask=mask)

def part_of(batch, which):
    "Some images of a labelled batch."
    return dict(features=[f[which] for f in batch["features"]], mask=batch["mask"][which])

def make(backbone, batches, **options):
    torch.manual_seed(0)
    detector = create_detector("bgad", backbone, **dict(couplings=3, hidden=.5) | options).eval()
    with torch.no_grad(): detector.prepare(batches)
    return detector

# The flow --------------------------------------------------------------------------------------------

def disturbed(channels, seed=0):
    "A flow that is far from the identity, on features that are not standard."
    torch.manual_seed(seed)
    flow = Flow(channels, 8, couplings=4)
    for p in flow.parameters(): p.data += .3*torch.randn_like(p)
    flow.mean.normal_()
    flow.deviation.uniform_(.5, 2)
    return flow.double()

@pytest.mark.parametrize("channels", [2, 5, 8])
def test_the_flow_is_invertible_and_its_determinant_is_autograds(channels):
    flow = disturbed(channels)
    x, conditions = torch.randn(7, channels).double(), torch.randn(3, 8).double()
    position = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    z, logdet = flow(x, conditions, position)
    back = flow.inverse(z, conditions, position)
    torch.testing.assert_close(back, x, atol=1e-3, rtol=1e-3)    # mixing is orthogonal to single precision
    for i in range(len(x)):
        def one(v): return flow(v[None], conditions, position[i:i + 1])[0][0]
        of_jacobian = torch.autograd.functional.jacobian(one, x[i]).slogdet()[1]
        of_standardised = of_jacobian + flow.deviation.log().sum()
        torch.testing.assert_close(of_standardised, logdet[i], atol=1e-5, rtol=1e-5)

    want = torch.distributions.Normal(0., 1.).log_prob(z).sum(1) + logdet
    got = likelihood(flow.float(), x, conditions.float(), position)       # float32, always
    torch.testing.assert_close(got, (want/channels).float(), atol=1e-4, rtol=1e-4)

def test_a_density_integrates_to_one():
    flow = disturbed(2).float()
    flow.mean.zero_()
    flow.deviation.fill_(1)
    step = .1
    side = torch.arange(-25, 25, step)
    x = torch.cartesian_prod(side, side)
    with torch.no_grad(): l = likelihood(flow, x, torch.zeros(1, 8), torch.zeros(len(x), dtype=torch.long))
    assert abs((2*l).exp().sum().item()*step**2 - 1) < .02

def test_the_condition_matters_and_is_the_same_as_side_by_side():
    flow, x, conditions = disturbed(6), torch.randn(5, 6).double(), torch.randn(5, 8).double()
    affine, position = flow.couplings[0].affine, torch.arange(5)
    plain = affine.last(F.relu(affine.first(torch.cat([x[:, :3], conditions], 1))))/10
    scale, shift = affine(x[:, :3], conditions, position)
    torch.testing.assert_close(scale, 1.9*torch.tanh(plain[:, :3]))
    torch.testing.assert_close(shift, plain[:, 3:])
    change = flow(x, conditions, position)[1] - flow(x, conditions, position.flip(0))[1]
    assert change[[0, 1, 3, 4]].abs().min() > 1e-3

def test_every_position_has_its_own_sinusoids():
    p = sinusoids(9, 7)
    distance = torch.cdist(p, p) + 9*torch.eye(63)
    assert p.shape == (63, 128) and distance.min() > .5
    assert torch.allclose(p.square().sum(1), torch.full((63,), 64.))

# The loss --------------------------------------------------------------------------------------------

def published(l_normal, l_anomalous, beta, tau):
    "Boundary, pull and push of the released code, one patch after the other; log-likelihoods over 10."
    b = sorted(l_normal)[int(beta*len(l_normal))]
    pull, push = [], []
    for l in l_normal:
        w = 1. if l > -.2 else 11.7*(1 - np.exp(l))**.5*abs(l)
        if l <= b: pull.append(w*(b - l))
    for l in l_anomalous:
        held = min(l, -.1)                                           # the hold is ours
        v = 1. if held <= -1 else .53*(1 + np.exp(held))**2/abs(held)
        if l >= b - tau: push.append(v*(l - (b - tau)))
    return b, np.mean(pull) if pull else 0., np.mean(push) if push else 0.

@pytest.mark.parametrize("centre", [-.1, -.5, -1.5])
def test_the_loss_is_the_published_one(centre):
    rng = np.random.default_rng(0)
    l_normal, l_anomalous = rng.normal(-.3, .2, 500), rng.normal(centre, .4, 60)
    b, pull, push = published(l_normal, l_anomalous, .05, .1)
    n, a = torch.from_numpy(l_normal).requires_grad_(), torch.from_numpy(l_anomalous).requires_grad_()
    got = push_pull(n, a, boundary(n, .05), .1)
    assert boundary(n, .05).item() == b and not boundary(n, .05).requires_grad
    np.testing.assert_allclose([v.item() for v in got.values()], [pull, push], rtol=1e-9)

    sum(got.values()).backward()      # normal ones below are pulled up, anomalous ones above are pushed down
    assert ((n.grad < 0) == (n <= b)).all() and (n.grad <= 0).all()
    assert ((a.grad > 0) == (a >= b - .1)).all()

def test_nothing_is_paid_where_the_margins_are_met():
    n = torch.tensor([-.1, -.2, .3], requires_grad=True)
    a = torch.tensor([-.5, -9.], requires_grad=True)
    got = push_pull(n, a, torch.tensor(-.3), .1)
    sum(got.values()).backward()
    assert got["pull"] == 0 == got["push"] and not n.grad.any() and not a.grad.any()
    assert push_pull(n, a[:0], torch.tensor(-.3), .1)["push"] == 0    # no anomalous patch in a step: not nan

# The detector ----------------------------------------------------------------------------------------

def test_without_labels_it_is_a_plain_flow_and_says_so(backbone):
    normal = dict(features=backbone(pictures(4)))
    detector = make(backbone, [normal])
    detector.on_epoch(4, None)
    got = detector.losses(normal)
    levels = zip(detector.flows, normal["features"])
    want = sum(-F.logsigmoid(level_likelihood(flow, f)).mean() for flow, f in levels)
    assert set(got) == {"likelihood"}
    torch.testing.assert_close(got["likelihood"], want)
    facts = detector.facts()["bgad"]
    assert facts["plain flow"] is True
    assert facts["labelled images"] == facts["labelled patches"] == facts["epochs with labels"] == 0

def test_labels_count_after_the_warm_up(backbone):
    normal, labelled = dict(features=backbone(pictures(4))), labelled_batch(backbone, 2)
    detector = make(backbone, [normal, labelled], warm_up=2)
    batch = normal | dict(labelled=labelled)
    first = detector.losses(batch)
    assert list(first) == ["likelihood", "pull", "push"] and first["pull"] == 0 == first["push"]
    detector.on_epoch(0, None)
    assert detector.losses(batch)["push"] == 0 and detector.facts()["bgad"]["plain flow"]
    detector.on_epoch(1, None)
    assert detector.losses(batch)["push"] > 0
    detector.on_epoch(2, None)
    facts = detector.facts()["bgad"]
    assert facts["epochs with labels"] == 1 and not facts["plain flow"]
    assert facts["labelled images"] == 2 and facts["labelled patches"] == [2*9, 2*4]
    assert facts["best-covered only"] == 0

def test_the_terms_with_labels_are_the_formulas(backbone):
    """The terms are those of the formulas.

    Normal are the positions of normal images, and those of labelled images outside the defect. Anomalous are
    those inside, of every labelled batch.
    """
    normal, labelled = dict(features=backbone(pictures(4))), labelled_batch(backbone, 3)
    parts = [part_of(labelled, slice(0, 2)), part_of(labelled, slice(2, 3))]
    detector = make(backbone, [normal, *parts], warm_up=0, weight=.5, beta=.1, tau=.2)
    facts = detector.facts()["bgad"]
    assert facts["labelled patches"] == [3*9, 3*4] and facts["labelled images"] == 3

    want = dict(likelihood=0., pull=0., push=0.)
    for flow, x, y in zip(detector.flows, normal["features"], labelled["features"]):
        inside = F.adaptive_max_pool2d(labelled["mask"], x.shape[-2:]).flatten() > 0
        l, known = (level_likelihood(flow, f).detach().double() for f in (x, y))
        l_normal, l_anomalous = torch.cat([l, known[~inside]]).numpy(), known[inside].numpy()
        _, pull, push = published(l_normal/10, l_anomalous/10, .1, .2)
        w = np.array([1. if v > -2 else 11.7*(1 - np.exp(v/10))**.5*abs(v/10) for v in l_normal])
        want["likelihood"] += np.mean(w*np.log1p(np.exp(-l_normal)))
        want["pull"] += .5*pull
        want["push"] += .5*push
    got = {name: term.item() for name, term in detector.losses(normal | dict(labelled=labelled)).items()}
    assert got == pytest.approx(want, rel=1e-4) and (w > 1).any()

def test_a_few_steps_separate_the_labelled_patches(backbone):
    normal, labelled = dict(features=backbone(pictures(6))), labelled_batch(backbone, 3)
    detector = make(backbone, [normal, labelled], warm_up=0)
    optimizer = make_optimizer(detector, detector.recipe)
    push = []
    for precision in ["float32"]*12 + ["bfloat16"]:
        batch = normal | dict(labelled=labelled)
        terms = train_step(detector, batch, optimizer, detector.recipe, precision)
        push.append(terms["push"].item())
    assert push[11] < .95*push[0] and push[12] < push[10]

@pytest.mark.parametrize("most", [10**6, 40])
def test_positions_of_a_step(most):
    "There are never more than asked for, and none twice; all are from the mask."
    mask = torch.rand(500, generator=torch.Generator().manual_seed(0)) < .3
    torch.manual_seed(0)
    chosen = at_most(mask, most)
    assert mask[chosen].all() and len(chosen.unique()) == len(chosen) == min(most, int(mask.sum()))

@pytest.mark.parametrize("rows", [10**6, 40])
def test_a_step_uses_at_most_so_many_rows(backbone, rows, monkeypatch):
    "The option reaches the choice: normal and anomalous positions apart, of each level."
    normal, labelled = dict(features=backbone(pictures(2))), labelled_batch(backbone, 6)
    detector = make(backbone, [normal, labelled], warm_up=0, rows=rows)
    used = []
    def counting(flow, features, chosen=None):
        used.append(len(chosen))
        return level_likelihood(flow, features, chosen)
    monkeypatch.setattr("mdd_bench.detectors.bgad.level_likelihood", counting)
    detector.losses(normal | dict(labelled=labelled))
    anomalous, positions = [6*9, 6*4], [8*64, 8*16]
    assert used == [min(rows, n - a) + min(rows, a) for n, a in zip(positions, anomalous)]

def test_the_order_of_a_batch_changes_nothing(backbone):
    features, labelled = backbone(pictures(6)), labelled_batch(backbone, 3)
    labelled["mask"][0, 40:, :9] = 1
    detector = make(backbone, [dict(features=features), labelled], warm_up=0)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    turned = part_of(labelled, torch.tensor([2, 0, 1]))
    one = detector.losses(dict(features=features, labelled=labelled))
    two = detector.losses(dict(features=[f[order] for f in features], labelled=turned))
    for name in one: torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)

def test_constants_come_from_normal_training_images(backbone):
    "Neither the size of the batches nor labelled images nor textures change them."
    features, labelled = backbone(pictures(6)), labelled_batch(backbone, 3)
    whole = dict(features=features)
    halves = [dict(features=[f[:4] for f in features]), dict(features=[f[4:] for f in features])]
    texture = dict(features=[9*f for f in features], texture=True)
    one, two = make(backbone, [whole]), make(backbone, [*halves, labelled, texture])
    with torch.no_grad():
        one.finish([whole])
        two.finish([*halves, labelled, texture])
    for name in ("top", "boundary", "flows.0.mean", "flows.1.deviation"):
        torch.testing.assert_close(one.state_dict()[name], two.state_dict()[name], rtol=1e-5, atol=1e-6)

    flow, x = one.flows[0], features[0].permute(0, 2, 3, 1).flatten(0, 2)
    deviation = x.std(0, correction=0)
    want = (x - x.mean(0))/deviation.clamp_min(.1*deviation.mean())
    torch.testing.assert_close((x - flow.mean)/flow.deviation, want, rtol=1e-3, atol=1e-3)
    with torch.no_grad(): l = [level_likelihood(*level) for level in zip(one.flows, features)]
    assert one.top.tolist() == [v.max().item() for v in l] and one.boundary[0] == boundary(l[0]/10, .01)

def test_a_prediction_is_the_formula_and_leaves_nothing_behind(backbone):
    features = backbone(pictures(6))
    detector = make(backbone, [dict(features=features)])
    with torch.no_grad():
        detector.finish([dict(features=features)])
        before = {name: v.clone() for name, v in detector.state_dict().items()}
        p, strange = detector(pictures(6)), detector(5*pictures(2, 3))
        l = [level_likelihood(*level) for level in zip(detector.flows, features)]
    assert all(torch.equal(v, detector.state_dict()[name]) for name, v in before.items())
    assert 0 <= p.map.min() and p.map.max() <= 2 and strange.map.max() <= 2
    assert torch.equal(p.score, p.map.amax((1, 2)))
    probability = [(v - v.max()).exp().view(6, 1, *x.shape[-2:]) for v, x in zip(l, features)]
    want = sum(F.interpolate(v, (64, 64), mode="bilinear", align_corners=True)[:, 0] for v in probability)
    torch.testing.assert_close(p.map, 2 - want)

# Masks -----------------------------------------------------------------------------------------------

def test_positions_of_a_mask(backbone):
    """Every cell with a defective pixel counts.

    A mask that half covers no pixel keeps its best-covered cell, and is counted.
    """
    mask = torch.zeros(3, 64, 64)
    mask[0, 7, 7] = .5
    mask[1, 20:23, 30] = .49
    mask[1, 50, 50] = .49
    mask[2, :, 8] = 1
    anomalous, best_only = defective(mask, (8, 8))
    assert [m.nonzero().tolist() for m in anomalous[:2]] == [[[0, 0]], [[2, 3]]]
    assert anomalous[2].sum() == 8 and anomalous[2][:, 1].all() and best_only.tolist() == [False, True, False]

    normal = dict(features=backbone(pictures(2)))
    labelled = dict(features=backbone(pictures(3, 5)), mask=mask)
    detector = make(backbone, [normal, labelled], warm_up=0)
    facts = detector.facts()["bgad"]
    assert facts["best-covered only"] == 1 and facts["labelled patches"] == [10, 6]
    second = part_of(labelled, slice(1, 2))
    assert detector.losses(normal | dict(labelled=second))["push"] > 0

def test_the_recipe():
    "The released code's default schedule: a warm-up in 2 of 25 rounds, then a cosine."
    recipe = detector_class("bgad").recipe
    assert (recipe.epochs, recipe.batch, recipe.lr, recipe.optimizer) == (200, 32, 2e-4, "adam")
    assert (recipe.warmup, recipe.cosine, recipe.drops) == (2/25, True, ())
    rates = [rate_factor(recipe, done) for done in (0, .04, .08, .54, .999)]
    assert rates == pytest.approx([0, .5, 1, .5, 0], abs=1e-4)
