"Options: every error of a declaration, text and typed values that mean the same, all declarations sound."
import pytest
from mdd_bench.detectors import detector as registry
from mdd_bench.detectors.detector import (
    Detector, declared_options, describe_detector, detector_class, full_options, list_detectors,
)
from mdd_bench.errors import SpecError
from mdd_bench.options import (
    as_dict, as_list, checked_value, chosen_options, complete_options, describe_values, forcing_condition,
    option, parse_value, without_none,
)
from mdd_bench.running.spec import make_spec, spec_options

def refuse_odd(value):
    if value % 2: raise SpecError(f"odd {value}", "give an even number")

class Parent:
    mode: str = option("both", choices=("one", "two", "both"), help="which of them")
    count: int = option(5, least=1, most=100, forced={"mode=one": 1, "mode=two": None}, help="how many")
    share: float = option(.5, least=0, most=1, help="of the images")
    noise: float | None = option(None, least=0, help="its deviation; none: measured")

class Child(Parent):
    fast: bool = option(False, test_only=True, help="whether to hurry")
    even: int = option(4, check=refuse_odd, help="an even number")
    levels: list[int] = option([1, 2], help="of the features")
    names: list[str] | None = option(None, help="of the classes")
    extra: dict = option({}, help="anything")
    depth: int = option(1, forced={"mode!=both": 1}, help="of the second one")

DECLARED = declared_options(Child)

def complete(**given): return complete_options("child", DECLARED, given)

# --- from text to values

@pytest.mark.parametrize("text, value", [
    ("3", 3), ("-3", -3), (" 7 ", 7),
    ("1e-3", .001), (".5", .5),
    ("true", True), ("False", False),
    ("none", None), ("null", None), ("", None),
    ("[1, 2]", [1, 2]), ("1,5", (1, 5)),
    ("both", "both"), ("a b", "a b"), ("print(1)", "print(1)"),
])
def test_text_means_a_value(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)

@pytest.mark.parametrize("value", [3, .5, True, None, [1], {"a": 1}])
def test_what_is_no_text_stays(value): assert parse_value(value) is value

def test_lists_and_dictionaries_from_text():
    assert as_list("a, b,c") == as_list(["a", "b", "c"]) == ["a", "b", "c"]
    assert as_list(3, int) == [3]
    values = dict(a=1, b="x", c=None, d="u=v")
    assert as_dict("a=1, b=x,c=none,d=u=v") == as_dict(dict(a="1", b="x", c="none", d="u=v")) == values
    assert as_dict("") == as_dict(None) == {}

TEXT_AND_TYPED = [
    (dict(count="7"), dict(count=7)),
    (dict(count="7.0"), dict(count=7)),
    (dict(count=7.), dict(count=7)),
    (dict(share="1"), dict(share=1.)),
    (dict(share=1), dict(share=1.)),
    (dict(share="1e-1"), dict(share=.1)),
    (dict(noise="none"), dict(noise=None)),
    (dict(noise=""), dict(noise=None)),
    (dict(noise="2"), dict(noise=2)),
    (dict(fast="true"), dict(fast=True)),
    (dict(fast="False"), dict(fast=False)),
    (dict(levels="2,3"), dict(levels=[2, 3])),
    (dict(levels=("2", 3)), dict(levels=[2, 3])),
    (dict(levels=2), dict(levels=[2])),
    (dict(names="a,b"), dict(names=["a", "b"])),
    (dict(names="none"), dict(names=None)),
    (dict(extra="a=1"), dict(extra=dict(a=1))),
    (dict(mode="one", count="1"), dict(mode="one")),
]

@pytest.mark.parametrize("text, typed", TEXT_AND_TYPED)
def test_text_and_typed_values_are_equal(text, typed):
    "In value and in type: 1 and 1.0 must have one spelling, or one run would have two ids."
    from_text, from_values = complete(**text), complete(**typed)
    assert from_text == from_values
    assert {k: type(v) for k, v in from_text.items()} == {k: type(v) for k, v in from_values.items()}

def test_the_type_is_that_of_the_declaration():
    values = complete(count=3., share=1, noise=2, fast="true", even="6")
    assert {name: type(values[name]) for name in ("count", "share", "noise", "fast", "even")} == dict(
        count=int, share=float, noise=float, fast=bool, even=int)

def test_none_in_an_annotation():
    assert without_none(int | None) == (int, True) and without_none(int) == (int, False)
    assert DECLARED["noise"].optional and not DECLARED["share"].optional
    assert without_none(list[str] | None) == (list[str], True)

# --- errors

