"SimpleNet against its published definition written out, its loss, its noise, its batch normalisation, its rates, and what a run makes of it."
from copy import deepcopy
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from mdd_bench.detectors import simplenet
from mdd_bench.detectors.detector import create_detector, full_options
from mdd_bench.detectors.simplenet import Discriminator, counterfeit, truncated_loss, xavier
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone
from mdd_bench.running.run import prepare, run
from mdd_bench.running.spec import make_spec
from mdd_bench.running.training import make_optimizer, set_rates, train_step
from conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

@pytest.fixture(scope="module")
def backbone(): return Backbone("resnet18", "procedural", [1, 2])

def pictures(n, seed=0): return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
def made(backbone, seed=0, **options): torch.manual_seed(seed); return create_detector("simplenet", backbone, **dict(hidden=32) | options)

def used(backbone, **options):
    "A detector after a few steps, so that the running statistics are not those of the start."
    d = made(backbone, **options); optimizer = make_optimizer(d, d.recipe); f = backbone(pictures(4))
    for i in range(3): train_step(d, dict(features=f), optimizer, d.recipe, "float32", 0, i)
    return d

# The published definition, written out -----------------------------------------------------------

def paper_patches(features):
    "Equations 1 to 3, [B, H*W, D]: all nine cells of each 3 x 3 neighbourhood, zeros beyond the border, their mean; coarser levels on the finest grid; side by side."
    h, w = features[0].shape[-2:]
    levels = []
    for f in features:
        b, c, *grid = f.shape
        cells = F.unfold(f, 3, padding=1).view(b, c, 9, *grid)
        levels.append(F.interpolate(cells.sum(2)/9, (h, w), mode="bilinear", align_corners=False))
    return torch.stack([torch.cat([l[:, :, y, x] for l in levels], 1) for y in range(h) for x in range(w)], 1)

def paper_discriminator(q, state, mean, var):
    "Linear, batch normalisation with the given moments, LeakyReLU 0.2, linear without bias; rows [N, D] to [N]."
    a = q @ state["discriminator.0.weight"].T + state["discriminator.0.bias"]
    if mean is None: mean, var = a.mean(0), a.var(0, unbiased=False)
    a = (a - mean)/torch.sqrt(var + 1e-5)*state["discriminator.1.weight"] + state["discriminator.1.bias"]
    return torch.where(a > 0, a, .2*a) @ state["discriminator.3.weight"][0]

def adapted(z, state): return z @ state["adaptor.weight"].T + state["adaptor.bias"]

PYRAMIDS = [[1], [1, 2], [1, 2, 3]]

