"BGAD: the flow is invertible and knows its determinant; its loss against numpy; N = 0 is a plain flow; nothing of a test image stays; thin masks; the order of a batch."
import numpy as np
import pytest, torch
import torch.nn.functional as F
from mdd_bench.detectors.bgad import Flow, boundary, push_pull, sinusoids
from mdd_bench.parts.patches import defective
from mdd_bench.detectors.detector import create_detector
from mdd_bench.parts.backbone import Backbone
from mdd_bench.running.training import make_optimizer, train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

@pytest.fixture(scope="module")
def backbone(): return Backbone("resnet18", "procedural", [2, 3])

def pictures(n, seed=0): return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
def spoiled(backbone, n, seed=5): mask = torch.zeros(n, 64, 64); mask[:, 10:30, 40:60] = 1; return dict(features=backbone(pictures(n, seed)), mask=mask)

def made(backbone, shown, **options):
    torch.manual_seed(0); d = create_detector("bgad", backbone, **dict(couplings=3, hidden=.5) | options).eval()
    with torch.no_grad(): d.prepare(shown)
    return d

def disturbed(channels, seed=0):
    "A flow that is far from the identity, on features that are not standard."
    torch.manual_seed(seed); flow = Flow(channels, 8, couplings=4)
    for q in flow.parameters(): q.data += .3*torch.randn_like(q)
    flow.mean.normal_(); flow.deviation.uniform_(.5, 2)
    return flow.double()

# The flow ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [2, 5, 8])
def test_the_flow_is_invertible_and_its_determinant_is_autograds(channels):
    flow, x, places, at = disturbed(channels), torch.randn(7, channels).double(), torch.randn(3, 8).double(), torch.tensor([0, 1, 2, 2, 1, 0, 1])
    z, logdet = flow(x, places, at)
    torch.testing.assert_close(flow.inverse(z, places, at), x, atol=1e-3, rtol=1e-3)        # the mixing is orthogonal to single precision
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None], places, at[i:i+1])[0][0], x[i])
        torch.testing.assert_close(jacobian.slogdet()[1] + flow.deviation.log().sum(), logdet[i], atol=1e-5, rtol=1e-5)       # of the standardised features
    flow.float(); l = torch.distributions.Normal(0., 1.).log_prob(z).sum(1) + logdet                   # the likelihood is float32, always
    torch.testing.assert_close(flow.likelihood(x, places.float(), at), (l/channels).float(), atol=1e-4, rtol=1e-4)

def test_a_density_integrates_to_one():
    flow = disturbed(2).float(); flow.mean.zero_(); flow.deviation.fill_(1)
    step = .1; side = torch.arange(-25, 25, step); x = torch.cartesian_prod(side, side)
    with torch.no_grad(): total = (2*flow.likelihood(x, torch.zeros(1, 8), torch.zeros(len(x), dtype=torch.long))).exp().sum().item()*step**2
    assert abs(total - 1) < .02

def test_the_condition_matters_and_is_the_same_as_side_by_side():
    flow, x, places = disturbed(6), torch.randn(5, 6).double(), torch.randn(5, 8).double()
    c, at = flow.couplings[0], torch.arange(5)
    plain = c.last(F.relu(c.first(torch.cat([x[:, :3], places], 1))))/10
    for got, want in zip(c.affine(x[:, :3], places, at), (1.9*torch.tanh(plain[:, :3]), plain[:, 3:])): torch.testing.assert_close(got, want)
    assert (flow(x, places, at)[1] - flow(x, places, at.flip(0))[1])[[0, 1, 3, 4]].abs().min() > 1e-3

def test_every_place_has_its_own_sinusoids():
    p = sinusoids(9, 7); apart = torch.cdist(p, p) + 9*torch.eye(63)
    assert p.shape == (63, 128) and apart.min() > .5 and torch.allclose(p.square().sum(1), torch.full((63,), 64.))

# The loss ----------------------------------------------------------------------------------------

def published(l_normal, l_anomalous, beta, tau):
    "The loss of the released code, one patch after the other; log-likelihoods per dimension, over 10."
    b = sorted(l_normal)[int(beta*len(l_normal))]
    pull, push = [], []
    for l in l_normal:
        w = 1. if l > -.2 else 11.7*(1 - np.exp(l))**.5*abs(l)
        if l <= b: pull.append(w*(b - l))
    for l in l_anomalous:
        l0 = min(l, -.1)                                                             # the hold is ours
        v = 1. if l0 <= -1 else .53*(1 + np.exp(l0))**2/abs(l0)
        if l >= b - tau: push.append(v*(l - (b - tau)))
    return b, np.mean(pull) if pull else 0., np.mean(push) if push else 0.

