"Specs and identities: what may be asked for, and when two runs are the same."
import json, shutil
from dataclasses import asdict, dataclass, fields, replace
import pytest
from typer.testing import CliRunner
from mdd_bench.data.catalog import MASKS
from mdd_bench.data.images import RESIZE
from mdd_bench.data.splits import SCHEMES
from mdd_bench.data.synthetic import write_embedded
from mdd_bench.detectors import detector as registry
from mdd_bench.detectors.detector import declared_options, detector_class, full_options, list_detectors
from mdd_bench.detectors.mddnet import MDDNet
from mdd_bench.errors import SpecError
from mdd_bench.options import forcing_condition, option
from mdd_bench.parts.backbone import PROCEDURAL, procedural_file
from mdd_bench.parts.lite0 import LITE0
from mdd_bench.running import identity
from mdd_bench.running.identity import epochs_of, filled_spec, resolve, short_hash
from mdd_bench.running.spec import LabelFields, RunSpec, make_spec, spec_field, spec_options
from conftest import flags_of, small_spec

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

# --- the spec

TEXT_AND_TYPED = dict(
    data=("embedded-v1-smoke", "embedded-v1-smoke"),
    classes=("gear, tile", ["gear", "tile"]),
    size=("64", 64),
    layout=("visa", "visa"),
    resize=("pad", "pad"),
    value_range=("0,4095", [0., 4095.]),
    masks=("optional", "optional"),
    skip_broken=("true", True),
    calibration=(".25", .25),
    backbone=("none", None),
    weights=("random", "random"),
    layers=("1,2", [1, 2]),
    labelled=("3", 3),
    scheme=("per_kind", "per_kind"),
    label_classes=("a+b", "a+b"),
    label_seed=("7", 7),
    hold_out=("5", 5),
    labelled_at_most=("False", False),
    manifest=("none", None),
    detector=("rd4ad", "rd4ad"),
    options=("a=1,b=x", dict(a=1, b="x")),
    setting=("separate", "separate"),
    seed=("4", 4),
    epochs=("10 %", "10%"),
    steps=("50", 50),
    batch=("8", 8),
    precision=("bfloat16", "bfloat16"),
    protocols=("exact,ader", ["exact", "ader"]),
)

def test_every_field_is_tested_as_text(): assert set(TEXT_AND_TYPED) == {f.name for f in fields(RunSpec)}

@pytest.mark.parametrize("name", TEXT_AND_TYPED)
def test_text_and_typed_fields_are_equal(name):
    text, typed = TEXT_AND_TYPED[name]
    from_text = make_spec(**{name: text})
    assert from_text == make_spec(**{name: typed}) and getattr(from_text, name) == typed

@pytest.mark.parametrize("wrong, message", [
    (dict(epoch=3), "unknown run parameter 'epoch'. Did you mean 'epochs'"),
    (dict(size="large"), "size='large'. give a whole number of at least 16"),
    (dict(size=8), "size=8. give a whole number of at least 16"),
    (dict(size=None), "size=None. give a value"),
    (dict(seed=-1), "seed=-1"),
    (dict(batch=0), "batch=0. give a whole number of at least 1"),
    (dict(layers="1,x"), "layers='1,x'"),
    (dict(scheme="pool"), "unknown scheme 'pool'. Did you mean 'pooled'"),
    (dict(setting="one"), "unknown setting 'one'. .*separate, unified"),
    (dict(precision="half"), "unknown precision 'half'. .*bfloat16"),
    (dict(options="a"), "options='a'"),
    (dict(calibration=0), "calibration=0.0. give a share above 0 and below 1"),
    (dict(calibration=1), "calibration=1.0. give a share above 0 and below 1"),
    (dict(calibration=1.5), "calibration=1.5. give a number from 0 to 1"),
    (dict(skip_broken="perhaps"), "skip_broken='perhaps'"),
    (dict(resize="shrink"), "unknown resize 'shrink'. .*crop, pad, stretch"),
    (dict(masks="none"), "unknown masks 'none'. .*optional, required"),
    (dict(value_range="1,0"), "value_range='1,0'. .*black,white"),
    (dict(value_range="0,1,2"), "value_range='0,1,2'"),
    (dict(value_range="0,inf"), "value_range='0,inf'"),
])
def test_impossible_fields(wrong, message):
    with pytest.raises(SpecError, match=message): make_spec(**wrong)

