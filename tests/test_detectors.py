"""What every detector must do: shapes, determinism, no label at test, gradients where they belong,
one image alone, an unseen class, saving and loading, option errors."""
import inspect
from copy import deepcopy
from functools import cache
import pytest, torch
from safetensors.torch import load_file, save_file
from drawn_batches import (
    PYRAMIDS, VARIANTS, hook_batches, images, learns_from_labels, pyramid, seeded, training_batch,
    training_batches)
from mdd_bench.detectors.detector import create_detector, detector_class, list_detectors
from mdd_bench.errors import SpecError
from mdd_bench.options import declared_options
from mdd_bench.parts.backbone import hash_weights
from mdd_bench.running.training import make_optimizer, seed_all, train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")
NEEDS = {"image", "pairs", "cls", "labelled", "turned", "textures"}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_pyramid = pytest.mark.parametrize("on", PYRAMIDS)
every_detector = pytest.mark.parametrize("name", list_detectors())

# ---- training

@cache
def trained(variant, on="small", seed=0, copy=0):
    """A detector after its whole training: prepare, two epochs of two steps with their hooks, finish.
    `copy` asks for another one, made alike."""
    (name, options), backbone, anomalies = VARIANTS[variant], pyramid(on), learns_from_labels(variant)
    seed_all(seed)
    detector = create_detector(name, backbone, classes=2, **options)
    batches = training_batches(backbone, detector.needs, anomalies)
    def call_hook(hook, *args):
        detector.eval()
        with torch.no_grad(): hook(*args, hook_batches(backbone, detector.needs, anomalies))
    call_hook(detector.prepare)
    recipe = detector.recipe
    if recipe.epochs:
        optimizer = make_optimizer(detector, recipe)
        for epoch in range(2):
            seed_all(seed, epoch + 1)
            detector.train()
            for batch in batches:
                train_step(detector, batch, optimizer, recipe, "float32")
            call_hook(detector.on_epoch, epoch)
    call_hook(detector.finish)
    return detector.eval()

def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def same_prediction(p, q):
    same_scores = q.score is None if p.score is None else torch.equal(p.score, q.score)
    return torch.equal(p.map, q.map) and same_scores

# ---- what every detector must do

@every_pyramid
@every_variant
def test_the_contract(variant, on):
    backbone, detector = pyramid(on), trained(variant, on)
    before = hash_weights(backbone)
    x = torch.cat([images(2, 5, cls=0), images(2, 6, cls=1)])
    with torch.no_grad():
        p, q = detector(x), detector(x)
        alone = torch.cat([detector(image[None]).map for image in x])
    assert p.map.shape == (4, 64, 64) and p.map.dtype == torch.float32
    assert torch.isfinite(p.map).all()
    assert p.score is None or (p.score.shape == (4,) and torch.isfinite(p.score).all())
    assert all(len(values) == 4 for values in p.extra.values())
    assert same_prediction(p, q)                               # nothing is drawn at test
    tolerance = 2e-2*p.map.abs().max().item()                  # features are rounded to half precision
    torch.testing.assert_close(alone, p.map, atol=tolerance, rtol=2e-2)
    assert hash_weights(backbone) == before
    assert not any(w.requires_grad or w.grad is not None for w in backbone.parameters())
    assert not any(name.startswith("backbone") for name in detector.state_dict())

@every_variant
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(variant):
    assert same_weights(trained(variant), trained(variant, copy=1))
    draws_nothing = variant.startswith("patchcore")            # 192 numbers per patch are not projected
    assert same_weights(trained(variant), trained(variant, seed=1)) == draws_nothing

def silent(variant, detector):
    "The weights that have nothing to learn: without labels, those of DMAD's second expert."
    if variant != "dmad, no labels": return set()
    parts = ("network.abnormal_expert", "network.patch_norm", "network.knowledge.abnormal")
    return {name for name, w in detector.named_parameters() if name.startswith(parts)}

