"SimpleNet against its published definition written out: loss, noise, normalisation, rates, and its record."
from copy import deepcopy
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from mdd_bench.detectors import simplenet
from mdd_bench.detectors.detector import create_detector, full_options
from mdd_bench.detectors.simplenet import Discriminator, counterfeit, truncated_loss, xavier
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone
from mdd_bench.running.identity import resolve
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec
from mdd_bench.running.training import make_optimizer, set_rates, train_step
from conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

@pytest.fixture(scope="module")
def backbone(): return Backbone("resnet18", "procedural", [1, 2])

def pictures(n, seed=0): return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))

def make(backbone, seed=0, **options):
    torch.manual_seed(seed)
    return create_detector("simplenet", backbone, **dict(hidden=32) | options)

def train(detector, optimizer, features, steps, recipe=None, precision="float32"):
    "Loss terms of some steps on one batch."
    recipe, batch = recipe or detector.recipe, dict(features=features)
    terms = [train_step(detector, batch, optimizer, recipe, precision) for _ in range(steps)]
    return [{name: loss.item() for name, loss in step.items()} for step in terms]

def trained(backbone, **options):
    "A detector after a few steps, so that the running statistics are not those of the start."
    detector = make(backbone, **options)
    train(detector, make_optimizer(detector, detector.recipe), backbone(pictures(4)), 3)
    return detector

def close(a, b, atol=1e-5, rtol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=rtol)

# The published definition, written out -----------------------------------------------------------

def paper_patches(features):
    """Equations 1 to 3, [B, H*W, D]: the mean of the nine cells of each 3 x 3 neighbourhood.

    Beyond the border are zeros. Coarser levels are enlarged to the finest grid and put side by side.
    """
    h, w = features[0].shape[-2:]
    levels = []
    for f in features:
        b, c, *grid = f.shape
        cells = F.unfold(f, 3, padding=1).view(b, c, 9, *grid)
        levels.append(F.interpolate(cells.sum(2)/9, (h, w), mode="bilinear", align_corners=False))
    positions = [(y, x) for y in range(h) for x in range(w)]
    return torch.stack([torch.cat([level[:, :, y, x] for level in levels], 1) for y, x in positions], 1)

def paper_discriminator(q, state, mean=None, var=None):
    "Linear, batch normalisation (by q's own moments if none are given), LeakyReLU 0.2, linear: [N]."
    a = q @ state["discriminator.0.weight"].T + state["discriminator.0.bias"]
    if mean is None: mean, var = a.mean(0), a.var(0, unbiased=False)
    normalised = (a - mean)/torch.sqrt(var + 1e-5)
    a = normalised*state["discriminator.1.weight"] + state["discriminator.1.bias"]
    return torch.where(a > 0, a, .2*a) @ state["discriminator.3.weight"][0]

def adapted(z, state): return z @ state["adaptor.weight"].T + state["adaptor.bias"]

PYRAMIDS = [[1], [1, 2], [1, 2, 3]]

