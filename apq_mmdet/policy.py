"""Which layer gets which bits and formats: the ``quant`` dict of a config, validated, and its ordered rules."""

import difflib
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from apq_mmdet.checks import check_bool, check_choice, check_dict, check_fields, check_rules, refuse_unknown
from apq_mmdet.errors import BadInputError
from apq_mmdet.registry import QUANTIZERS

KINDS = ("Linear", "Conv2d", "ConvTranspose2d", "MatMul")
ROLES = ("weight", "input", "query", "key", "attention", "value")
SCOPES = ("backbone", "detector")
MIN_BITS, MAX_BITS = 2, 8
BITS_KEYS = ("bits", "max_bits")


def check_bits(bits: Any, where: str) -> int:
    """Return ``bits`` if it is a whole number from 2 to 8, else raise BadInputError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise BadInputError(f"{where}: bits must be a whole number from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return bits


def check_pattern(pattern: Any, where: str) -> str:
    """Return a glob, or a regular expression after ``re:``, if it is one, else raise BadInputError."""
    if not isinstance(pattern, str):
        raise BadInputError(f"{where}: expected a glob or 're:' and a regular expression, got {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise BadInputError(f"{where}: {pattern!r} is no regular expression: {error}") from error
    return pattern


def name_matches(pattern: str, name: str) -> bool:
    """Whether a full name is what a glob or, after ``re:``, a regular expression speaks of."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def _nearest(pattern: str, names: list[str]) -> str | None:
    """The name that a pattern which matches none may have meant: of a glob or regex, by the last part of both."""
    literal = not pattern.startswith("re:") and not set(pattern) & set("*?[")
    if literal:
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
        return near[0] if near else None
    by_end = {name.rpartition(".")[2]: name for name in names}
    end = pattern.removeprefix("re:").strip("*.$^").rpartition(".")[2]
    near = difflib.get_close_matches(end, by_end, n=1, cutoff=0.3)
    return by_end[near[0]] if near else None


@dataclass(frozen=True)
class QuantizerSpec:
    """One tensor role's number format.

    ``granularity`` is 'tensor', 'channel', 'head' or the number of equal groups along the channel axis.
    """

    bits: int
    format: str = "affine"
    granularity: str | int = "tensor"
    symmetric: bool = False


@dataclass(frozen=True)
class Rule:
    """Settings for the layers of one kind (None: every kind) whose name matches a pattern.

    Patterns are globs (``*.qkv``) or, after ``re:``, regular expressions that must match the whole name.
    ``bits`` changes the bits of all roles that are quantized by then. ``roles`` maps a role to spec fields to change
    (which quantizes a role that an earlier rule left float), or to None: that role stays float. With ``max_bits``
    only roles that end with at most so many bits are changed.
    """

    pattern: str = "*"
    kind: str | None = None
    leave_float: bool = False
    bits: int | None = None
    max_bits: int | None = None
    roles: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, rule: dict[str, Any], where: str) -> "Rule":
        """Parse ``dict(pattern=, kind=, float=, bits=, max_bits=, <role>=fields of a QuantizerSpec)``."""
        rule = check_dict(rule, where, "dict(pattern=..., ...)")
        refuse_unknown(rule, ("pattern", "kind", "float", "bits", "max_bits", *ROLES), where)
        kind = rule.get("kind")
        if kind is not None:
            check_choice(kind, KINDS, f"{where}.kind")
        roles: dict[str, dict[str, Any] | None] = {}
        bits, max_bits = (check_bits(rule[key], f"{where}.{key}") if key in rule else None for key in BITS_KEYS)
        if max_bits is not None and (bits is not None or rule.get("float") or not set(ROLES) & set(rule)):
            raise BadInputError(f"{where}: max_bits goes with changes of roles, not with bits or float")
        for role in ROLES:
            if role in rule:
                given = rule[role]
                roles[role] = None if given is None else _spec_fields(given, where, role)
        pattern = check_pattern(rule.get("pattern", "*"), f"{where}.pattern")
        leave_float = check_bool(rule.get("float", False), f"{where}.float")
        return cls(pattern, kind, leave_float, bits, max_bits, roles)

    def matches(self, name: str, kind: str) -> bool:
        """Whether the rule speaks of a layer of this full name and kind."""
        if self.kind not in (None, kind):
            return False
        return name_matches(self.pattern, name)


def _spec_fields(given: Any, where: str, role: str) -> dict[str, Any]:
    where = f"{where}.{role}"
    given = check_fields(given, QuantizerSpec, where, "dict(bits=..., format=..., ...) or None")
    if "bits" in given:
        check_bits(given["bits"], where)
    if "format" in given:
        check_choice(given["format"], sorted(QUANTIZERS.module_dict), f"{where}.format")
    if "symmetric" in given:
        check_bool(given["symmetric"], f"{where}.symmetric")
    return given