DRAWN = dict(
    labelled=2, scheme="per_kind", label_classes="a", label_seed=1, hold_out=3, labelled_at_most=True,
)

@pytest.mark.parametrize("name", DRAWN)
def test_a_manifest_leaves_nothing_to_draw(name):
    assert {*DRAWN, "manifest"} == {f.name for f in fields(LabelFields)}
    with pytest.raises(SpecError, match=f"{name}={DRAWN[name]} with a manifest"):
        make_spec(manifest="m.json", **{name: DRAWN[name]})
    default = spec_options()[name].default
    assert make_spec(manifest="m.json", **{name: default}) == make_spec(manifest="m.json")

def test_a_spec_survives_the_command_line(monkeypatch):
    "Its flags, parsed by the command, are the same spec."
    import mdd_bench.running.run as running
    from mdd_bench.cli import app
    def stop(spec, *args): raise SpecError(json.dumps(asdict(spec)))
    monkeypatch.setattr(running, "run", stop)
    values = {name: typed for name, (_, typed) in TEXT_AND_TYPED.items()}
    everything = values | dict(steps=None)      # a length is given in epochs or in steps
    for spec in (make_spec(), make_spec(**everything), small_spec(epochs=3, manifest="m.json")):
        result = CliRunner().invoke(app, ["run", *flags_of(spec)])
        assert isinstance(result.exception, SpecError), result.output
        assert json.loads(result.exception.what) == asdict(spec)

# --- epochs

@pytest.mark.parametrize("detector, asked, epochs", [
    ("rd4ad", "10%", 10),
    ("uniad", "10%", 100),
    ("patchcore", "10%", 0),
    ("patchcore", 5, 0),
    ("rd4ad", "0.1%", 1),
    ("rd4ad", "200%", 200),
    ("rd4ad", 7, 7),
    ("uniad", None, 1000),
])
def test_epochs_may_be_a_share_of_the_recipe(detector, asked, epochs):
    assert epochs_of(detector_class(detector).recipe, make_spec(epochs=asked).epochs) == epochs

@pytest.mark.parametrize("asked", ["0%", "-1%", "x%", "%", "nan%", "1.5", -1])
def test_epochs_that_are_none(asked):
    with pytest.raises(SpecError, match="epochs"): make_spec(epochs=asked)

def test_a_share_and_its_number_are_one_run():
    assert resolve(small_spec(epochs="3%")).run_id == resolve(small_spec(epochs=3)).run_id

# --- data that are read once for many specs

def test_specs_of_the_same_data_read_them_once(monkeypatch):
    read, plain = [], identity.open_dataset
    def open_dataset(**how):
        read.append(how["data"])
        return plain(**how)
    monkeypatch.setattr(identity, "open_dataset", open_dataset)
    large = dict(data="embedded-v1", detector="dmad")
    specs = [small_spec(), small_spec(seed=1), small_spec(classes="gear"), small_spec(**large, labelled=2),
             small_spec(**large, labelled=1, hold_out=3), small_spec(**large, calibration=.5)]
    opened = {}
    together = [resolve(spec, opened).run_id for spec in specs]
    assert read == ["embedded-v1-smoke"]*2 + ["embedded-v1"]
    assert together == [resolve(spec).run_id for spec in specs] and len(set(together)) == len(specs)

# --- what stands at its default is no part of an identity

def ids(spec):
    resolved = resolve(spec)
    return resolved.run_id, resolved.training_id

@pytest.fixture(scope="module")
def small(): return small_spec(detector="mddnet")

@dataclass
class LaterSpec(RunSpec):
    "A spec of a later version, with one more field."
    gamma: float = spec_field(1., "of the images", least=0)

def test_a_new_field_changes_no_identity(small, monkeypatch):
    before = ids(small)
    [new] = [f for f in fields(LaterSpec) if f.name == "gamma"]
    declared = spec_options() | dict(gamma=new.metadata["option"].declare("gamma", float))
    monkeypatch.setattr(identity, "spec_options", lambda: declared)
    later = LaterSpec(**asdict(small))
    assert ids(later) == before
    changed = ids(replace(later, gamma=2.))
    assert changed[0] != before[0] and changed[1] != before[1]

