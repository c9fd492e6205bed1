"Trainings whose length is given in steps, and the rule that says when a training is long enough."
import math
from dataclasses import replace
from types import SimpleNamespace
import pandas as pd
import pytest, torch
from conftest import small_spec
from mdd_bench.data.images import Framing
from mdd_bench.data.loading import ImageDataset, batches, steps_of_pass
from mdd_bench.detectors.detector import detector_class
from mdd_bench.detectors.mddnet import MDDNet
from mdd_bench.detectors.rd4ad import RD4AD
from mdd_bench.errors import SpecError
from mdd_bench.reporting.lengths import (
    converged_steps, last_thirds, learning_curve, lengths_markdown, lengths_page, lengths_table,
    scores_by_length,
)
from mdd_bench.reporting.tables import caption, how_it_was_made, per_class, summary, to_markdown
from mdd_bench.running.identity import filled_spec, resolve
from mdd_bench.running.run import run
from mdd_bench.running.spec import make_spec
from mdd_bench.running.study import load_study
from mdd_bench.running.training import rate_factor, set_rates

# --- steps

@pytest.mark.parametrize("images", [1, 7, 8, 9, 16, 17, 18])
def test_a_pass_has_as_many_steps_as_its_loader_gives(images, tmp_path):
    table = pd.DataFrame(dict(path=["x.png"]*images, cls=["a"]*images))
    rows = ImageDataset(tmp_path, table, Framing(16), ["a"], images=False)
    assert steps_of_pass(images, 8) == len(list(batches(rows, 8, epoch=0)))

def batches_of(spec):
    "How many optimizer steps a pass over the training images of a spec has."
    resolved = resolve(spec)
    return steps_of_pass(len(resolved.dataset.catalog.part(split="train")), resolved.recipe.batch)

def test_steps_of_whole_passes_are_the_bits_of_as_many_epochs(tmp_path):
    spec = small_spec(epochs=3, batch=4)
    steps = 3*batches_of(spec)
    by_epochs, by_steps = run(spec, tmp_path), run(replace(spec, epochs=None, steps=steps), tmp_path)
    assert by_steps.metrics == by_epochs.metrics and by_steps.history().equals(by_epochs.history())
    assert by_epochs.provenance["steps"] == by_steps.provenance["steps"] == steps
    assert by_epochs.spec["epochs"] == 3 and by_epochs.spec["steps"] is None
    assert by_steps.spec["epochs"] is None and by_steps.spec["steps"] == steps