@dataclass(frozen=True)
class Policy:
    """What is quantized and how: bits, scope, format rules of the recipe, then the user's own overrides.

    Rules have names, so that configs can change one by inheritance. They apply in the order of their names, because
    mmengine sorts the keys of a config that it writes; later rules win. A role starts as per-tensor asymmetric affine
    with ``w_bits`` (role weight) or ``a_bits`` bits.

    Args:
        w_bits, a_bits: 2 to 8, for weights and for everything else.
        scope: 'backbone' or 'detector'.
        formats: the recipe's rules; a pattern may match nothing.
        overrides: the user's rules; a pattern that matches no layer is an error.
        output_compensation: whether blocks get a linear correction of their output, in float (QwT).
        mlp_refit: whether MLPs get a ReLU for their GELU, to which calibration refits their weights (APHQ-ViT).
    """

    w_bits: int = 8
    a_bits: int = 8
    scope: str = "backbone"
    formats: dict[str, Rule] = field(default_factory=dict)
    overrides: dict[str, Rule] = field(default_factory=dict)
    output_compensation: bool = False
    mlp_refit: bool = False

    @classmethod
    def from_dict(cls, policy: dict[str, Any], where: str = "quant") -> "Policy":
        """Validate the policy part of a ``quant`` dict.

        Raises:
            BadInputError: unknown key, bits out of range, unknown scope, format or role.
        """
        policy = check_fields(policy, cls, where, "dict(w_bits=..., a_bits=..., ...)")
        for key in ("w_bits", "a_bits"):
            policy[key] = check_bits(policy.get(key, 8), f"{where}.{key}")
        check_choice(policy.get("scope", "backbone"), SCOPES, f"{where}.scope")
        for key in ("formats", "overrides"):
            rules = check_rules(policy.get(key, {}), f"{where}.{key}", "dict(name=dict(pattern=..., ...))")
            policy[key] = {name: Rule.from_dict(rule, f"{where}.{key}.{name}") for name, rule in rules.items()}
        for key in ("output_compensation", "mlp_refit"):
            check_bool(policy.get(key, False), f"{where}.{key}")
        return cls(**policy)

    def scheme(self, name: str, kind: str, roles: tuple[str, ...]) -> tuple[dict[str, QuantizerSpec], dict[str, str]]:
        """Spec of each quantized role of a layer, and the reason of each role that stays float."""
        specs, _ = self._applied(name, kind, roles, {})
        return self._applied(name, kind, roles, {role: spec.bits for role, spec in specs.items()})

    def _applied(
        self, name: str, kind: str, roles: tuple[str, ...], bits: dict[str, int]
    ) -> tuple[dict[str, QuantizerSpec], dict[str, str]]:
        """As ``scheme``, where ``bits`` tells those of roles to which rules with ``max_bits`` may apply."""
        reasons: dict[str, str] = {}
        specs: dict[str, dict[str, Any] | None] = {
            role: {"bits": self.w_bits if role == "weight" else self.a_bits} for role in roles
        }
        for origin, rules in (("formats", self.formats), ("overrides", self.overrides)):
            for rule_name, rule in rules.items():
                if not rule.matches(name, kind):
                    continue
                reason = f"left float by {origin}.{rule_name}"
                if rule.leave_float:
                    specs, reasons = dict.fromkeys(roles), dict.fromkeys(roles, reason)
                if rule.bits is not None:
                    specs = {r: spec and {**spec, "bits": rule.bits} for r, spec in specs.items()}
                for role, change in rule.roles.items():
                    if role not in specs:
                        continue
                    if rule.max_bits is not None and bits.get(role, MAX_BITS + 1) > rule.max_bits:
                        continue
                    if change is None:
                        specs[role], reasons[role] = None, reason
                    else:
                        base = specs[role] or {"bits": self.w_bits if role == "weight" else self.a_bits}
                        specs[role] = {**base, **change}
        quantized = {role: QuantizerSpec(**spec) for role, spec in specs.items() if spec is not None}
        return quantized, {role: reason for role, reason in reasons.items() if role not in quantized}

    def check_overrides(self, layers: list[tuple[str, str, tuple[str, ...]]]) -> None:
        """Raise BadInputError for an override that changes none of the (name, kind, roles) layers."""
        for rule_name, rule in self.overrides.items():
            matched = [roles for name, kind, roles in layers if rule.matches(name, kind)]
            absent = [role for role in rule.roles if matched and not any(role in roles for roles in matched)]
            if absent:
                raise BadInputError(
                    f"quant.overrides.{rule_name}: no layer that matches {rule.pattern!r} has a role {absent[0]!r}; "
                    f"they have {', '.join(sorted({role for roles in matched for role in roles}))}"
                )
            if not matched:
                near = _nearest(rule.pattern, [name for name, *_ in layers])
                hint = f"; the nearest name is {near!r}" if near else ""
                raise BadInputError(
                    f"quant.overrides.{rule_name}: pattern {rule.pattern!r} (kind {rule.kind or 'any'}) matches no "
                    f"layer that scope {self.scope!r} quantizes{hint}"
                )