class LaterMDDNet(MDDNet):
    "A detector of a later version, with two more options."
    gamma: float = option(1., least=0, help="of the features")
    shown: bool = option(False, test_only=True, help="read by the test alone")

def test_a_new_option_changes_no_identity(small, monkeypatch):
    before = ids(small)
    monkeypatch.setitem(registry._registry, "mddnet", LaterMDDNet)
    assert ids(small) == before
    assert full_options("mddnet", {})["gamma"] == 1.
    changed = ids(replace(small, options=dict(gamma=2)))
    assert changed[0] != before[0] and changed[1] != before[1]
    shown = ids(replace(small, options=dict(shown=True)))
    assert shown[0] != before[0] and shown[1] == before[1]

@pytest.mark.parametrize("detector", list_detectors())
def test_options_spelled_at_their_defaults_are_the_same_run(detector):
    plain = small_spec(detector=detector)
    declared, defaults = declared_options(detector_class(detector)), full_options(detector, {})
    free = [name for name, o in declared.items() if not forcing_condition(o, defaults)]
    spelled = {name: str(defaults[name]) for name in free}
    assert ids(replace(plain, options=spelled)) == ids(plain)
    assert "options" not in resolve(plain).identity

def test_fields_spelled_at_their_defaults_are_the_same_run(small):
    "Also where the default is what the weights or the detector's recipe says."
    recipe = dict(backbone=LITE0, batch=MDDNet.recipe.batch)
    spelled = recipe | dict(calibration=None, setting="unified", seed=0, precision="float32", options={})
    assert ids(replace(small, **spelled)) == ids(small)
    chosen = {"setting", "seed", "precision", "calibration", "batch", "options"}
    assert not chosen & resolve(small).identity.keys()

def test_a_detector_brings_its_own_backbone_and_levels():
    "Where the run names none; naming them is the same run."
    own = resolve(small_spec(detector="uniad", weights="random", backbone=None, layers=None))
    assert own.backbone.name == "efficientnet_b4" and own.backbone.strides == [2, 4, 8, 16]
    filled = filled_spec(own)
    assert filled["backbone"] == "efficientnet_b4" and filled["layers"] == [0, 1, 2, 3]
    named = small_spec(detector="uniad", weights="random", backbone="efficientnet_b4", layers=[0, 1, 2, 3])
    assert resolve(named).run_id == own.run_id

# --- what decides a number is a part of it

CHANGES = dict(
    data=dict(data="other"),        # a folder of the tests
    classes=dict(classes=["gear"]),
    size=dict(size=96),
    resize=dict(resize="pad"),
    value_range=dict(value_range=[0., 4095.]),
    calibration=dict(calibration=.25),
    backbone=dict(backbone="test_resnet", weights="random"),
    weights=dict(backbone=PROCEDURAL, weights="random"),
    layers=dict(layers=[1, 2, 3]),
    detector=dict(detector="rd4ad"),
    options=dict(options=dict(memory="none")),
    setting=dict(setting="separate"),
    seed=dict(seed=1),
    epochs=dict(epochs=2),
    steps=dict(epochs=None, steps=2),
    batch=dict(batch=5),
    precision=dict(precision="bfloat16"),
)

@pytest.fixture(scope="module")
def changed_ids(small, tmp_path_factory):
    "{field: (run id, training id)} where that field is changed, and the unchanged ones under 'nothing'."
    folder = tmp_path_factory.mktemp("other")/"data"
    other = write_embedded(folder, "smoke", seed=1, classes=small.classes)
    changes = CHANGES | dict(data=dict(data=str(other)), nothing={})
    return {name: ids(replace(small, **change)) for name, change in changes.items()}

def test_every_field_of_an_identity_is_tested():
    assert set(CHANGES) == {name for name, declared in spec_options().items() if declared.identity}

@pytest.mark.parametrize("number", [0, 1], ids=["run id", "training id"])
def test_every_field_of_an_identity_changes_it(changed_ids, number):
    "And each into another one; training depends on all of them as well."
    assert len({pair[number] for pair in changed_ids.values()}) == len(CHANGES) + 1

@pytest.mark.parametrize("change", [dict(protocols=["ader", "exact"]), dict(skip_broken=True),
                                    dict(masks="optional")])
def test_what_decides_no_number_is_no_part_of_it(small, changed_ids, change):
    assert ids(replace(small, **change)) == changed_ids["nothing"]

