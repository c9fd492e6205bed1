"The drawn pictures, the tasks learned from them, and the weights that are shipped."
import json, math
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from mdd_bench.errors import SpecError, WeightsError
from mdd_bench.parts.backbone import (
    PROCEDURAL, Backbone, build_pyramid, hash_weights, procedural_file, read_recipe,
)
from mdd_bench.parts.pictures import FAMILIES, MARK, add_marks, camera, materials, pictures, uniform
from mdd_bench.parts.pretraining import (
    RECIPE, Learner, Pool, draw_positions, marks_loss, materials_loss, places_loss, pretrain, tasks_in,
    to_photograph, to_picture, trained_file, views, write_weights,
)
from mdd_bench.running.identity import resolve
from mdd_bench.running.run import run
from mdd_bench.running.spec import make_spec

TINY = dict(backbone="test_resnet", task="places+materials", steps=2)
SMOKE = dict(data="embedded-v1-smoke", detector="patchcore")

def generator(seed=0): return torch.Generator().manual_seed(seed)

# --- drawn pictures

@pytest.mark.parametrize("family", range(len(FAMILIES)), ids=lambda k: FAMILIES[k].__name__)
@pytest.mark.parametrize("size", [33, 64])
def test_materials_are_pictures_that_vary(family, size):
    "Also at the corners of the cube of parameters."
    cube = torch.cat([uniform(generator(), 6, 8), torch.zeros(1, 8), torch.ones(1, 8)])
    drawn = materials(generator(1), torch.full((8,), family), cube, size)
    assert drawn.shape == (8, size, size) and drawn.isfinite().all()
    assert 0 <= drawn.min() and drawn.max() <= 1
    assert (drawn[:6].std((1, 2)) > .01).all()

def test_parameters_decide_what_a_material_looks_like():
    "Two pieces of a material are more alike than two materials: in contrast, on average over the families."
    params, family = uniform(generator(5), 21, 8), torch.arange(21) % 7
    first, second = (materials(generator(seed), family, params, 64).std((1, 2)) for seed in (1, 2))
    assert (first - second).abs().mean() < .5*(first - second.roll(7)).abs().mean()

def test_the_stream_follows_from_its_seed_and_goes_on():
    def two_batches(seed):
        g = generator(seed)
        return [pictures(g, 6, 48)[0] for _ in range(2)]
    first, same, other = two_batches(0), two_batches(0), two_batches(1)
    assert all(torch.equal(a, b) for a, b in zip(first, same))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])

def test_marks_are_where_the_mask_says():
    image = torch.full((32, 3, 48, 48), .5)
    marked, cover = add_marks(generator(), image)
    changed = (marked != image).any(1)
    assert not changed[cover == 0].any()
    assert changed[cover > .5].float().mean() > .95
    assert 8 < (cover.amax((1, 2)) > .5).sum() < 32      # some have one, some have none

def test_the_camera_keeps_the_picture():
    image, _ = pictures(generator(), 8, 48)
    photo = camera(generator(1), image)
    assert photo.min() >= 0 and photo.max() <= 1 and photo.shape == image.shape

    def correlation(a, b):
        a, b = a - a.mean((2, 3), keepdim=True), b - b.mean((2, 3), keepdim=True)
        return F.cosine_similarity(a.flatten(1), b.flatten(1)).mean()
    assert correlation(photo, image) > .7
    assert correlation(photo, image.roll(1, 0)) < .35

def test_segments_say_what_lies_where():
    _, segments = pictures(generator(), 64, 48)
    assert set(segments.unique().tolist()) == {0, 1, 2, 3, MARK}
    assert (segments == 0).float().mean() > .5

# --- views and positions

def test_views_lead_there_and_back():
    view, xy = views(generator(), 50), uniform(generator(1), 50, 7, 2, low=-1)
    assert torch.allclose(to_photograph(view, to_picture(view, xy)), xy, atol=1e-4)
    scale = torch.linalg.det(view[:, :, :2]).sqrt()
    assert .63 < scale.min() and scale.max() < 1.01

def test_positions_are_visible_on_both_photographs_and_marks_are_not_missed():
    segments = torch.zeros(6, 64, 64, dtype=torch.uint8)
    segments[:, 30:33, 30:33] = MARK
    segments[:, 20:28, 20:28] = 1
    view = [views(generator(seed), 6) for seed in (1, 2)]
    positions = draw_positions(generator(), segments, view, 200)
    column, row = ((positions.xy + 1)*32).long().T
    assert (segments[positions.picture, row, column] == positions.segment).all()
    on_marks = (positions.segment == MARK).float().mean()
    assert .04 < on_marks < .12        # 9 pixels of 4096, thirty times as often
    for v, candidates in zip(view, positions.on_photographs):
        on_picture = to_picture(v, candidates)[positions.visible]
        assert torch.allclose(on_picture, positions.xy, atol=1e-4)
        assert (candidates[positions.visible].abs() < .95).all()

