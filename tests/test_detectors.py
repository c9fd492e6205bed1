"What every detector must do, whatever it is: shapes, determinism, no label at test, gradients where they belong, one image, an unseen class, save and load, option errors."
import inspect
from copy import deepcopy
from functools import cache
import pytest, torch
from safetensors.torch import load_file, save_file
from mdd_bench.detectors.detector import create_detector, detector_class, known_options, list_detectors
from mdd_bench.errors import SpecError
from mdd_bench.parts.backbone import Backbone, hash_weights
from mdd_bench.running.training import make_optimizer, seed_all, train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")
PYRAMIDS = dict(small=("resnet18", [1, 2]), coarse=("mobilenetv3_small_050", [2, 3, 4]), signed=("mobilenetv3_small_100", None), one=("resnet18", [2]))
VARIANTS = {n: (n, {}) for n in list_detectors()} | {"mddnet, class memory": ("mddnet", dict(memory="class", prototypes=4, fusion="sum")), "mddnet, cluster": ("mddnet", dict(memory="cluster", prototypes=4, decoder="light")),
                                                     "patchcore, class": ("patchcore", dict(coreset_scope="class", coreset_ratio=.1)),
                                                     "dmad, no labels": ("dmad", {}), "bgad, no labels": ("bgad", {}), "dmad, normal bank": ("dmad", dict(bank="normal", knowledge="distance"))}

@cache
def pyramid(key="small"): return Backbone(PYRAMIDS[key][0], "random", PYRAMIDS[key][1])

every_variant, every_pyramid = pytest.mark.parametrize("variant", VARIANTS), pytest.mark.parametrize("on", PYRAMIDS)

def images(n, seed=0, cls=0):
    "Stripes of a class of its own angle."
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing="ij")
    angle = torch.tensor(.7*cls)
    waves = torch.stack([torch.sin(.5*(x*angle.cos() + y*angle.sin()) + 6.28*torch.rand(1, generator=g)) for _ in range(n)])
    return (.5 + .3*waves[:, None] + .05*torch.randn(n, 3, 64, 64, generator=g)).clamp(0, 1)

def batches_of(backbone, needs, labels=(0, 0, 0, 0, 1, 1, 1, 1), anomalies=True):
    "Two batches of eight images of two classes, with what `needs` asks and nothing else."
    made = []
    for seed in range(2):
        clean = torch.cat([images(4, seed, 0), images(4, seed + 10, 1)]); abnormal = clean.clone(); abnormal[:, :, 20:40, 24:44] = .5
        mask = torch.zeros(8, 64, 64, dtype=torch.bool); mask[:, 20:40, 24:44] = True
        b = dict(features=backbone(clean), index=torch.arange(8*seed, 8*seed + 8), path=[f"{seed}{i}.png" for i in range(8)])
        if "pairs" in needs: b |= dict(image=clean, abnormal=abnormal, features_abnormal=backbone(abnormal), mask=mask)
        if "cls" in needs: b["cls"] = torch.tensor(labels)
        if "labelled" in needs and anomalies: b["labelled"] = anomalies_of(backbone)
        made.append(b)
    return made

def anomalies_of(backbone):
    "Three labelled anomalies; the mask of the third is a single pixel."
    x, mask = images(3, 20, 0), torch.zeros(3, 64, 64); x[:, :, 20:40, 24:44] = .5; mask[:2, 20:40, 24:44] = 1; mask[2, 30, 30] = .6
    return dict(features=backbone(x), index=torch.arange(3), path=[f"bad{i}.png" for i in range(3)], mask=mask)

def hooked(backbone, needs, anomalies=True):
    "What the hooks see: normal images, then labelled anomalies and textures for those who ask."
    made = batches_of(backbone, needs, anomalies=anomalies)
    if "labelled" in needs and anomalies: made.append(anomalies_of(backbone))
    if "textures" in needs: made.append(dict(features=backbone(torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(5))), index=torch.arange(6), path=[f"texture {i}" for i in range(6)], texture=True))
    return made

@cache
def trained(variant, on="small", seed=0, copy=0):
    "A detector after the whole line: prepare, two epochs of two steps with their hooks, finish. `copy` asks for another one, made alike."
    (name, options), backbone, epochs = VARIANTS[variant], pyramid(on), 2
    seed_all(seed)
    d = create_detector(name, backbone, classes=2, **options)
    anomalies, recipe = not variant.endswith("no labels"), d.recipe
    batches = batches_of(backbone, d.needs, anomalies=anomalies)
    def hook(f, *args):
        d.eval()
        with torch.no_grad(): f(*args, hooked(backbone, d.needs, anomalies))
    hook(d.prepare)
    if recipe.epochs:
        optimizer = make_optimizer(d, recipe)
        for epoch in range(epochs):
            seed_all(seed, epoch + 1); d.train()
            for i, b in enumerate(batches): train_step(d, b, optimizer, recipe, "float32", epoch, i)
            hook(d.on_epoch, epoch)
    hook(d.finish)
    return d.eval()

def same(a, b): return a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))

