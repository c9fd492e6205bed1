"The drawn pictures, the tasks learned from them, and the weights that are shipped."
import json, math
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from mdd_bench.data.catalog import cache_dir
from mdd_bench.errors import SpecError, WeightsError
from mdd_bench.parts.backbone import PROCEDURAL, Backbone, hash_weights, procedural_file, read_recipe
from mdd_bench.parts.pictures import FAMILIES, MARK, camera, mark, materials, pictures, uniform
from mdd_bench.parts.pretraining import RECIPE, Learner, Pool, draw_places, marks_loss, on_photograph, on_picture, parts_of, pretrain, same_material, same_place, trained_file, views, write_weights
from mdd_bench.running.run import prepare, run
from mdd_bench.running.spec import make_spec

TINY = dict(backbone="test_resnet", task="places+materials", steps=2)
def generator(seed=0): return torch.Generator().manual_seed(seed)

@pytest.mark.parametrize("family", range(len(FAMILIES)), ids=lambda k: FAMILIES[k].__name__)
@pytest.mark.parametrize("size", [33, 64])
def test_materials_are_pictures_that_vary(family, size):
    "Also at the corners of the cube."
    cube = torch.cat([uniform(generator(), 6, 8), torch.zeros(1, 8), torch.ones(1, 8)])
    made = materials(generator(1), torch.full((8,), family), cube, size)
    assert made.shape == (8, size, size) and made.isfinite().all() and 0 <= made.min() and made.max() <= 1
    assert (made[:6].std((1, 2)) > .01).all()

def test_a_material_is_its_numbers():
    "Another piece of a material looks more like it than other materials do: in contrast, on average over the families."
    p = uniform(generator(5), 21, 8); family = torch.arange(21) % 7
    a, b = (materials(generator(s), family, p, 64).std((1, 2)) for s in (1, 2))
    assert (a - b).abs().mean() < .5*(a - b.roll(7)).abs().mean()

def test_the_stream_is_its_seed_and_never_ends():
    def some(seed): g = generator(seed); return [pictures(g, 6, 48)[0] for _ in range(2)]
    first, again, other = some(0), some(0), some(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])

def test_marks_are_where_the_mask_says():
    image = torch.full((32, 3, 48, 48), .5)
    marked, where = mark(generator(), image)
    changed = (marked != image).any(1)
    assert not changed[where == 0].any() and changed[where > .5].float().mean() > .95
    assert 8 < (where.amax((1, 2)) > .5).sum() < 32      # some have one, some have none

def test_the_camera_keeps_the_picture():
    image, _ = pictures(generator(), 8, 48)
    photo = camera(generator(1), image)
    assert photo.min() >= 0 and photo.max() <= 1 and photo.shape == image.shape
    alike = lambda a, b: F.cosine_similarity((a - a.mean((2, 3), keepdim=True)).flatten(1), (b - b.mean((2, 3), keepdim=True)).flatten(1)).mean()
    assert alike(photo, image) > .7 and alike(photo, image.roll(1, 0)) < .35

def test_views_lead_there_and_back():
    v = views(generator(), 50); xy = uniform(generator(1), 50, 7, 2, low=-1)
    assert torch.allclose(on_photograph(v, on_picture(v, xy)), xy, atol=1e-4)
    scale = torch.linalg.det(v[:, :, :2]).sqrt()
    assert .63 < scale.min() and scale.max() < 1.01

def test_the_stream_says_what_lies_where():
    _, what = pictures(generator(), 64, 48)
    assert set(what.unique().tolist()) == {0, 1, 2, 3, MARK} and (what == 0).float().mean() > .5

def test_places_are_shown_by_both_photographs_and_marks_are_not_missed():
    what = torch.zeros(6, 64, 64, dtype=torch.uint8); what[:, 30:33, 30:33] = MARK; what[:, 20:28, 20:28] = 1
    v = [views(generator(s), 6) for s in (1, 2)]
    drawn = draw_places(generator(), what, v, 200)
    inside = (drawn.where + 1)*32
    assert (what[drawn.picture, inside[:, 1].long(), inside[:, 0].long()] == drawn.what).all()
    assert .04 < (drawn.what == MARK).float().mean() < .12        # 9 pixels of 4096, thirty times as often
    for view, shown in zip(v, drawn.shown): assert torch.allclose(on_picture(view, shown)[drawn.both], drawn.where, atol=1e-4) and (shown[drawn.both].abs() < .95).all()

