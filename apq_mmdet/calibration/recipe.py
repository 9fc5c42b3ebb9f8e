"""A recipe is data: number formats (policy) plus how their ranges are searched; parsed from ``model.quant``."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from apq_mmdet.calibration.compensation import CompensationConfig
from apq_mmdet.calibration.importance import IMPORTANCES
from apq_mmdet.calibration.objectives import build_objective
from apq_mmdet.calibration.reconstruction import ReconstructionConfig
from apq_mmdet.calibration.scoring import Candidate
from apq_mmdet.checks import (
    check_choice,
    check_dict,
    check_fields,
    check_number,
    check_rules,
    check_whole,
    refuse_unknown,
)
from apq_mmdet.errors import BadInputError
from apq_mmdet.policy import KINDS, ROLES, Policy, check_pattern, name_matches
from apq_mmdet.quantizers import OBSERVERS, Quantizer
from apq_mmdet.registry import QUANTIZERS

# APQ-ViT grids (reconstruction): (first factor, last factor, number of candidates) by layer kind
DEFAULT_GRIDS = {
    "Linear": (0.7, 1.1, 100),
    "Conv2d": (0.9, 1.2, 100),
    "ConvTranspose2d": (0.9, 1.2, 100),
    "MatMul": (0.9, 1.2, 100),
}
METRICS = ("block", "module")
ORDERS = ("backward", "forward")
BLOCK_INPUTS = ("float", "quantized")
ON_UNSEEN = ("error", "float")


@dataclass(frozen=True)
class SearchConfig:
    """How range factors are searched.

    Args:
        metric: where errors are measured: at the 'block' output (BBC) or at the 'module' output (PTQ4ViT).
        objective: config of an objective, ``dict(type='hessian', eliminate=0.1, eliminate_by='error')``.
        objectives: others for blocks whose name matches a pattern, ``dict(heads=dict(pattern='*head*', type='mse'))``.
        rounds: alternating rounds over the layers of a block; stops early at a fixpoint.
        order: 'backward' (last layer of a block first) or 'forward'.
        block_input: a block is judged on its 'float' input, or on the input that the 'quantized' blocks before give.
        grids: (first, last, number) of the range factors by layer kind, or by tensor role, which counts more.
        shortlist: 0 for the exact form; else only so many best candidates of the module metric are judged at the block.
        windows: 0 for all; else blocks of windowed attention are judged on a crop of windows x windows per image.
        rows: 0 for all; else heads are judged on at most so many RoIs per image.
        tokens: 0 for all; else a call whose units (windows, patches, RoIs) do not see each other is represented by a
            random sample of them, of at most so many tokens (a RoI counts as one), in search, compensation and
            reconstruction.
    """

    metric: str = "block"
    objective: dict[str, Any] = field(default_factory=lambda: dict(type="hessian"))
    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: int = 3
    order: str = "backward"
    block_input: str = "float"
    grids: dict[str, tuple[float, float, int]] = field(default_factory=lambda: dict(DEFAULT_GRIDS))
    shortlist: int = 0
    windows: int = 0
    rows: int = 0
    tokens: int = 0

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: str) -> "SearchConfig":
        """Validate; BadInputError names the key."""
        config = check_fields(config, cls, where, "dict(metric=..., ...) or None")
        for key, choices in (("metric", METRICS), ("order", ORDERS), ("block_input", BLOCK_INPUTS)):
            if key in config:
                check_choice(config[key], choices, f"{where}.{key}")
        for key, least in (("rounds", 1), ("shortlist", 0), ("windows", 0), ("rows", 0), ("tokens", 0)):
            check_whole(config.get(key, least), f"{where}.{key}", least)
        grids = check_dict(config.get("grids", {}), f"{where}.grids", "dict(Linear=(first, last, number), ...)")
        refuse_unknown(grids, (*KINDS, *ROLES), f"{where}.grids")
        config["grids"] = {**DEFAULT_GRIDS, **{k: _grid(g, f"{where}.grids.{k}") for k, g in grids.items()}}
        if config.get("windows") and config.get("block_input") == "quantized":
            raise BadInputError(f"{where}: windows={config['windows']} needs block_input='float'")
        if "objective" in config:
            config["objective"] = _objective(config["objective"], f"{where}.objective")
        expected = "dict(name=dict(pattern=..., type=...))"
        rules = check_rules(config.get("objectives", {}), f"{where}.objectives", expected)
        config["objectives"] = {n: _block_objective(rule, f"{where}.objectives.{n}") for n, rule in rules.items()}
        return cls(**config)

    def for_block(self, name: str) -> "SearchConfig":
        """The search of a block of this name: with the last of ``objectives`` that speaks of it."""
        matching = [rule for rule in self.objectives.values() if name_matches(rule["pattern"], name)]
        if not matching:
            return self
        return replace(self, objective={key: value for key, value in matching[-1].items() if key != "pattern"})

    def candidates(self, kind: str, role: str, quantizer: Quantizer) -> list[Candidate]:
        """What a search tries for one quantizer: every range factor with every variant, factors ascending."""
        factors = self.factors(kind, quantizer.min_factor, role) if quantizer.ranged else [1.0]
        return [Candidate(f, v) for f in factors for v in quantizer.variants or (None,)]

    def factors(self, kind: str, least: float = 0.0, role: str = "") -> list[float]:
        """The range factors of a role (or else of a layer kind), ascending, none below ``least``."""
        first, last, number = self.grids.get(role, self.grids[kind])
        step = (last - first) / max(number - 1, 1)
        return [f for f in (first + i * step for i in range(number)) if f >= least - 1e-9]


def _objective(config: Any, where: str) -> dict[str, Any]:
    config = check_dict(config, where, "dict(type=..., ...)")
    try:
        build_objective(config)
    except (TypeError, ValueError) as error:
        raise BadInputError(f"{where}: {error}") from error
    return config


def _block_objective(rule: Any, where: str) -> dict[str, Any]:
    if not hasattr(rule, "keys") or "pattern" not in rule:
        raise BadInputError(f"{where}: expected dict(pattern=..., type=..., ...), got {rule!r}")
    pattern = check_pattern(rule["pattern"], f"{where}.pattern")
    return {**_objective({key: value for key, value in rule.items() if key != "pattern"}, where), "pattern": pattern}


def _grid(grid: Any, where: str) -> tuple[float, float, int]:
    try:
        first, last, number = grid
        is_right = 0 < first <= last < math.inf and 1 <= number == int(number)
    except (TypeError, ValueError, OverflowError):
        is_right = False
    if not is_right:
        raise BadInputError(
            f"{where}: expected (first, last, number) with 0 < first <= last and number >= 1, got {grid!r}"
        )
    return float(first), float(last), int(number)


@dataclass(frozen=True)
class Recipe:
    """The ``quant`` dict of a config, validated.

    Args:
        name: shown in reports.
        policy: bits, scope and number formats.
        search: None for plain observed ranges.
        on_unseen: what becomes of a layer with a quantizer that saw no data: 'error', or left 'float'.
        observer: how activation ranges follow from data, 'minmax' or 'percentile'.
        importance: what weighs the errors of block outputs: the gradient at the 'disturbed' model, or its change under
            a 'perturbation', which says nothing about layers inside of blocks.
        equalize: strength of the rescalings that make channels even before anything else; 0 for none.
        compensation: what weights make up for after the search of their block, or None.
        reconstruction: what is learned after that, in this order.
    """

    name: str
    policy: Policy
    search: SearchConfig | None
    on_unseen: str = "error"
    observer: str = "minmax"
    importance: str = "disturbed"
    equalize: float = 0.0
    compensation: CompensationConfig | None = None
    reconstruction: tuple[ReconstructionConfig, ...] = ()

    @property
    def changes_weights(self) -> bool:
        """Whether a finished block differs from the float one in more than its quantizers."""
        learned = self.compensation is not None or bool(self.reconstruction)
        return learned or self.policy.output_compensation or self.policy.mlp_refit

    def needs_gradients(self, block: str) -> bool:
        """Whether anything that is done to a block of this name weighs errors by gradients."""
        if self.search is None:
            return False
        return (
            build_objective(self.search.for_block(block).objective).needs_gradients
            or (self.compensation is not None and self.compensation.weighted)
            or any(stage.needs_gradients for stage in self.reconstruction)
        )

    @classmethod
    def from_dict(cls, quant: dict[str, Any]) -> "Recipe":
        """Parse ``dict(recipe=, w_bits=, a_bits=, scope=, formats=, overrides=, search=, ...)``: see the arguments.

        Raises:
            BadInputError: unknown key or value, with what would be right.
        """
        policy_keys = [f.name for f in fields(Policy)]
        own_keys = [f.name for f in fields(cls) if f.name not in ("name", "policy")]
        refuse_unknown(quant, ("recipe", *own_keys, *policy_keys), "quant")
        given = {key: quant[key] for key in own_keys if key in quant}
        for key, choices in (("on_unseen", ON_UNSEEN), ("observer", OBSERVERS), ("importance", IMPORTANCES)):
            if key in given:
                check_choice(given[key], choices, f"quant.{key}")
        search, compensation = given.pop("search", None), given.get("compensation")
        needing = ("importance", "equalize", "compensation", "reconstruction", "output_compensation", "mlp_refit")
        steps = [key for key in needing if quant.get(key) not in (None, False, 0)]
        if search is None and steps:
            raise BadInputError(f"quant.{steps[0]} works on searched blocks: it needs a quant.search")
        policy = Policy.from_dict({key: quant[key] for key in policy_keys if key in quant})
        if search is None:
            _refuse_unfound_centers(policy)
        given["equalize"] = float(check_number(quant.get("equalize", 0.0), "quant.equalize", most=1.0))
        _refuse_unfound_factors(policy, given["equalize"])
        if compensation is not None:
            given["compensation"] = CompensationConfig.from_dict(compensation, "quant.compensation")
        given["reconstruction"] = _stages(quant.get("reconstruction"))
        searched = None if search is None else SearchConfig.from_dict(search, "quant.search")
        if policy.mlp_refit and searched.windows:  # whose float outputs are computed anew, when weights have changed
            raise BadInputError(
                f"quant.mlp_refit needs whole blocks: quant.search.windows is {searched.windows}, not 0"
            )
        recipe = cls(name=quant.get("recipe", "custom"), policy=policy, search=searched, **given)
        _refuse_pulled_back(recipe)
        return recipe


def _refuse_pulled_back(recipe: Recipe) -> None:
    """A difference of gradients at a block's output says nothing about the layers inside, as a gradient does."""
    if recipe.importance != "perturbation":
        return
    if recipe.compensation is not None and recipe.compensation.weighted:
        raise BadInputError(
            "quant.compensation.weighted weighs layers' tokens by gradients, and quant.importance 'perturbation' is "
            "none: use weighted=False, or importance 'disturbed'"
        )
    objectives = [recipe.search.objective, *recipe.search.objectives.values()]
    kinds = [{key: value for key, value in config.items() if key != "pattern"} for config in objectives]
    if recipe.search.metric == "module" and any(build_objective(kind).needs_gradients for kind in kinds):
        raise BadInputError(
            "quant.search.metric 'module' judges layers by gradients, and quant.importance 'perturbation' is none: use "
            "metric 'block', an objective of type 'mse', or importance 'disturbed'"
        )


