"""UniAD, part by part, against the published definition written out.

What its mask hides; grids, options and seeds; and what a run records of it.
"""
from dataclasses import replace
from functools import cache
import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from mdd_bench.detectors.detector import create_detector
from mdd_bench.detectors.uniad import (
    DIM, HEADS, LAYERS, align, as_tokens, jitter_tokens, neighbour_mask, neighbour_side, window_score,
)
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone
from mdd_bench.running.identity import resolve
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec
from mdd_bench.running.training import make_optimizer, seed_all, train_step
from conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

@cache
def pyramid(name="resnet18", layers=(1, 2)): return Backbone(name, "random", list(layers))

def generator(seed): return torch.Generator().manual_seed(seed)
def pictures(n, seed=0, size=64): return torch.rand(n, 3, size, size, generator=generator(seed))

def batch(n=3, seed=0, size=64, backbone=None):
    return dict(features=(backbone or pyramid())(pictures(n, seed, size)))

def prepared(seed=0, size=64, backbone=None, **options):
    torch.manual_seed(seed)
    detector = create_detector("uniad", backbone or pyramid(), **options).eval()
    detector.prepare([batch(size=size, backbone=backbone)])
    return detector

@cache
def perturbed():
    "A prepared detector, on an 8 x 8 grid, with every parameter away from its start (zeros and ones too)."
    detector, g = prepared(), generator(1)
    with torch.no_grad():
        for p in detector.parameters(): p += .05*torch.randn(p.shape, generator=g)
    return detector

def close(a, b, tol=1e-5): torch.testing.assert_close(a, b, atol=tol, rtol=tol)

# The definition, written out

def source_cells(i, n, m):
    "Target i of n reads source i*(m - 1)/(n - 1): the cell before, the cell after, and the latter's share."
    source = i*(m - 1)/(n - 1) if n > 1 else 0.
    low = int(source + 1e-9)
    return low, min(low + 1, m - 1), source - low

