import pytest

from apq_mmdet.calibration import Recipe
from apq_mmdet.errors import BadInputError
from apq_mmdet.policy import Policy


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (dict(w_bit=4), "did you mean 'w_bits'"),
        (dict(w_bits=1), "quant.w_bits: bits must be a whole number from 2 to 8, got 1"),
        (dict(a_bits=9), "quant.a_bits: bits must"),
        (dict(a_bits=4.0), "got 4.0"),
        (dict(scope="backbon"), "did you mean 'backbone'"),
        (dict(formats=dict(r=dict(kind="linear"))), "formats.r.kind: unknown value 'linear'; did you mean 'Linear'"),
        (dict(formats=dict(r=dict(wieght=dict(bits=4)))), "did you mean 'weight'"),
        (dict(formats=dict(r=dict(weight=dict(granularty="channel")))), "did you mean 'granularity'"),
        (dict(formats=dict(r=dict(attention=dict(format="mathew")))), "did you mean 'matthew'"),
        (dict(formats=dict(r=dict(weight=4))), "expected dict"),
        (dict(overrides={1: dict(bits=4)}), "overrides: expected text as name of a rule, got 1"),
        (dict(overrides=dict(r=dict(pattern="re:("))), "no regular expression"),
        (dict(overrides=dict(r=dict(float="False"))), "overrides.r.float: expected True or False, got 'False'"),
        (
            dict(formats=dict(r=dict(weight=dict(symmetric="yes")))),
            "r.weight.symmetric: expected True or False, got 'yes'",
        ),
        (
            dict(formats=dict(r=dict(max_bits=9))),
            "formats.r.max_bits: bits must be a whole number from 2 to 8, got 9",
        ),
        (dict(formats=dict(r=dict(max_bits=3, bits=4))), "formats.r: max_bits goes with changes of roles"),
        (dict(formats=dict(r=dict(max_bits=3, float=True))), "formats.r: max_bits goes with changes of roles"),
        (dict(formats=dict(r=dict(max_bits=3))), "formats.r: max_bits goes with changes of roles"),
        (dict(overrides=dict(r=dict(input=dict(format="token_affine")))), "overrides.r.input: .* needs a quant.search"),
        (dict(search=dict(metric="blok")), "did you mean 'block'"),
        (dict(search=dict(round=3)), "did you mean 'rounds'"),
        (dict(search=dict(rounds=0)), "rounds: expected a whole number >= 1"),
        (dict(search=dict(grids=dict(Linear=(1.1, 0.7, 10)))), "grids.Linear"),
        (dict(search=dict(objective=dict(type="hesian"))), "unknown type 'hesian'"),
        (dict(search=dict(objective=dict(type="hessian", eliminate=1.5))), "eliminate must be"),
        (dict(search=dict(windows=2, block_input="quantized")), "windows=2 needs block_input='float'"),
        (dict(on_unseen="ignore"), "on_unseen"),
        (dict(observer="percentil"), "quant.observer: .*did you mean 'percentile'"),
        (dict(search={}, equalize=1.5), "quant.equalize: expected a number from 0 to 1, got 1.5"),
        (dict(search={}, equalize=-0.1), "quant.equalize: .*got -0.1"),
        (dict(search={}, equalize=float("nan")), "quant.equalize: .*got nan"),
        (dict(search={}, equalize=True), "quant.equalize: .*got True"),
        (dict(search={}, equalize="all"), "quant.equalize: .*got 'all'"),
        (dict(equalize=0.5), "quant.equalize works on searched blocks: it needs a quant.search"),
        (dict(compensation=dict(ranges=0)), "quant.compensation works on searched blocks"),
        (dict(compensation={}), "quant.compensation works on searched blocks"),
        (dict(reconstruction=dict(iterations=1)), "quant.reconstruction works on searched blocks"),
        (dict(reconstruction=[dict(iterations=1)]), "quant.reconstruction works on searched blocks"),
        (dict(search={}, compensation=dict(range=0)), "quant.compensation: .*did you mean 'ranges'"),
        (dict(search={}, compensation=False), "quant.compensation: expected dict"),
        (dict(search={}, reconstruction=3), "quant.reconstruction: expected dict"),
        (dict(search={}, reconstruction=dict(batch=0)), r"quant.reconstruction.batch: expected .* >= 1, got 0"),
        (dict(search={}, reconstruction=[{}, dict(batch=0)]), r"quant.reconstruction\[1\].batch: .*got 0"),
        (dict(search={}, reconstruction=[{}, "fast"]), r"quant.reconstruction\[1\]: expected dict"),
        (dict(search=dict(rounds=True)), "quant.search.rounds: expected a whole number >= 1, got True"),
        (dict(search=dict(grids=5)), "quant.search.grids: expected dict.*, got 5"),
        *(
            (dict(search=dict(grids=dict(attention=grid))), "quant.search.grids.attention: expected .*0 < first")
            for grid in [(0, 1, 3), 7, (1, 2), ("a", "b", "c"), (0.5, 1, float("inf")), (0.5, float("inf"), 2)]
        ),
        (dict(search=dict(grids=dict(querry=(0.5, 1, 3)))), "quant.search.grids: .*did you mean 'query'"),
        (dict(overrides=[dict(pattern="*")]), "expected dict\\(name=dict"),
        (dict(overrides=dict(r=True)), "quant.overrides.r: expected dict\\(pattern="),
        (dict(search=1), "quant.search: expected dict"),
    ],
)
def test_bad_values_are_named(quant, message):
    with pytest.raises(BadInputError, match=message):
        Recipe.from_dict(quant)