@pytest.mark.parametrize("centre", [-.1, -.5, -1.5])
def test_the_loss_is_the_published_one(centre):
    rng = np.random.default_rng(0); l_normal, l_anomalous = rng.normal(-.3, .2, 500), rng.normal(centre, .4, 60)
    b, pull, push = published(l_normal, l_anomalous, .05, .1)
    n, a = torch.from_numpy(l_normal).requires_grad_(), torch.from_numpy(l_anomalous).requires_grad_()
    got = push_pull(n, a, boundary(n, .05), .1)
    assert boundary(n, .05).item() == b and not boundary(n, .05).requires_grad
    np.testing.assert_allclose([v.item() for v in got.values()], [pull, push], rtol=1e-9)
    sum(got.values()).backward()                                                    # normal ones below are pulled up, anomalous ones above pushed down, nobody else moves
    assert ((n.grad < 0) == (n <= b)).all() and (n.grad <= 0).all() and ((a.grad > 0) == (a >= b - .1)).all()

def test_nothing_is_paid_where_the_margins_are_met():
    n, a = torch.tensor([-.1, -.2, .3], requires_grad=True), torch.tensor([-.5, -9.], requires_grad=True)
    got = push_pull(n, a, torch.tensor(-.3), .1); sum(got.values()).backward()
    assert got["pull"] == 0 == got["push"] and not n.grad.any() and not a.grad.any()
    assert push_pull(n, a[:0], torch.tensor(-.3), .1)["push"] == 0                  # no anomalous patch in a step: 0, not nan

# The detector ------------------------------------------------------------------------------------

def test_without_labels_it_is_a_plain_flow_and_says_so(backbone):
    f = backbone(pictures(4)); d = made(backbone, [dict(features=f)]); d.on_epoch(4, None)
    got = d.losses(dict(features=f)); l = [-F.logsigmoid(d.likelihood(i, x)).mean() for i, x in enumerate(f)]
    assert set(got) == {"likelihood"}; torch.testing.assert_close(got["likelihood"], sum(l))
    said = d.facts()["bgad"]
    assert said["plain flow"] is True and said["labelled images"] == said["labelled patches"] == said["epochs with labels"] == 0

def test_labels_count_after_the_warm_up(backbone):
    f, known = backbone(pictures(4)), spoiled(backbone, 2); d = made(backbone, [dict(features=f), known], warm_up=2); batch = dict(features=f, labelled=known)
    quiet = d.losses(batch); assert list(quiet) == ["likelihood", "pull", "push"] and quiet["pull"] == 0 == quiet["push"]
    d.on_epoch(0, None); assert d.losses(batch)["push"] == 0 and d.facts()["bgad"]["plain flow"]
    d.on_epoch(1, None); assert d.losses(batch)["push"] > 0; d.on_epoch(2, None)
    said = d.facts()["bgad"]
    assert said["epochs with labels"] == 1 and not said["plain flow"] and said["labelled images"] == 2 and said["labelled patches"] == [2*9, 2*4] and said["best-covered only"] == 0

def test_the_terms_with_labels_are_the_formulas(backbone):
    "Normal are the normal images' positions and the labelled ones' outside the defect; anomalous those inside, of every labelled batch."
    f, known = backbone(pictures(4)), spoiled(backbone, 3); cut = lambda a, b: dict(features=[x[a:b] for x in known["features"]], mask=known["mask"][a:b])
    d = made(backbone, [dict(features=f), cut(0, 2), cut(2, 3)], warm_up=0, weight=.5, beta=.1, tau=.2)
    assert d.facts()["bgad"]["labelled patches"] == [3*9, 3*4] and d.facts()["bgad"]["labelled images"] == 3
    want = dict(likelihood=0., pull=0., push=0.)
    for i, x in enumerate(f):
        bad = F.adaptive_max_pool2d(known["mask"], x.shape[-2:]).flatten() > 0; l, k = (d.likelihood(i, y).detach().double() for y in (x, known["features"][i]))
        l_normal, l_bad = torch.cat([l, k[~bad]]).numpy(), k[bad].numpy(); _, pull, push = published(l_normal/10, l_bad/10, .1, .2)
        w = [1. if v > -2 else 11.7*(1 - np.exp(v/10))**.5*abs(v/10) for v in l_normal]
        for name, v in dict(likelihood=np.mean(w*np.log1p(np.exp(-l_normal))), pull=.5*pull, push=.5*push).items(): want[name] += v
    got = {k: v.item() for k, v in d.losses(dict(features=f, labelled=known)).items()}
    assert got == pytest.approx(want, rel=1e-4) and (np.array(w) > 1).any()