WRONG = {
    "an unknown name": (dict(cuont=3), r"option of child 'cuont'. Did you mean 'count'\? Known: count, "),
    "no number": (dict(count="many"), "count='many'. give a whole number from 1 to 100: how many"),
    "a fraction": (dict(count=2.5), "count=2.5. give a whole number from 1 to 100"),
    "a fraction as text": (dict(count="2.5"), "count='2.5'. give a whole number"),
    "true for a number": (dict(count=True), "count=True. give a whole number"),
    "true for a number, as text": (dict(share="true"), "share='true'. give a number from 0 to 1"),
    "a list for a number": (dict(count=[1]), r"count=\[1\]. give a whole number"),
    "infinity for a whole number": (dict(count="1e999"), "count='1e999'. give a whole number"),
    "no truth": (dict(fast="perhaps"), "fast='perhaps'"),
    "two for a truth": (dict(fast=2), "fast=2"),
    "no list of numbers": (dict(levels="a,b"), "levels='a,b'"),
    "no dictionary": (dict(extra="a"), "extra='a'"),
    "a list for a dictionary": (dict(extra=["a=1"]), "extra="),
    "too small": (dict(count=0), "count=0. give a whole number from 1 to 100"),
    "too large": (dict(count=101), "count=101. give a whole number from 1 to 100"),
    "below a bound without an upper one": (dict(noise=-1), "noise=-1.0. give a number of at least 0"),
    "too large a share": (dict(share="1.01"), "share=1.01. give a number from 0 to 1"),
    "not a number": (dict(share=float("nan")), "share=nan. give a number from 0 to 1"),
    "not a number, without an upper bound": (dict(noise="nan"), "noise=nan. give a number of at least 0"),
    "no choice": (dict(mode="bth"), r"unknown mode 'bth'. Did you mean 'both'\? Known: both, one, two"),
    "a number for a choice": (dict(mode=1), "unknown mode '1'"),
    "none": (dict(count=None), "count=None. give a value, for example 5, or leave it out"),
    "none as text": (dict(share="none"), "share='none'. give a number from 0 to 1"),
    "none for a choice": (dict(mode=None), "unknown mode None. .*Known: both, one, two"),
    "its own check": (dict(even=3), "odd 3. give an even number"),
    "another value": (dict(mode="one", count=2), "count=2 cannot be with mode=one. .*out, or give 1"),
    "none for one": (dict(mode="one", count=None), "count=None cannot be with mode=one"),
    "a value for none": (dict(mode="two", count=5), "count=5 cannot be with mode=two. leave count out$"),
    "with an unequal": (dict(mode="two", depth=2), "depth=2 cannot be with mode!=both. .*or give 1"),
}

@pytest.mark.parametrize("given, message", WRONG.values(), ids=WRONG)
def test_what_a_declaration_refuses(given, message):
    with pytest.raises(SpecError, match=message): complete(**given)

BOUNDS = [("count", 1), ("count", 100), ("share", 0), ("share", 1), ("noise", 0)]

@pytest.mark.parametrize("name, value", BOUNDS)
def test_bounds_are_allowed(name, value): assert complete(**{name: value})[name] == value

def test_the_word_none_may_be_a_choice():
    class Memory:
        memory: str = option("class", choices=("none", "class"))
    declared = declared_options(Memory)
    for value in (None, "none"):
        assert complete_options("toy", declared, dict(memory=value)) == dict(memory="none")

def test_a_condition_needs_its_option_above():
    class Wrong:
        count: int = option(5, forced={"mode=one": 1})
        mode: str = option("one")
    with pytest.raises(SpecError, match="declare mode above"):
        complete_options("wrong", declared_options(Wrong), {})

# --- forced and chosen values

def test_the_first_condition_that_holds_decides():
    assert complete()["count"] == 5
    assert complete(mode="one")["count"] == 1 and complete(mode="two")["count"] is None
    assert forcing_condition(DECLARED["depth"], dict(mode="one")) == "mode!=both"
    assert forcing_condition(DECLARED["depth"], dict(mode="both")) is None

def test_a_forced_value_may_be_given_as_it_is():
    assert complete(mode="one", count=1) == complete(mode="one", count="1") == complete(mode="one")
    assert complete(mode="two", count=None) == complete(mode="two")

def test_what_was_chosen_is_what_stands_away_from_its_default():
    assert chosen_options(DECLARED, complete()) == {}
    assert chosen_options(DECLARED, complete(mode="both", count="5", noise="none", levels="1,2")) == {}
    assert chosen_options(DECLARED, complete(mode="one")) == dict(mode="one")     # count follows from it
    chosen = complete(fast=True, count=6)
    assert chosen_options(DECLARED, chosen) == dict(count=6, fast=True)
    assert chosen_options(DECLARED, chosen, training=True) == dict(count=6)       # only a test reads `fast`