def test_embeddings_are_read_at_the_places():
    what, v = torch.zeros(2, 32, 32, dtype=torch.uint8), [views(generator(s), 2) for s in (1, 2)]
    drawn, f = draw_places(generator(), what, v, 5), torch.randn(2, 3, 8, 8, generator=generator(3))
    want = [F.normalize(F.grid_sample(f[i:i+1], xy.view(1, 1, 1, 2), align_corners=False).flatten(), dim=0) for i in range(2) for xy, b in zip(drawn.shown[1][i], drawn.both[i]) if b]
    assert torch.allclose(drawn.embed(1, f, nn.Identity()), torch.stack(want), atol=1e-6)

def naive(similar, right, allowed):
    "One direction, as loops."
    terms = []
    for i in range(len(similar)):
        rivals = torch.logsumexp(torch.stack([similar[i, j] for j in range(len(similar)) if allowed(i, j)]), 0)
        answers = [similar[i, j] for j in range(len(similar)) if right(i, j)]
        terms.append(rivals - sum(answers)/len(answers))
    return sum(terms)/len(terms)

def test_the_losses_are_their_formulas():
    g = generator(4); n = 12
    similar, picture, where, what = torch.randn(n, n, generator=g), torch.randint(3, (n,), generator=g), uniform(g, n, 2, low=-1), torch.randint(2, (n,), generator=g)
    clear = lambda i, j: i == j or picture[i] != picture[j] or (where[i] - where[j]).norm() >= 2*.3
    same = lambda i, j: i == j
    want = (naive(similar, same, clear) + naive(similar.T, same, clear))/2
    assert torch.allclose(same_place(similar, picture, where, .3), want, atol=1e-5) and not all(clear(i, j) for i in range(n) for j in range(n))
    alike, every = lambda i, j: picture[i] == picture[j] and what[i] == what[j], lambda i, j: True
    want = (naive(similar, alike, every) + naive(similar.T, alike, every))/2
    assert torch.allclose(same_material(similar, picture, what), want, atol=1e-5)

def test_marks_loss_asks_for_any_marked_pixel_of_a_cell():
    where = torch.zeros(1, 8, 8); where[0, 5, 2] = 1
    sure = torch.full((1, 2, 2), -20.); sure[0, 1, 0] = 20
    assert marks_loss(sure, where) < 1e-6 and marks_loss(-sure, where) > 10
    assert math.isclose(marks_loss(0*sure, where), math.log(2), rel_tol=1e-6)

@pytest.mark.parametrize("task", ["places", "materials", "marks", "places+materials+marks"])
def test_a_task_teaches_all_levels_and_its_heads(task):
    torch.manual_seed(0); learner = Learner("test_resnet", task, 64)
    losses = learner(generator(), *pictures(generator(1), 4, 80))
    assert len(losses) == 3*len(parts_of(task)) and all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())

def test_the_pool_renews_itself():
    pool = Pool(generator(), 8, 32, reuse=4, most=40)
    start = [image for image, _ in pool.kept]; pool.take()
    assert len(start) == 32 and len(pool.kept) == 34 and all(a is b for a, (b, _) in zip(start, pool.kept))
    for _ in range(25): images, what = pool.take()
    assert len(pool.kept) == 40 and images.shape == (8, 3, 32, 32) and what.shape == (8, 32, 32)
    assert not any(image is start[0] for image, _ in pool.kept)

def test_pretraining_is_its_seed_and_leaves_no_trace():
    torch.manual_seed(3); want = torch.rand(3)
    torch.manual_seed(3); a = pretrain(**TINY, batch=4, size=64); assert torch.equal(torch.rand(3), want)      # the caller's generator is untouched
    b, c = pretrain(**TINY, batch=4, size=64), pretrain(**TINY, seed=1, batch=4, size=64)
    assert hash_weights(a) == hash_weights(b) != hash_weights(c)
    assert not a.training and all(p.isfinite().all() for p in a.parameters())

def test_impossible_recipes():
    with pytest.raises(SpecError, match="Did you mean 'places'"): pretrain("test_resnet", "place", 1)
    with pytest.raises(SpecError, match="unknown backbone"): pretrain("resnet81", "places", 1)