def test_embeddings_are_read_at_the_positions():
    segments, view = torch.zeros(2, 32, 32, dtype=torch.uint8), [views(generator(seed), 2) for seed in (1, 2)]
    positions = draw_positions(generator(), segments, view, 5)
    features = torch.randn(2, 3, 8, 8, generator=generator(3))
    expected = []
    for number in range(2):
        for xy, visible in zip(positions.on_photographs[1][number], positions.visible[number]):
            if not visible: continue
            value = F.grid_sample(features[number:number + 1], xy.view(1, 1, 1, 2), align_corners=False)
            expected.append(F.normalize(value.flatten(), dim=0))
    assert torch.allclose(positions.embed(1, features, nn.Identity()), torch.stack(expected), atol=1e-6)

# --- losses

def naive(similarity, is_correct, is_candidate):
    "One direction of the contrastive loss, as loops."
    terms, n = [], len(similarity)
    for i in range(n):
        candidates = torch.stack([similarity[i, j] for j in range(n) if is_candidate(i, j)])
        answers = [similarity[i, j] for j in range(n) if is_correct(i, j)]
        terms.append(torch.logsumexp(candidates, 0) - sum(answers)/len(answers))
    return sum(terms)/n

def naive_both(similarity, is_correct, is_candidate):
    "Both directions; the conditions are symmetric."
    there, back = (naive(s, is_correct, is_candidate) for s in (similarity, similarity.T))
    return (there + back)/2

def test_the_losses_are_their_formulas():
    g, n = generator(4), 12
    similarity = torch.randn(n, n, generator=g)
    picture = torch.randint(3, (n,), generator=g)
    xy = uniform(g, n, 2, low=-1)
    segment = torch.randint(2, (n,), generator=g)

    def same(i, j): return i == j
    def clear(i, j): return i == j or picture[i] != picture[j] or (xy[i] - xy[j]).norm() >= 2*.3
    expected = naive_both(similarity, same, clear)
    assert torch.allclose(places_loss(similarity, picture, xy, .3), expected, atol=1e-5)
    assert not all(clear(i, j) for i in range(n) for j in range(n))

    def same_material(i, j): return picture[i] == picture[j] and segment[i] == segment[j]
    def every(i, j): return True
    expected = naive_both(similarity, same_material, every)
    assert torch.allclose(materials_loss(similarity, picture, segment), expected, atol=1e-5)

def test_marks_loss_asks_for_any_marked_pixel_of_a_cell():
    marked = torch.zeros(1, 8, 8)
    marked[0, 5, 2] = 1
    right = torch.full((1, 2, 2), -20.)
    right[0, 1, 0] = 20
    assert marks_loss(right, marked) < 1e-6 and marks_loss(-right, marked) > 10
    assert math.isclose(marks_loss(0*right, marked), math.log(2), rel_tol=1e-6)

# --- training

@pytest.mark.parametrize("task", ["places", "materials", "marks", "places+materials+marks"])
def test_a_task_teaches_all_levels_and_its_heads(task):
    torch.manual_seed(0)
    learner = Learner("test_resnet", task, 64)
    losses = learner(generator(), *pictures(generator(1), 4, 80))
    assert len(losses) == 3*len(tasks_in(task))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())

def test_the_pool_renews_itself():
    pool = Pool(generator(), 8, 32, reuse=4, most=40)
    first_images = [image for image, _ in pool.kept]
    pool.take()
    assert len(first_images) == 32 and len(pool.kept) == 34
    assert all(image is kept for image, (kept, _) in zip(first_images, pool.kept))
    for _ in range(25): images, segments = pool.take()
    assert len(pool.kept) == 40
    assert images.shape == (8, 3, 32, 32) and segments.shape == (8, 32, 32)
    assert not any(image is first_images[0] for image, _ in pool.kept)

def test_pretraining_follows_from_its_seed_and_leaves_no_trace():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = pretrain(**TINY, batch=4, size=64)
    assert torch.equal(torch.rand(3), expected)      # the caller's generator is untouched
    same, other = pretrain(**TINY, batch=4, size=64), pretrain(**TINY, seed=1, batch=4, size=64)
    assert hash_weights(first) == hash_weights(same) != hash_weights(other)
    assert not first.training and all(p.isfinite().all() for p in first.parameters())

def test_impossible_recipes():
    with pytest.raises(SpecError, match="Did you mean 'places'"): pretrain("test_resnet", "place", 1)
    with pytest.raises(SpecError, match="unknown backbone"): pretrain("resnet81", "places", 1)