@pytest.mark.parametrize("layers", PYRAMIDS, ids=str)
def test_map_and_score_are_the_papers(layers):
    backbone = Backbone("resnet18", "random", layers)
    detector, images = trained(backbone).eval(), pictures(3, 7)
    state, features = detector.state_dict(), backbone(images)
    with torch.no_grad(): prediction = detector(images)
    q = adapted(paper_patches(features).flatten(0, 1), state)
    moments = state["discriminator.1.running_mean"], state["discriminator.1.running_var"]
    grid = -paper_discriminator(q, state, *moments).view(3, 1, *features[0].shape[-2:])
    enlarged = F.interpolate(grid, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    close(prediction.map, enlarged)
    close(prediction.score, torch.stack([g.max() for g in grid]))
    assert q.shape[1] == sum(backbone.channels) and prediction.map.shape == (3, 64, 64)

@pytest.mark.parametrize("layers", PYRAMIDS, ids=str)
def test_losses_are_the_papers(layers):
    "With the same noise: one call over true and fake, moments of both together, hinge at 0.5 on either side."
    backbone = Backbone("resnet18", "random", layers)
    detector = trained(backbone, noise=.2).train()
    detector.spread.fill_(.25)
    state, features = deepcopy(detector.state_dict()), backbone(pictures(2, 3))
    torch.manual_seed(11)
    terms = detector.losses(dict(features=features))
    q = adapted(paper_patches(features).flatten(0, 1), state)
    torch.manual_seed(11)
    fake = q + .2*.25*torch.randn(q.shape)
    true_score, fake_score = paper_discriminator(torch.cat([q, fake]), state).split(len(q))
    close(terms["normal"], torch.clamp(.5 - true_score, min=0).mean())
    close(terms["noise"], torch.clamp(.5 + fake_score, min=0).mean())
    assert set(terms) == {"normal", "noise"}

# The loss ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("margin", [.1, .5, 2.])
def test_the_loss_is_zero_where_margins_are_met_and_linear_beyond(margin):
    def loss(true, fake):
        terms = truncated_loss(torch.tensor([true]), torch.tensor([fake]), margin)
        return {name: term.item() for name, term in terms.items()}
    assert loss(margin, -margin) == loss(margin + 5, -margin - 5) == dict(normal=0, noise=0)
    for missing in (.25, 1., 3.):
        expected = pytest.approx(missing, rel=1e-5)
        assert loss(margin - missing, -margin + missing) == dict(normal=expected, noise=expected)
    assert loss(-9., -9.)["noise"] == 0 and loss(9., 9.)["normal"] == 0

def test_beyond_the_margin_there_is_no_gradient():
    true = torch.tensor([0., .4, .6, 9.], requires_grad=True)
    fake = torch.tensor([0., -.4, -.6, -9.], requires_grad=True)
    sum(truncated_loss(true, fake, .5).values()).backward()
    assert true.grad.tolist() == [-.25, -.25, 0, 0] and fake.grad.tolist() == [.25, .25, 0, 0]

# Noise -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("std", [.015, .3])
def test_the_noise_has_its_deviation_and_no_mean(std):
    torch.manual_seed(0)
    noise = counterfeit(torch.zeros(2000, 50), std)
    assert noise.std().item() == pytest.approx(std, rel=.02) and abs(noise.mean().item()) < .02*std
    assert noise.std(0).min() > .9*std and noise.std(1).min() > .6*std

def discriminator_inputs(detector, features):
    "What the discriminator is called with while the losses are computed."
    inputs = []
    def record(module, args): inputs.append(args[0].detach())
    handle = detector.discriminator.register_forward_pre_hook(record)
    detector.losses(dict(features=features))
    handle.remove()
    return inputs

@pytest.mark.parametrize("noise", [.015, .2])
def test_the_noise_comes_after_the_adaptor_and_one_call_sees_both(backbone, noise):
    "Its size does not change with the adaptor's weights, as it would if it went through them."
    detector, features = make(backbone, noise=noise), backbone(pictures(2))
    with torch.no_grad(): detector.adaptor.weight.mul_(10)
    inputs = discriminator_inputs(detector, features)
    assert len(inputs) == 1
    q, fake = inputs[0].chunk(2)
    close(q, detector.adaptor(paper_patches(features).flatten(0, 1)).detach())
    assert (fake - q).std().item() == pytest.approx(noise, rel=.02) and len(q) == 2*16*16

def test_the_noise_is_in_units_of_the_adapted_normal_patches(backbone):
    "The mean over entries of their deviations; a labelled image does not count."
    detector = make(backbone, noise=.3)
    batches = [dict(features=backbone(pictures(2, seed))) for seed in (1, 2)]
    labelled = dict(features=[9*f for f in batches[0]["features"]], mask=torch.zeros(2, 64, 64))
    patches = torch.cat([paper_patches(b["features"]).flatten(0, 1) for b in batches])
    with torch.no_grad():
        spread = detector.adaptor(patches).double().std(0, unbiased=False).mean().item()
        detector.prepare([batches[0], labelled, batches[1]])
    q, fake = discriminator_inputs(detector, batches[0]["features"])[0].chunk(2)
    assert detector.spread.item() == pytest.approx(spread, rel=1e-4)
    assert (fake - q).std().item() == pytest.approx(.3*spread, rel=.02)

def test_noise_is_drawn_anew_in_training_and_never_at_test(backbone):
    detector, features = trained(backbone), backbone(pictures(2))
    first, second = (detector.losses(dict(features=features))["noise"].item() for _ in range(2))
    assert first != second
    detector.eval()
    state = torch.get_rng_state()
    with torch.no_grad(): a, b = detector(pictures(2)), detector(pictures(2))
    assert torch.equal(a.map, b.map) and torch.equal(state, torch.get_rng_state())

def test_batch_normalisation_sees_true_and_fake_together(backbone):
    "The running mean moves by a tenth of the way to the mean of both; apart, it would be updated twice."
    detector = make(backbone, noise=5.)
    inputs = discriminator_inputs(detector, backbone(pictures(2)))[0]
    linear, batch_norm, _, _ = detector.discriminator
    hidden = inputs @ linear.weight.T + linear.bias
    assert batch_norm.num_batches_tracked.item() == 1
    close(batch_norm.running_mean, .1*hidden.mean(0), rtol=1e-4)
    close(batch_norm.running_var, .9 + .1*hidden.var(0), atol=1e-3, rtol=1e-4)
    before = deepcopy(batch_norm.state_dict())
    detector.eval()
    detector(pictures(2))
    assert all(torch.equal(value, before[name]) for name, value in batch_norm.state_dict().items())

# Weights and rates -------------------------------------------------------------------------------

def test_the_layers(backbone):
    "The last layer has no bias, the adaptor has one."
    detector, dim = make(backbone, hidden=1024), sum(backbone.channels)
    shapes = {name: tuple(p.shape) for name, p in detector.named_parameters()}
    assert shapes == {
        "adaptor.weight": (dim, dim), "adaptor.bias": (dim,),
        "discriminator.0.weight": (1024, dim), "discriminator.0.bias": (1024,),
        "discriminator.1.weight": (1024,), "discriminator.1.bias": (1024,),
        "discriminator.3.weight": (1, 1024),
    }
    assert detector.discriminator[2].negative_slope == .2

def test_how_the_layers_start(backbone):
    "Xavier's normal distribution: variance 2/(in + out); biases are torch's."
    detector, dim = make(backbone, hidden=1024), sum(backbone.channels)
    linear, _, _, last = detector.discriminator
    for weight in (detector.adaptor.weight, linear.weight, last.weight):
        assert weight.std().item() == pytest.approx((2/sum(weight.shape))**.5, rel=.1)
        assert weight.abs().max() > 1.8*weight.std()    # normal, not uniform: that ends at 1.73 deviations
    assert detector.adaptor.bias.abs().max() <= dim**-.5 and detector.adaptor.bias.std() > 0
    torch.manual_seed(0)
    net = Discriminator(8, 4)
    bias = net[0].bias.clone()
    xavier(net)
    assert torch.equal(net[0].bias, bias)

def test_rates_of_the_two_groups_and_every_parameter_once(backbone):
    detector = make(backbone)
    optimizer = make_optimizer(detector, detector.recipe)
    parameters = dict(detector.named_parameters())
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(rates) == len(parameters)
    for name, parameter in parameters.items():
        assert rates[id(parameter)] == ((1e-4, 1e-2) if name.startswith("adaptor") else (2e-4, 1e-5))
    assert type(optimizer) is torch.optim.AdamW
    for done, factor in ((0, 1), (.79, 1), (.8, .1), (.99, .1)):
        set_rates(optimizer, detector.recipe, done)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2e-4*factor, 1e-4*factor])