def test_weights_on_disk_are_the_weights(tmp_path):
    pyramid = pretrain(**TINY, batch=4, size=64)
    file = write_weights(pyramid, tmp_path/"a"/"w.safetensors", backbone="test_resnet", note="x")
    assert [p.name for p in file.parent.iterdir()] == ["w.safetensors"]
    assert all(v.dtype == torch.float16 for v in load_file(file).values())
    b = Backbone("test_resnet", str(file))
    assert read_recipe(file) == dict(backbone="test_resnet", note="x", hash=b.hash)
    want = pyramid.state_dict()
    assert all(torch.equal(v, want[k].half().float()) for k, v in b.pyramid.state_dict().items() if v.is_floating_point())

def test_a_recipe_is_trained_once(tmp_path):
    seen = []
    first = trained_file(tmp_path, **TINY, progress=lambda step, losses: seen.append(step))
    again = trained_file(tmp_path, **TINY, progress=lambda step, losses: seen.append(step))
    assert first == again and seen == [1, 2] and read_recipe(first)["steps"] == 2

# --- what is shipped

def test_the_shipped_file_is_small_and_says_what_it_is():
    file, says = procedural_file(), read_recipe(procedural_file())
    b = Backbone(PROCEDURAL, "procedural")
    assert file.stat().st_size <= 6e6 and sum(p.numel() for p in b.pyramid.parameters()) <= 3e6
    assert says["hash"] == b.hash and PROCEDURAL == says["backbone"] and says["seed"] == 0
    assert {k: says[k] for k in RECIPE} == RECIPE
    assert b.strides == [4, 8, 16]

def test_it_is_what_the_rule_chose():
    chosen = json.loads((Path(__file__).parents[1]/"results"/"real"/"backbones"/"chosen.json").read_text())
    assert chosen["hash"] == read_recipe(procedural_file())["hash"]
    assert chosen["chosen"] == max(chosen["heldout"], key=lambda name: chosen["heldout"][name]["mAD"])

def test_procedural_weights_fit_one_network():
    with pytest.raises(WeightsError, match=f"for {PROCEDURAL}, not for wide_resnet50_2.*pretrain"): Backbone("wide_resnet50_2", "procedural")
    with pytest.raises(WeightsError, match="reach stride 16"): Backbone(PROCEDURAL, "procedural", [1, 2, 4])

def test_they_bring_their_network(recwarn):
    p = prepare(make_spec(data="embedded-v1-smoke", size=64, weights="procedural", detector="patchcore"))
    assert p.backbone.name == PROCEDURAL and p.backbone.strides == [8, 16]
    assert not [w for w in recwarn if "RANDOM" in str(w.message)]

def test_procedural_features_find_more_than_random_ones(tmp_path):
    score = lambda weights: run(make_spec(data="embedded-v1-smoke", size=128, backbone=PROCEDURAL, weights=weights, detector="patchcore"), tmp_path).metrics["exact"]["mean"]
    ours, random = score("procedural"), score("random")
    assert ours["mAD"] > random["mAD"] + .03 and ours["I-AUROC"] > random["I-AUROC"] + .1

def test_the_command_trains_and_a_run_takes_the_file(cli, tmp_path):
    code, out, _ = cli("pretrain", "--backbone", "test_resnet", "--task", "marks", "--steps", 2, "--out", tmp_path/"w.safetensors")
    assert code == 0 and out.strip().endswith("w.safetensors")
    code, out, err = cli("run", "--data", "embedded-v1-smoke", "--size", 64, "--backbone", "test_resnet", "--weights", tmp_path/"w.safetensors", "--detector", "patchcore")
    assert code == 0, err
    assert cli("pretrain", "--task", "mark", "--steps", 1)[0] == 2
    assert "ends in .safetensors" in cli("pretrain", "--steps", 1, "--out", "w.pth")[2]

@pytest.mark.slow
def test_real_images_from_drawn_pictures(real, tmp_path):
    "The reach that was set for the project's weights."
    spec = lambda weights: make_spec(data=str(real), size=256, backbone=PROCEDURAL, weights=weights, detector="patchcore", options=dict(coreset_ratio=.02, subsampling="random", neighbours=1))
    ours, random = (run(spec(w), tmp_path).metrics["exact"]["mean"]["I-AUROC"] for w in ("procedural", "random"))
    assert ours > random + .08