@pytest.mark.parametrize("layers", PYRAMIDS, ids=str)
def test_map_and_score_are_the_papers(layers):
    b = Backbone("resnet18", "random", layers); d = used(b).eval(); state, x = d.state_dict(), pictures(3, 7)
    with torch.no_grad(): p = d(x)
    z = paper_patches(b(x)); n, hw, dim = z.shape
    scores = -paper_discriminator(adapted(z.reshape(-1, dim), state), state, state["discriminator.1.running_mean"], state["discriminator.1.running_var"]).view(n, 1, *b(x)[0].shape[-2:])
    torch.testing.assert_close(p.map, F.interpolate(scores, (64, 64), mode="bilinear", align_corners=False)[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(p.score, torch.stack([s.max() for s in scores]), atol=1e-5, rtol=1e-5)
    assert dim == sum(b.channels) and p.map.shape == (3, 64, 64)

@pytest.mark.parametrize("layers", PYRAMIDS, ids=str)
def test_losses_are_the_papers(layers):
    "With the same noise: one call over true and fake, moments of both together, hinge at 0.5 on either side."
    b = Backbone("resnet18", "random", layers); d = used(b).train(); state, f = deepcopy(d.state_dict()), b(pictures(2, 3))
    torch.manual_seed(11); terms = d.losses(dict(features=f))
    q = adapted(paper_patches(f).flatten(0, 1), state)
    torch.manual_seed(11); fake = q + .015*torch.randn(q.shape)
    s = paper_discriminator(torch.cat([q, fake]), state, None, None)
    true, fake = s[:len(q)], s[len(q):]
    torch.testing.assert_close(terms["normal"], torch.clamp(.5 - true, min=0).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms["noise"], torch.clamp(.5 + fake, min=0).mean(), atol=1e-5, rtol=1e-5)
    assert set(terms) == {"normal", "noise"}

# The loss ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("margin", [.1, .5, 2.])
def test_the_loss_is_zero_where_margins_are_met_and_linear_beyond(margin):
    loss = lambda t, f: {k: v.item() for k, v in truncated_loss(torch.tensor([t]), torch.tensor([f]), margin).items()}
    assert loss(margin, -margin) == loss(margin + 5, -margin - 5) == dict(normal=0, noise=0)
    for by in (.25, 1., 3.): assert loss(margin - by, -margin + by) == dict(normal=pytest.approx(by, rel=1e-5), noise=pytest.approx(by, rel=1e-5))
    assert loss(-9., -9.)["noise"] == 0 and loss(9., 9.)["normal"] == 0

def test_who_is_beyond_the_margin_gets_no_gradient():
    true, fake = torch.tensor([0., .4, .6, 9.], requires_grad=True), torch.tensor([0., -.4, -.6, -9.], requires_grad=True)
    sum(truncated_loss(true, fake, .5).values()).backward()
    assert true.grad.tolist() == [-.25, -.25, 0, 0] and fake.grad.tolist() == [.25, .25, 0, 0]

# Noise -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("std", [.015, .3])
def test_the_noise_has_its_deviation_and_no_mean(std):
    torch.manual_seed(0); q = torch.zeros(2000, 50); noise = counterfeit(q, std)
    assert noise.std().item() == pytest.approx(std, rel=.02) and abs(noise.mean().item()) < .02*std and noise.std(0).min() > .9*std and noise.std(1).min() > .6*std

def seen_by_discriminator(d, features):
    got = []
    handle = d.discriminator.register_forward_pre_hook(lambda _, x: got.append(x[0].detach()))
    d.losses(dict(features=features)); handle.remove()
    return got

@pytest.mark.parametrize("noise", [.015, .2])
def test_the_noise_comes_after_the_adaptor_and_one_call_sees_both(backbone, noise):
    "Its size does not change with the adaptor's weights, as it would if it went through them."
    d = made(backbone, noise=noise)
    with torch.no_grad(): d.adaptor.weight.mul_(10)
    got = seen_by_discriminator(d, backbone(pictures(2)))
    assert len(got) == 1
    q, fake = got[0].chunk(2)
    torch.testing.assert_close(q, d.adaptor(paper_patches(backbone(pictures(2))).flatten(0, 1)).detach(), atol=1e-5, rtol=1e-5)
    assert (fake - q).std().item() == pytest.approx(noise, rel=.02) and len(q) == 2*16*16

def test_noise_is_drawn_anew_in_training_and_never_at_test(backbone):
    d = used(backbone); f = backbone(pictures(2))
    first, second = (d.losses(dict(features=f))["noise"].item() for _ in range(2))
    assert first != second
    d.eval(); state = torch.get_rng_state()
    with torch.no_grad(): a, b = d(pictures(2)), d(pictures(2))
    assert torch.equal(a.map, b.map) and torch.equal(state, torch.get_rng_state())

def test_batch_normalisation_sees_true_and_fake_together(backbone):
    "The running mean moves by a tenth of the way to the mean of both; apart, it would be updated twice."
    d = made(backbone, noise=5.); got = seen_by_discriminator(d, backbone(pictures(2)))[0]
    hidden = got @ d.discriminator[0].weight.T + d.discriminator[0].bias
    bn = d.discriminator[1]
    assert bn.num_batches_tracked.item() == 1
    torch.testing.assert_close(bn.running_mean, .1*hidden.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bn.running_var, .9 + .1*hidden.var(0), atol=1e-3, rtol=1e-4)
    before = deepcopy(bn.state_dict()); d.eval(); d(pictures(2))
    assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items())

# Weights and rates -------------------------------------------------------------------------------

def test_the_layers_and_their_start(backbone):
    "Xavier's normal distribution: variance 2/(in + out); the last layer has no bias, the adaptor has one."
    d = made(backbone, hidden=1024); dim = sum(backbone.channels)
    shapes = {k: tuple(v.shape) for k, v in d.named_parameters()}
    assert shapes == {"adaptor.weight": (dim, dim), "adaptor.bias": (dim,), "discriminator.0.weight": (1024, dim), "discriminator.0.bias": (1024,), "discriminator.1.weight": (1024,), "discriminator.1.bias": (1024,), "discriminator.3.weight": (1, 1024)}
    for w in (d.adaptor.weight, d.discriminator[0].weight, d.discriminator[3].weight):
        assert w.std().item() == pytest.approx((2/sum(w.shape))**.5, rel=.1)
        assert w.abs().max() > 1.8*w.std()                       # normal, not uniform: that ends at 1.73 deviations
    assert d.discriminator[2].negative_slope == .2 and d.adaptor.bias.abs().max() <= dim**-.5 and d.adaptor.bias.std() > 0
    torch.manual_seed(0); net = Discriminator(8, 4); bias = net[0].bias.clone(); xavier(net)
    assert torch.equal(net[0].bias, bias)

def test_rates_of_the_two_groups_and_every_parameter_once(backbone):
    d = made(backbone); optimizer = make_optimizer(d, d.recipe)
    of = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(of) == len(list(d.parameters()))
    assert {n: of[id(p)] for n, p in d.named_parameters()} == {n: (1e-4, 1e-2) if n.startswith("adaptor") else (2e-4, 1e-5) for n, _ in d.named_parameters()}
    assert type(optimizer) is torch.optim.AdamW
    for epoch, factor in ((0, 1), (79, 1), (80, .1), (99, .1)):
        set_rates(optimizer, d.recipe, epoch)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2e-4*factor, 1e-4*factor])