@every_pyramid
@every_variant
def test_the_contract(variant, on):
    before, d = hash_weights(pyramid(on)), trained(variant, on)
    x = torch.cat([images(2, 5, 0), images(2, 6, 1)])
    with torch.no_grad(): p, again, single = d(x), d(x), [d(i[None]) for i in x]
    assert p.map.shape == (4, 64, 64) and p.map.dtype == torch.float32 and torch.isfinite(p.map).all()
    assert p.score is None or (p.score.shape == (4,) and torch.isfinite(p.score).all())
    assert all(len(v) == 4 for v in p.extra.values())
    assert torch.equal(p.map, again.map) and (p.score is None or torch.equal(p.score, again.score))                         # nothing is drawn at test
    torch.testing.assert_close(torch.cat([s.map for s in single]), p.map, atol=2e-2*p.map.abs().max().item(), rtol=2e-2)     # one image alone; features are rounded to half precision
    assert hash_weights(pyramid(on)) == before and not any(q.requires_grad or q.grad is not None for q in pyramid(on).parameters())
    assert not any(k.startswith("backbone") for k in d.state_dict())

@every_variant
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(variant):
    assert same(trained(variant), trained(variant, copy=1))
    assert same(trained(variant), trained(variant, seed=1)) == variant.startswith("patchcore")     # 192 numbers per patch are not projected: nothing is drawn

@every_pyramid
@every_variant
def test_gradients_only_where_they_belong(variant, on):
    "All that is given to the optimizer gets a gradient, all that could get one is given to it, once; the backbone gets none."
    d = deepcopy(trained(variant, on)).train()
    if not d.recipe.epochs: assert not list(d.parameters()); return
    b = batches_of(pyramid(on), d.needs, anomalies=not variant.endswith("no labels"))[0]
    for q in d.parameters(): q.grad = None
    sum(d.losses(b).values()).backward()
    given = [q for g in d.param_groups() for q in g["params"]]
    assert len(given) == len({id(q) for q in given}) and {id(q) for q in given} == {id(q) for q in d.parameters() if q.requires_grad}
    assert [n for n, q in d.named_parameters() if q.grad is None] == []
    assert not any(q.grad is not None for q in pyramid(on).parameters())

@every_variant
def test_no_label_is_read_unless_asked_for(variant):
    "Batches have no `cls` but for those who ask; the prediction is given features alone."
    d, options = trained(variant), VARIANTS[variant][1]
    assert ("cls" in d.needs) == ("class" in (options.get("memory"), options.get("coreset_scope"))) and d.needs <= {"image", "pairs", "cls", "labelled", "textures"}
    assert list(inspect.signature(d.predict).parameters) == ["features", "size"]

@every_variant
def test_an_image_of_an_unseen_class_gets_a_map(variant):
    with torch.no_grad(): p = trained(variant)(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9)))
    assert p.map.shape == (1, 64, 64) and torch.isfinite(p.map).all() and p.map.std() > 0

@every_variant
def test_a_change_is_seen_where_it_is(variant):
    x = images(1, 5); y = x.clone(); y[:, :, 20:36, 20:36] = 1
    with torch.no_grad(): change = (trained(variant)(y).map - trained(variant)(x).map).abs()[0]
    assert change[20:36, 20:36].mean() > change[48:, 48:].mean()

@every_variant
def test_save_and_load_give_the_same_maps(variant, tmp_path):
    "Into a detector that was never prepared, through a file."
    d, (name, options) = trained(variant), VARIANTS[variant]
    save_file({k: v.contiguous() for k, v in d.state_dict().items()}, tmp_path/"m.safetensors")
    torch.manual_seed(7); fresh = create_detector(name, pyramid(), classes=2, **options); fresh.load_state_dict(load_file(tmp_path/"m.safetensors")); fresh.eval()
    x = images(3, 5)
    with torch.no_grad(): p, q = d(x), fresh(x)
    assert torch.equal(p.map, q.map) and (p.score is None or torch.equal(p.score, q.score))
    assert all(torch.equal(torch.as_tensor(p.extra[k]), torch.as_tensor(q.extra[k])) for k in p.extra)

@pytest.mark.parametrize("name", list_detectors())
def test_options_are_checked(name):
    "Unknown ones are named with their neighbours; words and numbers out of range are refused before anything is computed."
    with pytest.raises(SpecError, match="unknown option"): create_detector(name, pyramid(), no_such_option=1)
    words = detector_class(name).words
    for option, default in known_options(name).items():
        bad = ["no such word"] if option in words or isinstance(default, str) else [-1, "three", float("nan")]
        for value in bad:
            with pytest.raises(SpecError, match=option if option != "textures" else "texture"): create_detector(name, pyramid(), classes=2, **_enabling(name, option) | {option: value})

def _enabling(name, option):
    "Other options with which this one has a meaning."
    return dict(memory="cluster") if name == "mddnet" and option in ("groups", "prototypes", "read", "memory_at") else {}

@pytest.mark.parametrize("name", list_detectors())
def test_it_is_built_without_memory_for_a_check(name):
    "A run checks its options on the meta device, where nothing is allocated."
    with torch.device("meta"): d = create_detector(name, pyramid(), classes=2)
    assert all(v.is_meta for v in d.state_dict().values())
