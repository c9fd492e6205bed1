"UniAD, part by part, against the published definition written out; what its mask bars; grids, options, seeds; and what a run records of it."
from dataclasses import replace
from functools import cache
import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from mdd_bench.detectors.detector import create_detector
from mdd_bench.detectors.uniad import DIM, HEADS, LAYERS, align, as_tokens, jitter_tokens, neighbour_mask, neighbour_side, window_score
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone
from mdd_bench.running.run import prepare as prepare_run, run
from mdd_bench.running.spec import make_spec
from mdd_bench.running.training import make_optimizer, seed_all, train_step
from conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

@cache
def pyramid(name="resnet18", layers=(1, 2)): return Backbone(name, "random", list(layers))
def pictures(n, seed=0, size=64): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
def batch(n=3, seed=0, size=64, backbone=None): return dict(features=(backbone or pyramid())(pictures(n, seed, size)))

def prepared(seed=0, size=64, backbone=None, **options):
    torch.manual_seed(seed); d = create_detector("uniad", backbone or pyramid(), **options).eval(); d.prepare([batch(size=size, backbone=backbone)])
    return d

@cache
def perturbed():
    "A prepared detector, on an 8 x 8 grid, whose every parameter is away from its start, zeros and ones included."
    d, g = prepared(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in d.parameters(): p += .05*torch.randn(p.shape, generator=g)
    return d

# The definition, written out

def resized(f, grid):
    "Bilinear with aligned corners: target i of n reads source i*(m - 1)/(n - 1)."
    out = torch.zeros(*f.shape[:2], *grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y, x = (k*(m - 1)/(n - 1) if n > 1 else 0. for k, m, n in ((i, f.shape[2], grid[0]), (j, f.shape[3], grid[1])))
            y0, x0 = int(y + 1e-9), int(x + 1e-9); y1, x1 = min(y0 + 1, f.shape[2] - 1), min(x0 + 1, f.shape[3] - 1); a, b = y - y0, x - x0
            out[:, :, i, j] = (1 - a)*(1 - b)*f[:, :, y0, x0] + (1 - a)*b*f[:, :, y0, x1] + a*(1 - b)*f[:, :, y1, x0] + a*b*f[:, :, y1, x1]
    return out

def barred_by_loops(h, w, k):
    barred = torch.zeros(h, w, h, w, dtype=torch.bool)
    for r in range(h):
        for c in range(w): barred[r, c, max(r - k//2, 0):r + k//2 + 1, max(c - k//2, 0):c + k//2 + 1] = True
    return barred.view(h*w, h*w)

def norm(x, layer): return (x - x.mean(-1, keepdim=True))/torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)*layer.weight + layer.bias
def feed_forward(x, mlp): return torch.relu(x @ mlp[0].weight.T + mlp[0].bias) @ mlp[3].weight.T + mlp[3].bias

def attend(query, key, value, a, barred):
    "One image, head by head: query, key [N, D] with positions added, value [N, D] without."
    (q, k, v), heads = (x @ W.T + b for x, W, b in zip((query, key, value), a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3))), []
    for q, k, v in zip(*(x.split(DIM//HEADS, 1) for x in (q, k, v))):
        heads.append(torch.softmax((q @ k.T/(DIM//HEADS)**.5).masked_fill(barred, float("-inf")), 1) @ v)
    return torch.cat(heads, 1) @ a.out_proj.weight.T + a.out_proj.bias

def encode(x, layer, e, barred):
    x = norm(x + attend(x + e, x + e, x, layer.attention, barred), layer.norms[0])
    return norm(x + feed_forward(x, layer.mlp), layer.norms[1])

def decode(m, y, layer, e, barred):
    t = layer.queries
    t = norm(t + attend(t + e, m + e, m, layer.memory, barred), layer.norms[0])
    t = norm(t + attend(t + e, y + e, y, layer.previous, barred), layer.norms[1])
    return norm(t + feed_forward(t, layer.mlp), layer.norms[2])

def positions_by_loops(p): return torch.stack([torch.cat([p.columns[c], p.rows[r]]) for r in range(len(p.rows)) for c in range(len(p.columns))])

def rebuild(tokens, net, e, barred):
    x = tokens @ net.enter.weight.T + net.enter.bias
    for layer in net.encoder: x = encode(x, layer, e, barred)
    y = x
    for layer in net.decoder: y = decode(x, y, layer, e, barred)
    return norm(y, net.norm) @ net.leave.weight.T + net.leave.bias

def close(a, b, tol=1e-5): torch.testing.assert_close(a, b, atol=tol, rtol=tol)

@pytest.mark.parametrize("shapes", [[(16, 16), (8, 8)], [(10, 14), (5, 7)], [(8, 8)], [(4, 4), (1, 1)]])
def test_alignment(shapes):
    g = torch.Generator().manual_seed(0); features = [torch.randn(2, 3 + i, *s, generator=g) for i, s in enumerate(shapes)]
    want = torch.cat([resized(f, shapes[-1]) for f in features], 1)
    close(align(features), want)
    h, w = shapes[-1]; close(as_tokens(align(features)), torch.stack([want[:, :, p//w, p % w] for p in range(h*w)], 1))

@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (3, 6), (1, 5), (1, 1)])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_mask(grid, k):
    assert torch.equal(neighbour_mask(grid, k), barred_by_loops(*grid, k)) and not neighbour_mask(grid, 0).any()

def test_jitter():
    "The noise of each token, over its length by C and alpha, is what torch draws."
    x = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3); got = jitter_tokens(x, 20.); torch.manual_seed(3); eps = torch.randn(2, 5, 30)
    for b in range(2):
        for p in range(5): close(got[b, p], x[b, p] + eps[b, p]*(x[b, p].square().sum().sqrt()/30)*20)
    assert torch.equal(jitter_tokens(x, 0.), x)

@torch.no_grad()
def test_the_parts():
    net = perturbed().transformer; e, barred = positions_by_loops(net.positions), barred_by_loops(8, 8, 3)
    assert torch.equal(net.positions(), e) and torch.equal(net.barred, barred)
    m, y = torch.randn(2, 2, 64, DIM, generator=torch.Generator().manual_seed(0))
    for layer in net.encoder: close(layer(m, e, barred), torch.stack([encode(x, layer, e, barred) for x in m]))
    for layer in net.decoder: close(layer(m, y, e, barred), torch.stack([decode(a, b, layer, e, barred) for a, b in zip(m, y)]))

@torch.no_grad()
def test_the_whole_and_its_map():
    d, x = perturbed(), pictures(2, 5); f = pyramid()(x)
    tokens = as_tokens(torch.cat([resized(l, (8, 8)) for l in f], 1))
    want = torch.stack([rebuild(t, d.transformer, positions_by_loops(d.transformer.positions), barred_by_loops(8, 8, 3)) for t in tokens])
    close(d.transformer(tokens), want)
    p, small = d.predict(f, (64, 64)), torch.sqrt(((want - tokens)**2).sum(2)).view(2, 1, 8, 8)
    close(p.map, resized(small, (64, 64))[:, 0], 1e-4)
    close(p.score, torch.stack([torch.stack([m[i:i+5, j:j+5].mean() for i in range(60) for j in range(60)]).max() for m in p.map]))       # 16*64/224 = 4.57
    close(d.losses(dict(features=f))["reconstruction"], ((want - tokens)**2).mean())
    assert p.map.dtype == torch.float32 and not p.extra

@torch.no_grad()
def test_the_pair_of_levels_is_not_a_square():
    "Rows and columns are not mixed up on a grid of 4 x 6."
    f = [torch.rand(2, c, 32//s, 48//s, generator=torch.Generator().manual_seed(c)) for c, s in ((64, 4), (128, 8))]
    torch.manual_seed(0); d = create_detector("uniad", pyramid()).eval(); d.prepare([dict(features=f)])
    assert d.grid == (4, 6) and d.facts() == dict(grid=[4, 6], neighbours=1)
    tokens = as_tokens(align(f)); want = torch.stack([rebuild(t, d.transformer, positions_by_loops(d.transformer.positions), barred_by_loops(4, 6, 1)) for t in tokens])
    close(d.predict(f, (32, 48)).map, resized(torch.sqrt(((want - tokens)**2).sum(2)).view(2, 1, 4, 6), (32, 48))[:, 0], 1e-4)

def test_the_score_at_the_papers_size():
    m = torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(0)); m[1, 30:50, 60:70] += 1
    assert torch.equal(window_score(m), F.avg_pool2d(m, 16, stride=1).flatten(1).max(1).values)
    one = torch.zeros(1, 20, 40); one[0, 3, 5] = 1                       # windows of round(1.43) x round(2.86) = 1 x 3
    assert window_score(one).item() == pytest.approx(1/3)

# What the mask bars

def all_attentions(net): return [l.attention for l in net.encoder] + [a for l in net.decoder for a in (l.memory, l.previous)]

@torch.no_grad()
def test_an_attention_does_not_see_its_neighbourhood_and_sees_all_else():
    "The states that ask stay, the memory changes: in the encoder a change of the position itself would change the question, too."
    net = perturbed().transformer; e, g = net.positions(), torch.Generator().manual_seed(0); x, m = torch.randn(2, 1, 64, DIM, generator=g)
    assert len(all_attentions(net)) == 3*LAYERS
    for i, attention in enumerate(all_attentions(net)):
        before = attention(x, m, e, net.barred)[0]
        for p in range(64) if i in (0, 4, 5) else (0, 27):
            near = m.clone(); near[0, net.barred[p]] += 5*torch.randn(int(net.barred[p].sum()), DIM, generator=g)
            close(attention(x, near, e, net.barred)[0, p], before[p], 1e-6)
            r, c = divmod(p, 8); out = p + 2 if c < 6 else p - 2                             # two columns away: just outside the 3 x 3 square
            assert not net.barred[p, out] and net.barred[p, out - 1 if c < 6 else out + 1]
            far = m.clone(); far[0, out] += 5*torch.randn(DIM, generator=g)
            assert not torch.allclose(attention(x, far, e, net.barred)[0, p], before[p], atol=1e-4)

@torch.no_grad()
def test_layers_do_not_see_their_neighbourhood():
    "The encoder's attention in its own use, neighbours but not the position changed; the first decoder layer with memory and previous output changed, the position included: its first answer is the same to the bit."
    net = perturbed().transformer; e, g = net.positions(), torch.Generator().manual_seed(0); x = torch.randn(1, 64, DIM, generator=g); layer = net.decoder[0]
    before, first = net.encoder[0].attention(x, x, e, net.barred)[0], layer.memory(layer.queries[None], x, e, net.barred)[0]
    whole = layer(x, x, e, net.barred)[0]
    for p in range(64):
        near = net.barred[p].clone(); changed = x.clone(); changed[0, near] += torch.randn(int(near.sum()), DIM, generator=g)
        assert torch.equal(layer.memory(layer.queries[None], changed, e, net.barred)[0, p], first[p])
        close(layer(changed, changed, e, net.barred)[0, p], whole[p], 1e-6)                  # a whole decoder layer: p's queries, both attentions, the feed-forward part
        near[p] = False; changed = x.clone(); changed[0, near] += torch.randn(int(near.sum()), DIM, generator=g)
        close(net.encoder[0].attention(changed, changed, e, net.barred)[0, p], before[p], 1e-6)

@torch.no_grad()
def test_a_decoder_layer_has_no_other_way_than_its_attentions():
    net = prepared().transformer; layer, m = net.decoder[1], torch.randn(2, 64, DIM, generator=torch.Generator().manual_seed(0))
    for a in (layer.memory, layer.previous): a.out_proj.weight.zero_()
    y = layer(m, m + 1, net.positions(), net.barred)
    assert torch.equal(y[0], y[1])

# How it starts and trains

def test_how_it_starts():
    net = prepared().transformer
    for name, part in net.named_modules():
        if isinstance(part, torch.nn.Linear):
            bound = (6/sum(part.weight.shape))**.5
            assert not part.bias.any() and .98*bound < part.weight.abs().max() <= bound, name
    assert 0 <= net.positions().min() and net.positions().max() < 1 and net.positions().std().item() == pytest.approx(12**-.5, rel=.05)
    q = net.decoder[0].queries; assert q.shape == (64, DIM) and abs(q.mean()) < .05 and q.std().item() == pytest.approx(1, rel=.05)
    for layers in (net.encoder, net.decoder):                      # copies of one layer; their linear layers are drawn anew
        first, last = (dict(l.named_parameters()) for l in (layers[0], layers[-1]))
        assert {n for n in first if not torch.equal(first[n], last[n])} == {n for n in first if n.endswith("weight") and ("mlp" in n or "out_proj" in n)}
        assert all(first[n] is not last[n] for n in first)
    assert all(a.dropout == .1 for a in all_attentions(net)) and {p.p for p in net.modules() if isinstance(p, torch.nn.Dropout)} == {.1}

def test_the_recipe():
    r = create_detector("uniad", pyramid()).recipe
    assert (r.epochs, r.batch, r.optimizer, r.lr, r.betas, r.weight_decay, r.drops, r.clip) == (1000, 8, "adamw", 1e-4, (.9, .999), 1e-4, (.8,), .1)
    assert (r.backbone, r.strides) == ("efficientnet_b4", (2, 4, 8, 16)) and not create_detector("uniad", pyramid()).needs

def no_dropout(d):
    d.train()
    for part in d.modules():
        if isinstance(part, torch.nn.Dropout): part.p = 0.
        if isinstance(part, torch.nn.MultiheadAttention): part.dropout = 0.
    return d

def test_the_target_is_clean_and_the_input_is_not():
    b, with_jitter, without = batch(), no_dropout(prepared()), no_dropout(prepared(jitter=0))
    clean = as_tokens(align(b["features"]))
    torch.manual_seed(4); got = with_jitter.losses(b)["reconstruction"]
    torch.manual_seed(4); want = ((with_jitter.transformer(jitter_tokens(clean, 20.)) - clean)**2).mean()
    close(got, want)
    close(without.losses(b)["reconstruction"], ((without.transformer(clean) - clean)**2).mean())
    assert not torch.allclose(got, without.losses(b)["reconstruction"], rtol=1e-4)
    seen = []
    handle = with_jitter.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0])); with_jitter.losses(b); handle.remove()
    assert ((seen[0] - clean).norm(dim=2)/clean.norm(dim=2)).mean().item() == pytest.approx(20/192**.5, rel=.05)
    with_jitter.losses(b)["reconstruction"].backward()
    assert not any(f.requires_grad for f in b["features"])

def test_nothing_is_drawn_in_evaluation():
    d, b = prepared(), batch()
    torch.manual_seed(0); one = d.losses(b)["reconstruction"]; torch.manual_seed(1); assert torch.equal(one, d.losses(b)["reconstruction"])
    with torch.no_grad(): p, q = d.predict(b["features"], (64, 64)), d.predict(b["features"], (64, 64))
    assert torch.equal(p.map, q.map) and torch.equal(p.score, q.score)

@torch.no_grad()
def test_one_image_at_a_time():
    d, b = perturbed(), batch(5, 2); p = d.predict(b["features"], (64, 64))
    for i in range(5): one = d.predict([f[i:i+1] for f in b["features"]], (64, 64)); close(one.map[0], p.map[i], 1e-4); close(one.score[0], p.score[i], 1e-4)

def steps(n, seed=0, jitter=20., **recipe):
    seed_all(seed); d = create_detector("uniad", pyramid(), jitter=jitter); b = batch(2)
    d.eval(); d.prepare([b]); d.train()
    r = replace(d.recipe, **recipe); optimizer = make_optimizer(d, r)
    return d, [train_step(d, b, optimizer, r, "float32", 0, i)["reconstruction"] for i in range(n)]

def test_one_batch_is_learned():
    _, curve = steps(25, lr=1e-3)
    assert curve[-1] < .2*curve[0]

def test_jitter_and_dropout_follow_the_seed():
    (a, one), (b, two), (_, other) = steps(3), steps(3), steps(3, seed=1)
    assert one == two != other and all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    d, x = steps(1, jitter=0.)[0], batch()                                  # without jitter there is still dropout
    torch.manual_seed(0); u = d.losses(x)["reconstruction"]; torch.manual_seed(0); assert torch.equal(u, d.losses(x)["reconstruction"]) and not torch.equal(u, d.losses(x)["reconstruction"])

# Grids and options

@pytest.mark.parametrize("name, layers, size, grid", [("resnet18", (0, 1, 2, 3), 64, 4), ("mobilenetv3_small_100", (1, 2, 3), 64, 4), ("resnet18", (2,), 64, 8), ("resnet18", (1, 2), 128, 16), ("resnet18", (3, 4), 64, 2)])
def test_any_pyramid(name, layers, size, grid):
    backbone = pyramid(name, layers); d = prepared(size=size, backbone=backbone)
    assert d.grid == (grid, grid) and d.transformer.enter.in_features == sum(backbone.channels)
    with torch.no_grad(): p = d(pictures(2, 1, size))
    assert p.map.shape == (2, size, size) and torch.isfinite(p.map).all() and torch.isfinite(p.score).all()
    assert torch.isfinite(d.train().losses(batch(size=size, backbone=backbone))["reconstruction"])

def test_the_default_square():
    assert {n: neighbour_side((n, n)) for n in (2, 3, 4, 7, 8, 14, 16, 28)} == {2: 1, 3: 1, 4: 1, 7: 3, 8: 3, 14: 7, 16: 7, 28: 13} and neighbour_side((4, 14)) == 1
    with pytest.raises(SpecError, match="at most 0"): neighbour_side((1, 1))
    assert neighbour_side((1, 1), 0) == 0

def test_a_square_that_leaves_nothing():
    "On 8 x 8 a square of 7 leaves every position something; 9 does not, and is refused in `prepare`, before anything is nan."
    d = prepared(neighbours=7); assert d.facts()["neighbours"] == 7 and torch.isfinite(d(pictures(1)).map).all()
    torch.manual_seed(0); d = create_detector("uniad", pyramid(), neighbours=9)
    with pytest.raises(SpecError, match="neighbours=9.*8 x 8.*at most 7"): d.prepare([batch()])
    assert prepared(neighbours=0).transformer.barred.any().item() is False

def test_another_grid_is_refused():
    d = prepared()
    for f in (lambda: d(pictures(1, size=96)), lambda: d.losses(batch(size=96))):
        with pytest.raises(SpecError, match="12 x 12.*8 x 8.*size"): f()
    with pytest.raises(SpecError, match="prepare"): create_detector("uniad", pyramid())(pictures(1))

def test_prepare_looks_at_the_first_batch_only():
    def batches():
        yield batch()
        raise AssertionError("the second batch was asked for")
    d = create_detector("uniad", pyramid()).eval(); d.prepare(batches()); assert d.grid == (8, 8)

@pytest.mark.parametrize("options", [dict(neighbours=4), dict(neighbours=-1), dict(neighbours=2.5), dict(neighbours=True), dict(neighbours="all"), dict(jitter=-1), dict(jitter=float("inf")), dict(jitter="much"), dict(layers=3)])
def test_bad_options(options):
    with pytest.raises(SpecError): create_detector("uniad", pyramid(), **options)

@pytest.mark.parametrize("into", [None, 64, 96])
def test_save_and_load(tmp_path, into):
    "Into a detector that knows no grid, the same, or another one."
    d, x = perturbed(), pictures(2, 5); save_file(d.state_dict(), tmp_path/"m.safetensors")
    torch.manual_seed(9); fresh = create_detector("uniad", pyramid()) if into is None else prepared(9, into)
    fresh.load_state_dict(load_file(tmp_path/"m.safetensors")); fresh.eval()
    assert torch.equal(fresh(x).map, d(x).map) and torch.equal(fresh(x).score, d(x).score) and fresh.facts() == d.facts()

def test_a_run_says_its_grid_and_square(tmp_path):
    r = run(make_spec(**SMALL | dict(detector="uniad")), tmp_path)
    assert (r.provenance["grid"], r.provenance["neighbours"]) == ([8, 8], 3)
    assert run(make_spec(**SMALL | dict(detector="uniad")), tmp_path/"again", store_gb=0).metrics == r.metrics
    assert prepare_run(make_spec(**SMALL | dict(detector="uniad", layers=None))).backbone.strides == [2, 4, 8, 16]