def test_the_recipe():
    d = simplenet.SimpleNet; r = d.recipe
    assert (r.epochs, r.batch, r.drops, r.strides, r.backbone, r.clip) == (100, 32, (.8,), (8, 16), "wide_resnet50_2", None)
    assert full_options("simplenet", {}) == dict(noise=.015, margin=.5, hidden=1024) and d.needs == frozenset()
    for hook in ("prepare", "on_epoch", "finish"): assert hook not in vars(d)     # nothing is chosen between epochs: the last one stays

# Training ----------------------------------------------------------------------------------------

def test_the_loss_falls_on_one_batch():
    backbone = Backbone("resnet18", "random", [1, 2])     # the noise is of its features' size
    d = made(backbone, noise=.1); optimizer = make_optimizer(d, replace(d.recipe, lr=2e-3)); f = backbone(pictures(2)); start = {k: v.clone() for k, v in d.named_parameters()}
    losses = [sum(train_step(d, dict(features=f), optimizer, d.recipe, "float32", 0, i).values()) for i in range(60)]
    assert sum(losses[-5:]) < .3*sum(losses[:5])
    assert all(not torch.equal(v, start[k]) for k, v in d.named_parameters())

def test_the_score_is_the_largest_patch_and_not_the_largest_pixel(backbone):
    "One patch stands out: bilinear enlargement by four never reaches its value at a pixel's centre."
    d = made(backbone).eval()
    with torch.no_grad():
        for p in d.parameters(): p.zero_()
        d.adaptor.weight.copy_(torch.eye(len(d.adaptor.weight)))
        d.discriminator[0].weight[0, 0], d.discriminator[1].weight[0], d.discriminator[3].weight[0, 0] = 1., 1., -1.
    f = [torch.zeros(2, c, s, s) for c, s in zip(backbone.channels, (16, 8))]
    f[0][0, 0, 5, 5] = 9.
    with torch.no_grad(): p = d.predict(f, (64, 64))
    assert p.score[0].item() == pytest.approx(1, rel=1e-4) and p.score[1] == 0      # 9 spread over nine cells, each 1
    f[0][0, 0, 5, 5], f[0][0, 0, 0, 0] = 0., 9.                                        # in the corner, four cells of 1
    torch.testing.assert_close(d.predict(f, (64, 64)).score[0].item(), 1., atol=1e-4, rtol=0)
    rough = torch.randn(2, 64, 16, 16, generator=torch.Generator().manual_seed(0)).mul(3)
    with torch.no_grad(): p = d.predict([rough, f[1][:2]], (64, 64))
    assert (p.score > p.map.amax((1, 2)) + 1e-3).all()

@pytest.mark.parametrize("options", [dict(noise=0), dict(noise=-.1), dict(noise="much"), dict(noise=float("inf")), dict(margin=0), dict(margin=float("nan")), dict(hidden=0), dict(hidden=2.5), dict(hidden="wide"), dict(std=.015)])
def test_bad_options(backbone, options):
    with pytest.raises(SpecError): create_detector("simplenet", backbone, **options)

def test_a_run_keeps_the_last_epoch_and_repeats_itself(tmp_path):
    spec = make_spec(**SMALL | dict(detector="simplenet", options=dict(hidden=16), epochs=2))
    r = run(spec, tmp_path/"a")
    assert run(spec, tmp_path/"b", store_gb=0).metrics == r.metrics
    assert r.cost["parameters_trained"] == 192*192 + 192 + 16*192 + 3*16 + 16
    history = next((tmp_path/"a").rglob("history.csv")).read_text().splitlines()
    assert history[0] == "epoch,step,loss,normal,noise" and history[-1].startswith("1,")

def test_it_trains_in_bfloat16(backbone):
    d = made(backbone); optimizer = make_optimizer(d, d.recipe)
    terms = train_step(d, dict(features=backbone(pictures(2))), optimizer, d.recipe, "bfloat16", 0, 0)
    assert 0 < terms["noise"] < 5 and all(p.dtype == torch.float32 for p in d.parameters())

def test_levels_are_the_methods_own(): assert prepare(make_spec(**SMALL | dict(detector="simplenet", layers=None))).backbone.strides == [8, 16]