def test_later_rules_win_and_roles_are_separate():
    policy = Policy.from_dict(
        dict(
            w_bits=4,
            a_bits=6,
            formats=dict(a=dict(kind="Linear", weight=dict(granularity="channel")), b=dict(pattern="*.qkv", bits=8)),
            overrides=dict(
                c=dict(pattern="re:.*\\.1\\.qkv", weight=dict(bits=3)), d=dict(pattern="*.head", float=True)
            ),
        )
    )
    specs, _ = policy.scheme("a.1.qkv", "Linear", ("weight", "input"))
    assert (specs["weight"].bits, specs["weight"].granularity, specs["input"].bits) == (3, "channel", 8)
    specs, _ = policy.scheme("a.proj", "Linear", ("weight", "input"))
    assert (specs["weight"].bits, specs["input"].bits) == (4, 6)
    specs, reasons = policy.scheme("a.head", "Linear", ("weight", "input"))
    assert specs == {}
    assert reasons == dict.fromkeys(("weight", "input"), "left float by overrides.d")


def test_a_rule_can_be_for_few_bits_only():
    rule = dict(max_bits=3, weight=dict(granularity="channel"), input=dict(symmetric=True))
    policy = Policy.from_dict(dict(w_bits=4, a_bits=3, formats=dict(few=rule)))
    specs, _ = policy.scheme("a", "Linear", ("weight", "input"))
    assert (specs["weight"].granularity, specs["input"].symmetric) == ("tensor", True)
    none = dict(pattern="a", input=None)
    policy = Policy.from_dict(dict(a_bits=3, formats=dict(none=none, few=rule)))
    assert "input" not in policy.scheme("a", "Linear", ("weight", "input"))[0]  # it has no bits


@pytest.mark.parametrize(("a_bits", "mine", "symmetric"), [(3, 8, False), (8, 3, True)])
def test_few_bits_are_those_that_a_role_ends_with(a_bits, mine, symmetric):
    policy = dict(
        a_bits=a_bits,
        formats=dict(few=dict(max_bits=3, input=dict(symmetric=True))),
        overrides=dict(mine=dict(input=dict(bits=mine))),
    )
    specs, _ = Policy.from_dict(policy).scheme("a", "Linear", ("weight", "input"))
    assert (specs["input"].bits, specs["input"].symmetric) == (mine, symmetric)


def test_one_role_can_stay_float():
    specs, reasons = Policy.from_dict(dict(overrides=dict(r=dict(pattern="fc", input=None)))).scheme(
        "fc", "Linear", ("weight", "input")
    )
    assert list(specs) == ["weight"]
    assert reasons == {"input": "left float by overrides.r"}


def test_each_role_that_stays_float_names_its_own_rule():
    overrides = dict(a=dict(weight=None), b=dict(input=None))
    specs, reasons = Policy.from_dict(dict(overrides=overrides)).scheme("fc", "Linear", ("weight", "input"))
    assert specs == {}
    assert reasons == {"weight": "left float by overrides.a", "input": "left float by overrides.b"}


@pytest.mark.parametrize("pattern", ["*.qvk", "*qvk", r"re:.*\.qvk$", "backbone.stages.1.attn.qvk"])
def test_override_that_matches_nothing_is_refused(pattern):
    policy = Policy.from_dict(dict(overrides=dict(r=dict(pattern=pattern, float=True))))
    names = ["backbone.stages.0.attn.proj", "backbone.stages.1.attn.qkv", "backbone.stages.1.ffn.fc1"]
    with pytest.raises(
        BadInputError, match=r"overrides.r: .*matches no layer.* nearest name is '.*stages\.1\.attn\.qkv'"
    ):
        policy.check_overrides([(name, "Linear", ("weight", "input")) for name in names])


def test_a_regular_expression_matches_whole_names():
    policy = Policy.from_dict(dict(overrides=dict(r=dict(pattern=r"re:blocks\.1", float=True))))
    named = ("blocks.1", "blocks.10", "blocks.1.fc", "more.blocks.1")
    assert [policy.scheme(name, "Linear", ("weight",))[0] == {} for name in named] == [True, False, False, False]


def test_override_of_a_role_that_no_matched_layer_has_is_refused():
    policy = Policy.from_dict(dict(overrides=dict(r=dict(pattern="*.qkv", query=dict(bits=8)))))
    with pytest.raises(BadInputError, match=r"overrides\.r: .* has a role 'query'; they have input, weight"):
        policy.check_overrides([("attn.qkv", "Linear", ("weight", "input"))])


def test_bare_bits_do_not_quantize_what_the_recipe_leaves_float():
    formats = dict(deconv=dict(kind="ConvTranspose2d", float=True))
    roles = ("weight", "input")
    for override, quantized in ((dict(pattern="*", bits=8), []), (dict(pattern="*", weight=dict(bits=8)), ["weight"])):
        policy = Policy.from_dict(dict(formats=formats, overrides=dict(mine=override)))
        assert list(policy.scheme("up", "ConvTranspose2d", roles)[0]) == quantized


def test_reconstructions_in_turn():
    stages = Recipe.from_dict(dict(search={}, reconstruction=[dict(iterations=3), dict(iterations=5)])).reconstruction
    assert [stage.iterations for stage in stages] == [3, 5]
    assert len(Recipe.from_dict(dict(search={}, reconstruction=dict(iterations=3))).reconstruction) == 1
    assert Recipe.from_dict(dict(search={}, reconstruction=None)).reconstruction == ()