def test_the_last_pass_is_cut_short_and_its_hook_is_called(tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(RD4AD, "on_epoch", lambda self, epoch, batches: epochs.append(epoch))
    spec = small_spec(batch=4, epochs=None)
    steps = batches_of(spec) + 1
    record = run(replace(spec, steps=steps), tmp_path)
    assert epochs == [0, 1]
    assert record.history().step.tolist() == list(range(steps))
    assert record.history().epoch.tolist() == [0]*(steps - 1) + [1]

def test_the_rate_falls_at_a_fraction_of_the_steps(tmp_path, monkeypatch):
    from mdd_bench.running import training
    rates, plain = [], training.train_step
    def train_step(detector, batch, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return plain(detector, batch, optimizer, *rest)
    monkeypatch.setattr(training, "train_step", train_step)
    run(small_spec(batch=4, epochs=None, steps=10), tmp_path)
    assert rates == pytest.approx([5e-3]*8 + [5e-4]*2)      # RD4AD's recipe falls at 80%

def test_rates_warm_up_and_follow_half_a_cosine():
    recipe = replace(RD4AD.recipe, drops=(), warmup=.25, cosine=True)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2.)
    optimizer.param_groups[0]["start"] = 2.
    rates = []
    for done in (0, .125, .25, .4375, .625, .8125):
        set_rates(optimizer, recipe, done)
        rates.append(optimizer.param_groups[0]["lr"])
    falling = [1 + math.cos(math.pi*share) for share in (0, .25, .5, .75)]
    assert rates == pytest.approx([0, 1, *falling])

def test_a_warm_up_leaves_the_drops_where_they_are():
    recipe = replace(RD4AD.recipe, drops=(.5, .8), warmup=.1)
    assert [rate_factor(recipe, done) for done in (.05, .1, .5, .8)] == pytest.approx([.5, 1, .1, .01])

def test_steps_count_for_each_model_of_a_separate_run(tmp_path):
    record = run(small_spec(setting="separate", epochs=None, steps=3, batch=4), tmp_path)
    assert [model["steps"] for model in record.provenance["models"].values()] == [3, 3]
    assert "trained 3 steps;" in how_it_was_made([record])

def test_a_method_with_nothing_to_train_takes_no_steps(tmp_path):
    spec = small_spec(detector="patchcore", epochs=None)
    assert resolve(replace(spec, steps=5)).run_id == resolve(spec).run_id
    record = run(replace(spec, steps=5), tmp_path)
    assert record.provenance["steps"] == 0 and "trained nothing;" in how_it_was_made([record])

def test_one_length_only():
    with pytest.raises(SpecError, match="epochs=3 and steps=5. set one of them to none"):
        make_spec(epochs=3, steps=5)

@pytest.mark.parametrize("changes, lengths", [
    (dict(steps=50), {(None, 50)}),
    (dict(steps="50,100"), {(None, 50), (None, 100)}),
    (dict(epochs=2), {(2, None)}),
    (dict(epochs=None, steps=50), {(None, 50)}),
    ({}, {(5, None)}),
])
def test_steps_take_the_place_of_a_studys_epochs(changes, lengths):
    specs = load_study("benchmark", **changes).specs()
    assert {(spec.epochs, spec.steps) for spec in specs} == lengths

def test_epochs_take_the_place_of_a_studys_steps():
    assert {(s.epochs, s.steps) for s in load_study("lengths", epochs=2).specs()} == {(2, None)}

@pytest.mark.parametrize("detector", ["rd4ad", "simplenet", "dmad"])
def test_as_many_steps_as_a_method_needs_are_the_run_of_that_number(detector):
    needed = detector_class(detector).recipe.converged
    asked = resolve(small_spec(detector=detector, epochs=None, steps="converged"))
    given = resolve(small_spec(detector=detector, epochs=None, steps=needed))
    assert asked.run_id == given.run_id and asked.training_id == given.training_id
    assert filled_spec(asked) == filled_spec(given) and filled_spec(asked)["steps"] == needed

def test_a_study_trains_each_detector_as_long_as_it_needs():
    specs = load_study("benchmark", steps="converged", detector="rd4ad,mddnet,patchcore", seed=0).specs()
    assert [resolve(spec).recipe.steps for spec in specs] == [1725, 2600, None]
    lengths = load_study("benchmark", steps="converged,100", detector="rd4ad", seed=0).specs()
    assert [resolve(spec).recipe.steps for spec in lengths] == [1725, 100]

def test_nothing_to_train_needs_no_steps():
    spec = small_spec(detector="patchcore", epochs=None)
    assert resolve(replace(spec, steps="converged")).run_id == resolve(spec).run_id

def test_a_method_of_which_it_is_not_known_is_refused():
    message = "steps=converged: it is not known for dmad_released. give a number of steps"
    with pytest.raises(SpecError, match=message):
        resolve(small_spec(detector="dmad_released", epochs=None, steps="converged"))
    with pytest.raises(SpecError, match="steps='convergd'. give a whole number.*converged: what it needs"):
        make_spec(steps="convergd")

# --- trainings that were too short

@pytest.mark.parametrize("setting", ["unified", "separate"])
def test_a_row_that_has_not_converged_is_marked(tmp_path, setting, monkeypatch):
    monkeypatch.setattr(RD4AD, "recipe", replace(RD4AD.recipe, converged=None))
    record = run(small_spec(setting=setting, epochs=None, steps=3, batch=4), tmp_path)
    assert "†" not in to_markdown(summary([record])) + caption([record])
    facts = record.provenance["models"]["gear"] if setting == "separate" else record.provenance
    facts["converged_steps"] = 3
    assert "†" not in to_markdown(summary([record])) + caption([record])
    facts["converged_steps"] = 100
    for table in (summary([record]), per_class([record])): assert "| rd4ad † |" in to_markdown(table)
    assert "† Not converged" in caption([record])
    assert "Not converged: rd4ad (3 of 100 steps)" in how_it_was_made([record])

@pytest.mark.parametrize("setting", ["unified", "separate"])
def test_a_length_that_may_be_too_short_is_marked(tmp_path, setting, monkeypatch):
    monkeypatch.setattr(RD4AD, "recipe", replace(RD4AD.recipe, converged=3, converged_known=False, epochs=1))
    record = run(small_spec(setting=setting, epochs=None, steps=3, batch=4), tmp_path)
    assert "| rd4ad † |" in to_markdown(summary([record])) and "† Not converged" in caption([record])
    assert "Not converged: rd4ad (3 steps, which may be too few)" in how_it_was_made([record])
    record.spec["steps"] = None
    assert "†" not in to_markdown(summary([record])) + caption([record])
    record.spec["epochs"] = 2
    assert "| rd4ad † |" in to_markdown(summary([record]))
    facts = record.provenance["models"].values() if setting == "separate" else [record.provenance]
    for fact in facts: del fact["converged_known"]
    assert "†" not in to_markdown(summary([record])) + caption([record])

def test_a_record_says_what_its_recipe_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(RD4AD, "recipe", replace(RD4AD.recipe, converged=1000))
    spec = small_spec(epochs=None, steps=2)
    assert run(spec, tmp_path).provenance["converged_steps"] == 1000
    monkeypatch.undo()
    assert resolve(spec).run_id in [p.name for p in (tmp_path/"runs").iterdir()]   # it decides no number

@pytest.mark.parametrize("options, needed", [
    (dict(branches="distillation", memory="none"), RD4AD.recipe.converged),
    (dict(branches="distillation", memory="none", scale="raw"), RD4AD.recipe.converged),
    (dict(branches="distillation", memory="none", decoder="light"), MDDNet.recipe.converged),
    (dict(branches="distillation"), MDDNet.recipe.converged),
    ({}, MDDNet.recipe.converged),
])
def test_mddnet_as_its_parent_has_its_parents_length(options, needed):
    resolved = resolve(small_spec(detector="mddnet", options=options))
    assert RD4AD.recipe.converged != MDDNet.recipe.converged
    assert resolved.recipe == replace(MDDNet.recipe, epochs=1, converged=needed)
    assert resolved.identity.get("epochs") == 1 and "batch" not in resolved.identity    # ids are as they were

# --- the rule

def record(steps, seed, score, detector="alpha"):
    spec = dict(detector=detector, steps=steps, seed=seed, options={})
    return SimpleNamespace(spec=spec, metrics={"exact": dict(mean=dict(mAD=score))})

def scores(means, noise=.01):
    "Scores of one detector: two seeds, `noise` above and below the mean at each length."
    records = [record(n, seed, m + sign*noise) for n, m in means.items() for seed, sign in ((0, 1), (1, -1))]
    return scores_by_length(records).loc["alpha"]

STAYS = {100: .4, 150: .6, 225: .7, 300: .7, 450: .705}

def test_it_has_converged_where_the_last_third_gains_less_than_the_seeds_differ():
    table = last_thirds(scores(STAYS))
    assert table["enough"].tolist() == [False, False, False, False, True]
    assert table.gained[150] == pytest.approx(.2)
    assert table.gained[300] == pytest.approx(.7 - (.6 + .1*50/75))     # 200 lies between 150 and 225
    assert table.spread.tolist() == pytest.approx([.01*2**.5]*5)
    assert converged_steps(scores(STAYS)) == 450

def test_a_curve_that_still_rises_has_not_converged():
    assert converged_steps(scores({100: .4, 150: .5, 225: .6})) is None
    assert converged_steps(scores(STAYS | {675: .8})) is None

def test_a_curve_that_falls_back_had_converged_and_the_table_says_how_far_it_fell():
    fallen = STAYS | {675: .6}
    assert converged_steps(scores(fallen)) == 450
    records = [record(n, seed, m + sign*.01) for n, m in fallen.items() for seed, sign in ((0, 1), (1, -1))]
    assert lengths_table(scores_by_length(records)).fallen["alpha"] == pytest.approx(10.5)

def test_a_single_seed_says_nothing():
    single = scores_by_length([record(n, 0, m) for n, m in STAYS.items()]).loc["alpha"]
    with pytest.raises(SpecError, match="every length has a single seed"): converged_steps(single)

def test_records_whose_length_is_in_epochs_are_refused():
    with pytest.raises(SpecError, match="alpha has no steps"): scores_by_length([record(None, 0, .5)])

def test_the_table_and_the_picture_say_where_it_has_converged():
    rising = {100: .4, 150: .5, 225: .6, 300: .7, 450: .8}
    records = [record(n, seed, m + sign*.01, name) for name, means in (("alpha", STAYS), ("beta", rising))
               for n, m in means.items() for seed, sign in ((0, 1), (1, -1))]
    table = lengths_table(scores_by_length(records))
    lines = lengths_markdown(table).splitlines()
    assert lines[0] == "| detector | 100 | 150 | 225 | 300 | 450 | spread | fallen | converged |"
    assert lines[2] == "| alpha | 40.0 | 60.0 | 70.0 | 70.0 | 70.5 | 1.4 | - | 450 |"
    assert lines[3].endswith("| 1.4 | - | - |")
    axes, = learning_curve(scores_by_length(records)).axes
    rings = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in rings] == [450]

def test_the_page_of_lengths_reads_as_what_it_is(tmp_path):
    "No deviations, no marks, all records, in the order of detectors and lengths."
    specs = [small_spec(epochs=None, steps=steps, seed=seed, batch=4) for seed in (0, 1) for steps in (3, 2)]
    records = [run(spec, tmp_path) for spec in specs]
    text = lengths_page(records)
    about, _, details = text.partition("\n\n| detector | 2 | 3 |")
    assert about.startswith("mAD after trainings of so many optimizer steps, a column for each length. "
                            "Mean over two classes of `embedded-v1-smoke` in percent, two seeds. ")
    assert not {"±", "bold", "underlined", "†"} & set(about.split()) and "**" not in text
    for record in records: assert details.count(record.id) == 1
    assert details.index("| rd4ad | 2 |") < details.index("| rd4ad | 3 |")