def test_a_revision_is_part_of_it(small, changed_ids, monkeypatch):
    monkeypatch.setattr(MDDNet, "revision", MDDNet.revision + 1)
    run_id, training_id = ids(small)
    assert run_id != changed_ids["nothing"][0] and training_id != changed_ids["nothing"][1]

def test_options_that_only_a_test_reads_share_a_training(small, changed_ids):
    fused, scaled = (ids(replace(small, options=o)) for o in (dict(fusion="product"), dict(scale="raw")))
    assert len({fused[0], scaled[0], changed_ids["nothing"][0]}) == 3
    assert fused[1] == scaled[1] == changed_ids["nothing"][1]

@pytest.mark.parametrize("detector", list_detectors())
def test_every_choice_is_another_run(detector):
    "And another training, unless only a test reads the option."
    plain, declared = small_spec(detector=detector), declared_options(detector_class(detector))
    defaults = full_options(detector, {})
    choices = [(o, value) for o in declared.values() for value in o.choices or () if value != o.default]
    free = [(o, value) for o, value in choices if not forcing_condition(o, defaults)]
    changed = [ids(replace(plain, options={o.name: value})) for o, value in free]
    run_id, training_id = ids(plain)
    assert len({run_id, *(c[0] for c in changed)}) == len(free) + 1
    for (o, _), c in zip(free, changed): assert (c[1] == training_id) == o.test_only

def test_an_identity_does_not_depend_on_the_order_of_its_keys():
    a, b = dict(x=1, y=dict(p=[1, 2], q=None)), dict(y=dict(q=None, p=[1, 2]), x=1)
    assert short_hash(a) == short_hash(b) != short_hash(dict(a, x=2))
    assert len(short_hash(a)) == 12 and int(short_hash(a), 16) >= 0

# --- content counts, not names

def test_data_count_by_content(small, changed_ids, tmp_path):
    copy = write_embedded(tmp_path/"elsewhere", "smoke", classes=small.classes)
    assert ids(replace(small, data=str(copy))) == changed_ids["nothing"]

def test_the_order_of_classes_does_not_count(small, changed_ids):
    assert ids(replace(small, classes=["tile", "gear"])) == changed_ids["nothing"]

def test_a_changed_folder_is_noticed_in_the_same_process(tmp_path):
    root = write_embedded(tmp_path/"d", "smoke", classes=["gear"])
    spec = small_spec(data=str(root), classes=None)
    before = resolve(spec).run_id
    (root/"gear"/"train"/"good"/"003.png").unlink()
    assert resolve(spec).run_id != before

def test_weights_count_by_content(small, tmp_path):
    "The same weights in a file of another name are the same run; the file's next content is another."
    import torch
    from safetensors.torch import load_file, save_file
    file = tmp_path/"copy.safetensors"
    shutil.copyfile(procedural_file(), file)
    from_file = replace(small, backbone=PROCEDURAL, weights=str(file))
    before = ids(replace(small, weights="procedural"))
    assert ids(from_file) == before
    tensors = load_file(file)
    name = next(k for k, v in tensors.items() if v.is_floating_point() and v.ndim == 4)
    tensors[name] = tensors[name] + torch.ones_like(tensors[name])
    save_file(tensors, file)
    assert ids(from_file)[0] != before[0]

# --- what a record says was asked for

def test_choices_that_are_written_in_two_places_are_the_same():
    "The declaration of a run does not import the data, so that the help of the command line is fast."
    choices = {name: spec_options()[name].choices for name in ("scheme", "resize", "masks")}
    assert choices == dict(scheme=SCHEMES, resize=RESIZE, masks=MASKS)

def test_a_filled_spec_has_every_field_and_option(small):
    filled = filled_spec(resolve(small))
    assert filled.keys() == {f.name for f in fields(RunSpec)} | {"revision"}
    assert filled["options"] == full_options("mddnet", {}) and filled["backbone"] == LITE0
    assert filled["batch"] == MDDNet.recipe.batch and filled["layers"] == [1, 2]

def test_a_filled_spec_makes_the_same_run(small, changed_ids):
    filled = filled_spec(resolve(small))
    del filled["revision"]
    forced = {name for name, value in filled["options"].items() if value is None}
    filled["options"] = {name: value for name, value in filled["options"].items() if name not in forced}
    assert ids(make_spec(**filled)) == changed_ids["nothing"]