def test_the_recipe():
    cls = simplenet.SimpleNet
    r = cls.recipe
    assert (r.epochs, r.batch, r.drops, r.clip) == (100, 32, (.8,), None)
    assert (r.strides, r.backbone) == ((8, 16), "wide_resnet50_2.tv_in1k")
    assert full_options("simplenet", {}) == dict(noise=.3, margin=.5, hidden=1024)
    assert cls.needs == frozenset()
    for hook in ("on_epoch", "finish"):
        assert hook not in vars(cls)                    # nothing is chosen between epochs: the last one stays

# Training ----------------------------------------------------------------------------------------

def test_the_loss_falls_on_one_batch():
    backbone = Backbone("resnet18", "random", [1, 2])
    detector = make(backbone, noise=.1)                     # the noise suits the size of these features
    optimizer = make_optimizer(detector, replace(detector.recipe, lr=2e-3))
    start = {name: p.clone() for name, p in detector.named_parameters()}
    terms = train(detector, optimizer, backbone(pictures(2)), 60)
    losses = [sum(t.values()) for t in terms]
    assert sum(losses[-5:]) < .3*sum(losses[:5])
    assert all(not torch.equal(p, start[name]) for name, p in detector.named_parameters())

@pytest.fixture
def first_channel(backbone):
    "A detector whose patch score is the patch's first entry."
    detector = make(backbone).eval()
    linear, batch_norm, _, last = detector.discriminator
    with torch.no_grad():
        for p in detector.parameters(): p.zero_()
        detector.adaptor.weight.copy_(torch.eye(len(detector.adaptor.weight)))
        linear.weight[0, 0], batch_norm.weight[0], last.weight[0, 0] = 1., 1., -1.
    return detector