def test_a_few_steps_separate_the_labelled_patches(backbone):
    f, known = backbone(pictures(6)), spoiled(backbone, 3)
    d = made(backbone, [dict(features=f), known], warm_up=0); optimizer = make_optimizer(d, d.recipe)
    terms = [train_step(d, dict(features=f, labelled=known), optimizer, d.recipe, p, 0, i) for i, p in enumerate(["float32"]*12 + ["bfloat16"])]
    assert terms[11]["push"] < .95*terms[0]["push"] and terms[12]["push"] < terms[10]["push"]

@pytest.mark.parametrize("most", [10**6, 40])
def test_rows_of_a_step(backbone, most):
    "Never more than asked for, none twice; anomalous and normal ones apart."
    d = made(backbone, [dict(features=backbone(pictures(2)))], rows=most); which = torch.rand(500, generator=torch.Generator().manual_seed(0)) < .3
    torch.manual_seed(0); at = d.some(which)
    assert which[at].all() and len(at.unique()) == len(at) == min(most, int(which.sum()))

def test_the_order_of_a_batch_changes_nothing(backbone):
    f, known = backbone(pictures(6)), spoiled(backbone, 3); known["mask"][0, 40:, :9] = 1; d = made(backbone, [dict(features=f), known], warm_up=0)
    order, turn = torch.tensor([4, 2, 0, 5, 1, 3]), torch.tensor([2, 0, 1])
    one, two = d.losses(dict(features=f, labelled=known)), d.losses(dict(features=[x[order] for x in f], labelled=dict(features=[x[turn] for x in known["features"]], mask=known["mask"][turn])))
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=1e-4, atol=1e-6)

def test_constants_come_from_normal_training_images_and_stay(backbone):
    f, known = backbone(pictures(6)), spoiled(backbone, 3); halves = [dict(features=[x[:4] for x in f]), dict(features=[x[4:] for x in f])]
    texture = dict(features=[9*x for x in f], texture=True)
    d, e = made(backbone, [dict(features=f)]), made(backbone, [*halves, known, texture])
    with torch.no_grad(): d.finish([dict(features=f)]); e.finish([*halves, known, texture])
    for k in ("top", "boundary", "flows.0.mean", "flows.1.deviation"): torch.testing.assert_close(d.state_dict()[k], e.state_dict()[k], rtol=1e-5, atol=1e-6)
    x = f[0].permute(0, 2, 3, 1).flatten(0, 2); torch.testing.assert_close((x - d.flows[0].mean)/d.flows[0].deviation, (x - x.mean(0))/x.std(0, correction=0).clamp_min(.1*x.std(0, correction=0).mean()), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        l = [d.likelihood(i, x) for i, x in enumerate(f)]; before = {k: v.clone() for k, v in d.state_dict().items()}
        assert d.top.tolist() == [v.max().item() for v in l] and d.boundary[0] == boundary(l[0]/10, .01)
        p, strange = d(pictures(6)), d(5*pictures(2, 3))
    assert all(torch.equal(v, d.state_dict()[k]) for k, v in before.items())
    assert 0 <= p.map.min() and p.map.max() <= 2 and strange.map.max() <= 2 and torch.equal(p.score, p.map.amax((1, 2)))
    want = sum(F.interpolate((v - v.max()).exp().view(6, 1, *x.shape[-2:]), (64, 64), mode="bilinear", align_corners=True)[:, 0] for v, x in zip(l, f))
    torch.testing.assert_close(p.map, 2 - want)

# Masks -------------------------------------------------------------------------------------------

def test_positions_of_a_mask(backbone):
    "Every cell that a defective pixel lies in; a mask that half covers no pixel keeps its best-covered cell, and is counted."
    mask = torch.zeros(3, 64, 64); mask[0, 7, 7] = .5; mask[1, 20:23, 30] = .49; mask[1, 50, 50] = .49; mask[2, :, 8] = 1
    found, none = defective(mask, (8, 8))
    assert [m.nonzero().tolist() for m in found[:2]] == [[[0, 0]], [[2, 3]]] and found[2].sum() == 8 and found[2][:, 1].all() and none.tolist() == [False, True, False]
    f, known = backbone(pictures(2)), dict(features=backbone(pictures(3, 5)), mask=mask); d = made(backbone, [dict(features=f), known], warm_up=0)
    assert d.facts()["bgad"]["best-covered only"] == 1 and d.facts()["bgad"]["labelled patches"] == [10, 6]
    assert d.losses(dict(features=f, labelled=dict(features=[x[1:2] for x in known["features"]], mask=mask[1:2])))["push"] > 0