def resized(f, grid):
    "Bilinear with aligned corners."
    out = torch.zeros(*f.shape[:2], *grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y0, y1, a = source_cells(i, grid[0], f.shape[2])
            x0, x1, b = source_cells(j, grid[1], f.shape[3])
            above = (1 - b)*f[:, :, y0, x0] + b*f[:, :, y0, x1]
            below = (1 - b)*f[:, :, y1, x0] + b*f[:, :, y1, x1]
            out[:, :, i, j] = (1 - a)*above + a*below
    return out

def mask_by_loops(h, w, k):
    mask = torch.zeros(h, w, h, w, dtype=torch.bool)
    for r in range(h):
        for c in range(w):
            mask[r, c, max(r - k//2, 0):r + k//2 + 1, max(c - k//2, 0):c + k//2 + 1] = True
    return mask.view(h*w, h*w)

def norm(x, layer):
    deviation = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return (x - x.mean(-1, keepdim=True))/deviation*layer.weight + layer.bias

def feed_forward(x, mlp):
    hidden = torch.relu(x @ mlp[0].weight.T + mlp[0].bias)
    return hidden @ mlp[3].weight.T + mlp[3].bias

def attend(query, key, value, attention, mask):
    "One image, head by head: query, key [N, D] with positions added, value [N, D] without."
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    projected = [x @ w.T + b for x, w, b in zip((query, key, value), weights, biases)]
    size, heads = DIM//HEADS, []
    for q, k, v in zip(*(x.split(size, 1) for x in projected)):
        similarity = (q @ k.T/size**.5).masked_fill(mask, float("-inf"))
        heads.append(torch.softmax(similarity, 1) @ v)
    return torch.cat(heads, 1) @ attention.out_proj.weight.T + attention.out_proj.bias

def encode(x, layer, e, mask):
    x = norm(x + attend(x + e, x + e, x, layer.attention, mask), layer.norms[0])
    return norm(x + feed_forward(x, layer.mlp), layer.norms[1])

def decode(m, y, layer, e, mask):
    t = layer.queries
    t = norm(t + attend(t + e, m + e, m, layer.memory, mask), layer.norms[0])
    t = norm(t + attend(t + e, y + e, y, layer.previous, mask), layer.norms[1])
    return norm(t + feed_forward(t, layer.mlp), layer.norms[2])

def positions_by_loops(positions):
    rows, columns = positions.rows, positions.columns
    return torch.stack([torch.cat([column, row]) for row in rows for column in columns])

def rebuild_one(tokens, net, e, mask):
    x = tokens @ net.enter.weight.T + net.enter.bias
    for layer in net.encoder: x = encode(x, layer, e, mask)
    y = x
    for layer in net.decoder: y = decode(x, y, layer, e, mask)
    return norm(y, net.norm) @ net.leave.weight.T + net.leave.bias

def rebuild(tokens, net, mask):
    "Images one by one, [B, N, C] to the same."
    e = positions_by_loops(net.positions)
    return torch.stack([rebuild_one(t, net, e, mask) for t in tokens])

def distance_grid(rebuilt, tokens, grid): return torch.sqrt(((rebuilt - tokens)**2).sum(2)).view(-1, 1, *grid)

@pytest.mark.parametrize("shapes", [[(16, 16), (8, 8)], [(10, 14), (5, 7)], [(8, 8)], [(4, 4), (1, 1)]])
def test_alignment(shapes):
    g = generator(0)
    features = [torch.randn(2, 3 + i, *shape, generator=g) for i, shape in enumerate(shapes)]
    expected = torch.cat([resized(f, shapes[-1]) for f in features], 1)
    close(align(features), expected)
    h, w = shapes[-1]
    close(as_tokens(align(features)), torch.stack([expected[:, :, p//w, p % w] for p in range(h*w)], 1))

@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (3, 6), (1, 5), (1, 1)])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_mask(grid, k):
    assert torch.equal(neighbour_mask(grid, k), mask_by_loops(*grid, k))
    assert not neighbour_mask(grid, 0).any()

def test_jitter():
    "The noise of each token, over its length by C and alpha, is what torch draws."
    x = torch.randn(2, 5, 30, generator=generator(0))
    torch.manual_seed(3)
    jittered = jitter_tokens(x, 20.)
    torch.manual_seed(3)
    noise = torch.randn(2, 5, 30)
    for b in range(2):
        for p in range(5):
            length = x[b, p].square().sum().sqrt()
            close(jittered[b, p], x[b, p] + noise[b, p]*(length/30)*20)
    assert torch.equal(jitter_tokens(x, 0.), x)

@torch.no_grad()
def test_the_parts():
    net = perturbed().transformer
    e, mask = positions_by_loops(net.positions), mask_by_loops(8, 8, 3)
    assert torch.equal(net.positions(), e) and torch.equal(net.mask, mask)
    m, y = torch.randn(2, 2, 64, DIM, generator=generator(0))
    for layer in net.encoder:
        close(layer(m, e, mask), torch.stack([encode(x, layer, e, mask) for x in m]))
    for layer in net.decoder:
        close(layer(m, y, e, mask), torch.stack([decode(a, b, layer, e, mask) for a, b in zip(m, y)]))

@torch.no_grad()
def test_the_whole_and_its_map():
    detector, images = perturbed(), pictures(2, 5)
    features = pyramid()(images)
    tokens = as_tokens(torch.cat([resized(level, (8, 8)) for level in features], 1))
    rebuilt = rebuild(tokens, detector.transformer, mask_by_loops(8, 8, 3))
    close(detector.transformer(tokens), rebuilt)
    prediction = detector.predict(features, (64, 64))
    close(prediction.map, resized(distance_grid(rebuilt, tokens, (8, 8)), (64, 64))[:, 0], 1e-4)
    windows = prediction.map.unfold(1, 5, 1).unfold(2, 5, 1)                        # 16*64/224 = 4.57
    assert windows.shape == (2, 60, 60, 5, 5)
    close(prediction.score, windows.mean((3, 4)).amax((1, 2)))
    close(detector.losses(dict(features=features))["reconstruction"], ((rebuilt - tokens)**2).mean())
    assert prediction.map.dtype == torch.float32 and not prediction.extra

@torch.no_grad()
def test_rows_and_columns_are_not_mixed_up():
    "On a grid of 4 x 6."
    features = [torch.rand(2, c, 32//s, 48//s, generator=generator(c)) for c, s in ((64, 4), (128, 8))]
    torch.manual_seed(0)
    detector = create_detector("uniad", pyramid()).eval()
    detector.prepare([dict(features=features)])
    assert detector.grid == (4, 6) and detector.facts() == dict(grid=[4, 6], neighbours=1)
    tokens = as_tokens(align(features))
    rebuilt = rebuild(tokens, detector.transformer, mask_by_loops(4, 6, 1))
    expected = resized(distance_grid(rebuilt, tokens, (4, 6)), (32, 48))[:, 0]
    close(detector.predict(features, (32, 48)).map, expected, 1e-4)

def test_the_score_at_the_papers_size():
    maps = torch.rand(3, 224, 224, generator=generator(0))
    maps[1, 30:50, 60:70] += 1
    assert torch.equal(window_score(maps), F.avg_pool2d(maps, 16, stride=1).flatten(1).max(1).values)
    one = torch.zeros(1, 20, 40)
    one[0, 3, 5] = 1                                    # windows of round(1.43) x round(2.86) = 1 x 3
    assert window_score(one).item() == pytest.approx(1/3)

# What the mask hides

def all_attentions(net):
    of_decoder = [a for layer in net.decoder for a in (layer.memory, layer.previous)]
    return [layer.attention for layer in net.encoder] + of_decoder

def changed(x, positions, g, scale=1):
    "x [1, N, D] with noise at the given positions."
    x = x.clone()
    x[0, positions] += scale*torch.randn(x[0, positions].shape, generator=g)
    return x

@torch.no_grad()
def test_an_attention_does_not_see_its_neighbourhood_and_sees_all_else():
    """The states that ask stay, the memory changes.

    In the encoder a change of the position itself would change the question, too.
    """
    net, g = perturbed().transformer, generator(0)
    e, mask = net.positions(), net.mask
    x, m = torch.randn(2, 1, 64, DIM, generator=g)
    assert len(all_attentions(net)) == 3*LAYERS
    for i, attention in enumerate(all_attentions(net)):
        before = attention(x, m, e, mask)[0]
        for p in range(64) if i in (0, 4, 5) else (0, 27):
            near = changed(m, mask[p], g, scale=5)
            close(attention(x, near, e, mask)[0, p], before[p], 1e-6)
            toward = 1 if p % 8 < 6 else -1             # two columns away: just outside the 3 x 3 square
            assert mask[p, p + toward] and not mask[p, p + 2*toward]
            far = changed(m, p + 2*toward, g, scale=5)
            assert not torch.allclose(attention(x, far, e, mask)[0, p], before[p], atol=1e-4)

@torch.no_grad()
def test_the_encoders_attention_in_its_own_use():
    "States and memory are the same tokens; neighbours are changed, but not the position itself."
    net, g = perturbed().transformer, generator(0)
    e, mask, attention = net.positions(), net.mask, net.encoder[0].attention
    x = torch.randn(1, 64, DIM, generator=g)
    before = attention(x, x, e, mask)[0]
    for p in range(64):
        neighbours = mask[p].clone()
        neighbours[p] = False
        near = changed(x, neighbours, g)
        close(attention(near, near, e, mask)[0, p], before[p], 1e-6)

@torch.no_grad()
def test_the_first_decoder_layer_does_not_see_its_neighbourhood():
    "Memory and previous output are changed, the position included; the first answer is the same to the bit."
    net, g = perturbed().transformer, generator(0)
    e, mask, layer = net.positions(), net.mask, net.decoder[0]
    x = torch.randn(1, 64, DIM, generator=g)
    first, whole = layer.memory(layer.queries[None], x, e, mask)[0], layer(x, x, e, mask)[0]
    for p in range(64):
        near = changed(x, mask[p], g)
        assert torch.equal(layer.memory(layer.queries[None], near, e, mask)[0, p], first[p])
        close(layer(near, near, e, mask)[0, p], whole[p], 1e-6)    # both attentions and the feed-forward part

@torch.no_grad()
def test_a_decoder_layer_has_no_other_way_than_its_attentions():
    net = prepared().transformer
    layer, m = net.decoder[1], torch.randn(2, 64, DIM, generator=generator(0))
    for attention in (layer.memory, layer.previous): attention.out_proj.weight.zero_()
    y = layer(m, m + 1, net.positions(), net.mask)
    assert torch.equal(y[0], y[1])

# How it starts and trains

def test_how_the_linear_layers_start():
    "Xavier's uniform distribution, and biases of zero."
    for name, part in prepared().transformer.named_modules():
        if isinstance(part, torch.nn.Linear):
            bound = (6/sum(part.weight.shape))**.5
            assert not part.bias.any() and .98*bound < part.weight.abs().max() <= bound, name

def test_how_positions_and_queries_start():
    net = prepared().transformer
    e, queries = net.positions(), net.decoder[0].queries
    assert 0 <= e.min() and e.max() < 1 and e.std().item() == pytest.approx(12**-.5, rel=.05)
    assert queries.shape == (64, DIM) and abs(queries.mean()) < .05
    assert queries.std().item() == pytest.approx(1, rel=.05)

def test_layers_start_as_copies_of_one():
    "Their linear layers are drawn anew."
    net = prepared().transformer
    for layers in (net.encoder, net.decoder):
        first, last = (dict(layer.named_parameters()) for layer in (layers[0], layers[-1]))
        different = {name for name in first if not torch.equal(first[name], last[name])}
        weights = {name for name in first if name.endswith("weight")}
        assert different == {name for name in weights if "mlp" in name or "out_proj" in name}
        assert all(first[name] is not last[name] for name in first)

def test_the_dropout():
    net = prepared().transformer
    assert all(attention.dropout == .1 for attention in all_attentions(net))
    assert {part.p for part in net.modules() if isinstance(part, torch.nn.Dropout)} == {.1}

def test_the_recipe():
    detector = create_detector("uniad", pyramid())
    r = detector.recipe
    assert (r.epochs, r.batch, r.optimizer, r.lr) == (1000, 8, "adamw", 1e-4)
    assert (r.betas, r.weight_decay, r.drops, r.clip) == ((.9, .999), 1e-4, (.8,), .1)
    assert (r.backbone, r.strides) == ("efficientnet_b4", (2, 4, 8, 16)) and not detector.needs

def no_dropout(detector):
    detector.train()
    for part in detector.modules():
        if isinstance(part, torch.nn.Dropout): part.p = 0.
        if isinstance(part, torch.nn.MultiheadAttention): part.dropout = 0.
    return detector

def seeded_loss(detector, b, seed):
    torch.manual_seed(seed)
    return detector.losses(b)["reconstruction"]

def test_the_target_is_clean_and_the_input_is_not():
    b, with_jitter, without = batch(), no_dropout(prepared()), no_dropout(prepared(jitter=0))
    clean = as_tokens(align(b["features"]))
    loss = seeded_loss(with_jitter, b, 4)
    torch.manual_seed(4)
    expected = ((with_jitter.transformer(jitter_tokens(clean, 20.)) - clean)**2).mean()
    close(loss, expected)
    loss_without = without.losses(b)["reconstruction"]
    close(loss_without, ((without.transformer(clean) - clean)**2).mean())
    assert not torch.allclose(loss, loss_without, rtol=1e-4)

def test_the_input_has_the_jitter_of_the_options():
    b, detector, inputs = batch(), no_dropout(prepared()), []
    clean = as_tokens(align(b["features"]))
    def record(module, args): inputs.append(args[0])
    handle = detector.transformer.register_forward_pre_hook(record)
    detector.losses(b)
    handle.remove()
    length = (inputs[0] - clean).norm(dim=2)/clean.norm(dim=2)
    assert length.mean().item() == pytest.approx(20/192**.5, rel=.05)
    detector.losses(b)["reconstruction"].backward()
    assert not any(f.requires_grad for f in b["features"])

def test_nothing_is_drawn_in_evaluation():
    detector, b = prepared(), batch()
    assert torch.equal(seeded_loss(detector, b, 0), seeded_loss(detector, b, 1))
    with torch.no_grad(): one, other = (detector.predict(b["features"], (64, 64)) for _ in range(2))
    assert torch.equal(one.map, other.map) and torch.equal(one.score, other.score)

@torch.no_grad()
def test_one_image_at_a_time():
    detector, features = perturbed(), batch(5, 2)["features"]
    together = detector.predict(features, (64, 64))
    for i in range(5):
        alone = detector.predict([f[i:i+1] for f in features], (64, 64))
        close(alone.map[0], together.map[i], 1e-4)
        close(alone.score[0], together.score[i], 1e-4)

def train(n, seed=0, jitter=20., **recipe):
    "A detector after n steps on one batch, and its losses."
    seed_all(seed)
    detector, b = create_detector("uniad", pyramid(), jitter=jitter).eval(), batch(2)
    detector.prepare([b])
    detector.train()
    recipe = replace(detector.recipe, **recipe)
    optimizer = make_optimizer(detector, recipe)
    terms = [train_step(detector, b, optimizer, recipe, "float32") for _ in range(n)]
    return detector, [t["reconstruction"].item() for t in terms]

def test_one_batch_is_learned():
    _, curve = train(25, lr=1e-3)
    assert curve[-1] < .2*curve[0]

def test_jitter_and_dropout_follow_the_seed():
    (a, curve), (b, same_seed), (_, other_seed) = train(3), train(3), train(3, seed=1)
    assert curve == same_seed != other_seed
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))

def test_without_jitter_there_is_still_dropout():
    detector, b = train(1, jitter=0.)[0], batch()
    first = seeded_loss(detector, b, 0)
    assert torch.equal(first, seeded_loss(detector, b, 0))
    assert not torch.equal(first, detector.losses(b)["reconstruction"])     # drawn further on, not anew

# Grids and options

PYRAMIDS = [("resnet18", (0, 1, 2, 3), 64, 4), ("mobilenetv3_small_100", (1, 2, 3), 64, 4),
            ("resnet18", (2,), 64, 8), ("resnet18", (1, 2), 128, 16), ("resnet18", (3, 4), 64, 2)]

@pytest.mark.parametrize("name, layers, size, grid", PYRAMIDS)
def test_any_pyramid(name, layers, size, grid):
    backbone = pyramid(name, layers)
    detector = prepared(size=size, backbone=backbone)
    assert detector.grid == (grid, grid)
    assert detector.transformer.enter.in_features == sum(backbone.channels)
    with torch.no_grad(): prediction = detector(pictures(2, 1, size))
    assert prediction.map.shape == (2, size, size)
    assert torch.isfinite(prediction.map).all() and torch.isfinite(prediction.score).all()
    loss = detector.train().losses(batch(size=size, backbone=backbone))["reconstruction"]
    assert torch.isfinite(loss)

def test_the_default_square():
    sides = {n: neighbour_side((n, n)) for n in (2, 3, 4, 7, 8, 14, 16, 28)}
    assert sides == {2: 1, 3: 1, 4: 1, 7: 3, 8: 3, 14: 7, 16: 7, 28: 13}
    assert neighbour_side((4, 14)) == 1
    with pytest.raises(SpecError, match="at most 0"): neighbour_side((1, 1))
    assert neighbour_side((1, 1), 0) == 0

def test_a_square_that_leaves_nothing():
    "On 8 x 8 a side of 7 leaves every position something; 9 does not, and is refused before anything is nan."
    detector = prepared(neighbours=7)
    assert detector.facts()["neighbours"] == 7 and torch.isfinite(detector(pictures(1)).map).all()
    detector = create_detector("uniad", pyramid(), neighbours=9)
    with pytest.raises(SpecError, match="neighbours=9.*8 x 8.*at most 7"): detector.prepare([batch()])
    assert prepared(neighbours=0).transformer.mask.any().item() is False

def test_another_grid_is_refused():
    detector = prepared()
    with pytest.raises(SpecError, match="12 x 12.*8 x 8.*size"): detector(pictures(1, size=96))
    with pytest.raises(SpecError, match="12 x 12.*8 x 8.*size"): detector.losses(batch(size=96))
    with pytest.raises(SpecError, match="prepare"): create_detector("uniad", pyramid())(pictures(1))

def test_prepare_looks_at_the_first_batch_only():
    def batches():
        yield batch()
        raise AssertionError("the second batch was asked for")
    detector = create_detector("uniad", pyramid()).eval()
    detector.prepare(batches())
    assert detector.grid == (8, 8)

BAD_OPTIONS = [dict(neighbours=4), dict(neighbours=-1), dict(neighbours=2.5), dict(neighbours=True),
               dict(neighbours="all"), dict(jitter=-1), dict(jitter=float("inf")), dict(jitter="much"),
               dict(layers=3)]

@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options(options):
    with pytest.raises(SpecError): create_detector("uniad", pyramid(), **options)

@pytest.mark.parametrize("into", [None, 64, 96])
def test_save_and_load(tmp_path, into):
    "Into a detector that knows no grid, the same, or another one."
    detector, images = perturbed(), pictures(2, 5)
    save_file(detector.state_dict(), tmp_path/"m.safetensors")
    torch.manual_seed(9)
    fresh = create_detector("uniad", pyramid()) if into is None else prepared(9, into)
    fresh.load_state_dict(load_file(tmp_path/"m.safetensors"))
    fresh.eval()
    prediction, expected = fresh(images), detector(images)
    assert torch.equal(prediction.map, expected.map) and torch.equal(prediction.score, expected.score)
    assert fresh.facts() == detector.facts()

def small_spec(**values): return make_spec(**SMALL | dict(detector="uniad") | values)

def test_a_run_records_its_grid_and_square(tmp_path):
    record = run(small_spec(), tmp_path)
    assert (record.provenance["grid"], record.provenance["neighbours"]) == ([8, 8], 3)
    assert run(small_spec(), tmp_path/"other", Runtime(cache_gb=0)).metrics == record.metrics
    assert resolve(small_spec(layers=None)).backbone.strides == [2, 4, 8, 16]