def test_the_score_is_the_largest_patch_and_not_the_largest_pixel(backbone, first_channel):
    "One patch stands out: bilinear enlargement by four never reaches its value at a pixel's centre."
    @torch.no_grad()
    def predict(fine, coarse): return first_channel.predict([fine, coarse], (64, 64))

    fine, coarse = (torch.zeros(2, c, s, s) for c, s in zip(backbone.channels, (16, 8)))
    fine[0, 0, 5, 5] = 9.
    score = predict(fine, coarse).score
    assert score[0].item() == pytest.approx(1, rel=1e-4) and score[1] == 0   # 9 over nine cells, each 1
    fine[0, 0, 5, 5], fine[0, 0, 0, 0] = 0., 9.                              # in the corner, four cells of 1
    assert predict(fine, coarse).score[0].item() == pytest.approx(1, abs=1e-4, rel=0)
    rough = torch.randn(2, 64, 16, 16, generator=torch.Generator().manual_seed(0)).mul(3)
    prediction = predict(rough, coarse)
    assert (prediction.score > prediction.map.amax((1, 2)) + 1e-3).all()

def test_it_trains_in_bfloat16(backbone):
    detector = make(backbone)
    optimizer = make_optimizer(detector, detector.recipe)
    terms, = train(detector, optimizer, backbone(pictures(2)), 1, precision="bfloat16")
    assert 0 < terms["noise"] < 5 and all(p.dtype == torch.float32 for p in detector.parameters())

# Options and runs --------------------------------------------------------------------------------

BAD_OPTIONS = [dict(noise=0), dict(noise=-.1), dict(noise="much"), dict(noise=float("inf")),
               dict(margin=0), dict(margin=float("nan")), dict(hidden=0), dict(hidden=2.5),
               dict(hidden="wide"), dict(std=.015)]

@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options(backbone, options):
    with pytest.raises(SpecError): create_detector("simplenet", backbone, **options)

def test_a_run_keeps_the_last_epoch_and_repeats_itself(tmp_path):
    spec = make_spec(**SMALL | dict(detector="simplenet", options=dict(hidden=16), epochs=2))
    record = run(spec, tmp_path/"a")
    assert run(spec, tmp_path/"b", Runtime(cache_gb=0)).metrics == record.metrics
    assert record.cost["parameters_trained"] == 64*64 + 64 + 16*64 + 3*16 + 16
    history = next((tmp_path/"a").rglob("history.csv")).read_text().splitlines()
    assert history[0] == "epoch,step,loss,normal,noise" and history[-1].startswith("1,")

def test_levels_are_the_methods_own():
    spec = make_spec(**SMALL | dict(detector="simplenet", layers=None))
    assert resolve(spec).backbone.strides == [8, 16]