def _refuse_unfound_factors(policy: Policy, equalize: float) -> None:
    """An input's channels share one scale up to factors that only an equalization finds.

    Without one, a recipe's own formats mean nothing by it; a user who asks for it is told.
    """
    for name, rule in policy.overrides.items():
        if not equalize and (rule.roles.get("input") or {}).get("granularity") == "channel":
            raise BadInputError(
                f"quant.overrides.{name}.input: granularity 'channel' needs quant.equalize above 0, which finds the "
                f"factors between channels"
            )


def _refuse_unfound_centers(policy: Policy) -> None:
    """Centers of inputs are those of the calls that are kept for a search."""
    for key, rules in (("formats", policy.formats), ("overrides", policy.overrides)):
        for name, rule in rules.items():
            given = (rule.roles.get("input") or {}).get("format", "affine")
            if QUANTIZERS.module_dict[given].centered:
                raise BadInputError(
                    f"quant.{key}.{name}.input: format {given!r} works on searched blocks: it needs a quant.search"
                )


def _stages(given: Any) -> tuple[ReconstructionConfig, ...]:
    """One reconstruction, or several in turn."""
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        return (ReconstructionConfig.from_dict(given, "quant.reconstruction"),)
    return tuple(ReconstructionConfig.from_dict(s, f"quant.reconstruction[{i}]") for i, s in enumerate(given))