@every_pyramid
@every_variant
def test_gradients_only_where_they_belong(variant, on):
    "The optimizer gets each weight that can have a gradient, once, and each has one; the backbone has none."
    detector = deepcopy(trained(variant, on)).train()
    if not detector.recipe.epochs:
        assert not list(detector.parameters())
        return
    batch = training_batch(pyramid(on), detector.needs, 0, learns_from_labels(variant))
    for w in detector.parameters(): w.grad = None
    sum(detector.losses(batch).values()).backward()
    given = [id(w) for group in detector.param_groups() for w in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(w) for w in detector.parameters() if w.requires_grad}
    without = {name for name, w in detector.named_parameters() if w.requires_grad and w.grad is None}
    assert without == silent(variant, detector)
    assert not any(w.grad is not None for w in pyramid(on).parameters())

@every_variant
def test_no_label_is_read_unless_asked_for(variant):
    "Batches have no `cls` but for those who ask; the prediction is given features alone."
    detector = trained(variant)
    asked = {detector.options.get("memory"), detector.options.get("coreset_scope")}
    assert ("cls" in detector.needs) == ("class" in asked)
    assert detector.needs <= NEEDS
    assert list(inspect.signature(detector.predict).parameters) == ["features", "size"]

@every_variant
def test_an_image_of_an_unseen_class_gets_a_map(variant):
    x = torch.rand(1, 3, 64, 64, generator=seeded(9))
    with torch.no_grad(): p = trained(variant)(x)
    assert p.map.shape == (1, 64, 64)
    assert torch.isfinite(p.map).all() and p.map.std() > 0

@every_variant
def test_a_change_is_seen_where_it_is(variant):
    detector, x = trained(variant), images(1, 5)
    changed = x.clone()
    changed[:, :, 20:36, 20:36] = 1
    with torch.no_grad(): change = (detector(changed).map - detector(x).map).abs()[0]
    assert change[20:36, 20:36].mean() > change[48:, 48:].mean()

@every_variant
def test_save_and_load_give_the_same_maps(variant, tmp_path):
    "Into a detector that was never prepared, through a file."
    detector, (name, options) = trained(variant), VARIANTS[variant]
    file = tmp_path/"m.safetensors"
    save_file({k: v.contiguous() for k, v in detector.state_dict().items()}, file)
    torch.manual_seed(7)
    fresh = create_detector(name, pyramid(), classes=2, **options)
    fresh.load_state_dict(load_file(file))
    fresh.eval()
    x = images(3, 5)
    with torch.no_grad(): p, q = detector(x), fresh(x)
    assert same_prediction(p, q)
    assert all(torch.equal(torch.as_tensor(p.extra[key]), torch.as_tensor(q.extra[key])) for key in p.extra)

# ---- options

def wrong_values(declared):
    "Values that an option must refuse."
    return ["no such word"] if declared.choices or declared.type is str else [-1, "three", float("nan")]

def enabling(name, option):
    "Other options with which this one has a meaning."
    of_memory = ("groups", "prototypes", "read", "memory_at")
    return dict(memory="cluster") if name == "mddnet" and option in of_memory else {}

@every_detector
def test_options_are_checked(name):
    "Unknown words and numbers out of range are refused at once, with a message that names the option."
    for option, declared in declared_options(detector_class(name)).items():
        for value in wrong_values(declared):
            options = enabling(name, option) | {option: value}
            named = "texture" if option == "textures" else option
            with pytest.raises(SpecError, match=named): create_detector(name, pyramid(), classes=2, **options)

@every_detector
def test_an_unknown_option_is_refused(name):
    with pytest.raises(SpecError, match="unknown option"): create_detector(name, pyramid(), no_such_option=1)

@every_detector
def test_it_is_built_without_memory_for_a_check(name):
    "A run checks its options on the meta device, where nothing is allocated."
    backbone = pyramid()
    with torch.device("meta"): detector = create_detector(name, backbone, classes=2)
    assert all(tensor.is_meta for tensor in detector.state_dict().values())