def test_weights_on_disk_are_the_weights(tmp_path):
    pyramid = pretrain(**TINY, batch=4, size=64)
    file = write_weights(pyramid, tmp_path/"a"/"w.safetensors", backbone="test_resnet", note="x")
    assert [p.name for p in file.parent.iterdir()] == ["w.safetensors"]
    assert all(v.dtype == torch.float16 for v in load_file(file).values())
    backbone = Backbone("test_resnet", str(file))
    assert read_recipe(file) == dict(backbone="test_resnet", note="x", hash=backbone.hash)
    written = {k: v.half().float() for k, v in pyramid.state_dict().items()}
    loaded = build_pyramid("test_resnet", str(file), backbone.layers).state_dict()
    read = {k: v for k, v in loaded.items() if v.is_floating_point()}
    assert all(torch.equal(v, written[k]) for k, v in read.items())

def test_a_recipe_is_trained_once(tmp_path):
    steps = []
    def progress(step, losses): steps.append(step)
    first = trained_file(tmp_path, **TINY, progress=progress)
    second = trained_file(tmp_path, **TINY, progress=progress)
    assert first == second and steps == [1, 2] and read_recipe(first)["steps"] == 2

# --- what is shipped

def test_the_shipped_file_is_small_and_describes_itself():
    file, recipe = procedural_file(), read_recipe(procedural_file())
    backbone = Backbone(PROCEDURAL, "procedural")
    assert file.stat().st_size <= 6e6
    assert sum(p.numel() for p in backbone.pyramid.parameters()) <= 3e6
    assert recipe["hash"] == backbone.hash and recipe["backbone"] == PROCEDURAL and recipe["seed"] == 0
    assert {k: recipe[k] for k in RECIPE} == RECIPE
    assert backbone.strides == [4, 8, 16]

def test_it_is_what_the_rule_chose():
    root = Path(__file__).parents[1]
    choice = json.loads((root/"results"/"real"/"backbones"/"chosen.json").read_text())
    heldout = choice["heldout"]
    assert choice["hash"] == read_recipe(procedural_file())["hash"]
    assert choice["chosen"] == max(heldout, key=lambda name: heldout[name]["mAD"])

def test_procedural_weights_fit_one_network():
    with pytest.raises(WeightsError, match=f"for {PROCEDURAL}, not for wide_resnet50_2"):
        Backbone("wide_resnet50_2", "procedural")
    with pytest.raises(WeightsError, match="reach stride 16"): Backbone(PROCEDURAL, "procedural", [1, 2, 4])

def test_they_bring_their_network(recwarn):
    backbone = resolve(make_spec(**SMOKE, size=64, weights="procedural")).backbone
    assert backbone.name == PROCEDURAL and backbone.strides == [8, 16]
    assert not [w for w in recwarn if "RANDOM" in str(w.message)]

def test_procedural_features_find_more_than_random_ones(tmp_path):
    "On the whole embedded benchmark: the dozen test images of its smoke size rank too coarsely."
    fields = SMOKE | dict(data="embedded-v1", options=dict(coreset_ratio=.02))

    def mean_metrics(weights):
        spec = make_spec(**fields, size=128, backbone=PROCEDURAL, weights=weights)
        return run(spec, tmp_path).metrics["exact"]["mean"]
    ours, random = mean_metrics("procedural"), mean_metrics("random")
    assert ours["mAD"] > random["mAD"] + .03 and ours["I-AUROC"] > random["I-AUROC"] + .1

def test_the_command_trains_and_a_run_takes_the_file(cli, tmp_path):
    file = tmp_path/"w.safetensors"
    recipe = ("--backbone", "test_resnet", "--task", "marks", "--steps", 2)
    code, out, _ = cli("pretrain", *recipe, "--out", file)
    assert code == 0 and out.strip().endswith("w.safetensors")
    backbone = ("--backbone", "test_resnet", "--weights", file)
    data = ("--data", SMOKE["data"], "--size", 64)
    code, out, err = cli("run", *data, *backbone, "--detector", SMOKE["detector"])
    assert code == 0, err
    assert cli("pretrain", "--task", "mark", "--steps", 1)[0] == 2
    assert "ends in .safetensors" in cli("pretrain", "--steps", 1, "--out", "w.pth")[2]

@pytest.mark.slow
def test_real_images_from_drawn_pictures(real, tmp_path):
    "The margin that was set beforehand for the project's weights."
    options = dict(coreset_ratio=.02, subsampling="random", neighbours=1)

    def image_auroc(weights):
        spec = make_spec(data=str(real), size=256, backbone=PROCEDURAL, weights=weights,
                         detector="patchcore", options=options)
        return run(spec, tmp_path).metrics["exact"]["mean"]["I-AUROC"]
    assert image_auroc("procedural") > image_auroc("random") + .08