def test_parents_come_first_and_children_may_replace():
    class Slow(Parent):
        count: int = option(9, least=1)
    assert list(declared_options(Parent)) == ["mode", "count", "share", "noise"] == list(DECLARED)[:4]
    assert list(DECLARED)[4:] == ["fast", "even", "levels", "names", "extra", "depth"]
    assert list(declared_options(Slow)) == list(declared_options(Parent))
    assert declared_options(Slow)["count"].default == 9 and declared_options(Parent)["count"].default == 5

@pytest.mark.parametrize("name, words", [
    ("mode", "one | two | both"),
    ("count", "a whole number from 1 to 100"),
    ("share", "a number from 0 to 1"),
    ("noise", "a number of at least 0, or none"),
    ("even", "a whole number"),
    ("fast", "bool"),
])
def test_an_option_in_words(name, words): assert describe_values(DECLARED[name]) == words

def test_values_are_not_shared():
    "What one caller does with a default must not reach the next one."
    complete()["levels"].append(3)
    complete()["extra"]["a"] = 1
    make_spec().options["a"] = 1
    make_spec().protocols.append("b")
    assert complete()["levels"] == [1, 2] and complete()["extra"] == {}
    assert make_spec().options == {} and make_spec().protocols == ["exact"]

# --- an option on a detector

@pytest.fixture
def toy(monkeypatch):
    "A detector with options, known for one test."
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    @registry.register("toy")
    class Toy(Detector):
        "Has options."
        count: int = option(5, least=1, help="how many")
        noise: float | None = option(None, least=0, help="its deviation")
    return Toy

def test_options_are_attributes_of_their_names(toy):
    detector = toy(None, count="7")
    assert (detector.count, detector.noise) == (7, None) and detector.options == dict(count=7, noise=None)
    assert toy(None).count == 5

@pytest.mark.parametrize("given, message", [
    (dict(count=0), "count=0"),
    (dict(count=None), "count=None"),
    (dict(cuont=1), "unknown option of toy 'cuont'"),
])
def test_direct_construction_checks_too(toy, given, message):
    with pytest.raises(SpecError, match=message): toy(None, **given)
    with pytest.raises(SpecError, match=message): registry.create_detector("toy", None, **given)

def test_a_detector_in_words(toy):
    head, count, noise = describe_detector("toy")
    assert head.split(maxsplit=1) == ["toy", "Has options."]
    assert count.split() == "--option count=5 a whole number of at least 1; how many".split()
    assert "noise=None" in noise and "a number of at least 0, or none; its deviation" in noise

# --- every declaration there is

def all_declarations():
    "{owner: its options} of every detector and of the spec."
    detectors = {name: declared_options(detector_class(name)) for name in list_detectors()}
    return detectors | dict(RunSpec=spec_options())

DECLARATIONS = all_declarations()
DETECTORS = list_detectors()
OPTIONS = [(owner, name) for owner, declared in DECLARATIONS.items() for name in declared]

@pytest.mark.parametrize("owner, name", OPTIONS)
def test_a_declaration_is_sound(owner, name):
    o = DECLARATIONS[owner][name]
    default = checked_value(o, o.default)
    assert o.help.strip(), "no help"
    assert default == o.default and type(default) is type(o.default), "the default is another after the check"
    if o.choices: assert len(set(o.choices)) == len(o.choices) > 1
    if o.least is not None and o.most is not None: assert o.least < o.most

FORCED = [(owner, name) for owner, name in OPTIONS if DECLARATIONS[owner][name].forced]

@pytest.mark.parametrize("owner, name", FORCED)
def test_a_forced_option_depends_on_what_can_be(owner, name):
    declared = DECLARATIONS[owner]
    above = list(declared)[:list(declared).index(name)]
    for condition, only in declared[name].forced.items():
        other, value = condition.replace("!=", "=").split("=")
        assert other in above, f"{condition}: declare {other} above {name}"
        assert checked_value(declared[other], value) is not None or value == "none"
        if only is not None: assert checked_value(declared[name], only) == only

@pytest.mark.parametrize("name", DETECTORS)
def test_the_defaults_of_a_detector_are_its_method(name):
    "All options have values, and none of them counts as chosen."
    defaults = full_options(name, {})
    assert list(defaults) == list(DECLARATIONS[name])
    assert chosen_options(DECLARATIONS[name], defaults) == {}

@pytest.mark.parametrize("name", DETECTORS)
def test_every_choice_of_a_detector_can_be_made(name):
    "And what is complete is complete: given once more, it stays."
    defaults = full_options(name, {})
    for o in DECLARATIONS[name].values():
        if forcing_condition(o, defaults): continue
        for value in o.choices or ():
            complete = full_options(name, {o.name: value})
            assert complete[o.name] == value and full_options(name, complete) == complete
