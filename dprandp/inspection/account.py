"""``dprandp account``: σ for an ε or ε for a σ, the whole curve, and the best attack. Reads no data.

The theory of attackers, of replaced records and of groups is in ``privacy/neighbours.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dprandp.errors import UsageError
from dprandp.privacy.accounting import EpsilonBound, GaussianEvent, compose, rounded_up, warn_by_log
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.privacy.neighbours import (
    ADD_REMOVE,
    REPLACE_ONE,
    ZERO_OUT,
    calibrate_adjacency,
    compose_adjacency,
    compose_group,
    trade_off,
)
from dprandp.privacy.opinions import Opinion, refuse_contradiction, second_opinions

CURVE_DELTAS = tuple(10.0**-exponent for exponent in range(3, 11))
FALSE_POSITIVE_RATES = (0.001, 0.01, 0.05)

NEIGHBOURS = {
    ZERO_OUT: "zero-out of one record",
    ADD_REMOVE: "add/remove one record",
    REPLACE_ONE: "replace one record",
}
EXACT, THROUGH_POINT = "exact", "the Gaussian through (ε, δ)"
DOUBLED = "replacing a record moves a sum by up to 2C instead of C, which doubles μ (exact)"
TWO_MOVES = (
    "replacing means emptying a slot and filling it again: group privacy along the whole zero-out curve, "
    "(ε₁ + ε₂, δ₁ + exp(ε₁) δ₂), an upper bound (Dong, Roth & Su 2022, Theorem 2.14)"
)


@dataclass(frozen=True)
class OtherEpsilon:
    """ε by another library."""

    name: str
    epsilon_lower: float
    epsilon_upper: float | None
    why: str | None  # there is none


@dataclass(frozen=True)
class Attack:
    """What the best attacker gains."""

    false_positive_rate: tuple[float, ...]
    true_positive_rate: list[float]  # at most
    advantage: float  # largest difference of the two rates
    source: str


@dataclass(frozen=True)
class Curve:
    """ε of each δ."""

    delta: tuple[float, ...]
    epsilon: list[float]


@dataclass(frozen=True, kw_only=True)
class Account:
    """σ, ε and the attack that they allow."""

    noise_multiplier: float  # σ
    sample_rate: float  # q
    steps: int  # T
    delta: float
    epsilon: float  # upper bound
    epsilon_estimate: float
    epsilon_lower: float
    accountant: str
    opinions: list[OtherEpsilon]
    equivalent_mu: float | None  # of Gaussian DP; None without privacy
    equivalent_mu_is: str | None  # EXACT or THROUGH_POINT; None without privacy
    adjacency: str
    adjacency_relation: str | None  # how ε follows from that of zero-out; None unless a record is replaced
    attack: Attack
    curve: Curve | None = None
    group_size: int
    group_epsilon: float | None = None  # of a group: upper bound at the same δ; infinite where none was found
    group_accountant: str | None = None


def account(
    epsilon: float | None,
    noise_multiplier: float | None,
    sample_rate: float,
    steps: int,
    delta: float,
    adjacency: str = ZERO_OUT,
    curve: bool = True,
    group_size: int = 1,
) -> Account:
    """σ for an ε, or ε for a σ, and the attack that it allows; and ε of ``group_size`` records together.

    Raises:
        UsageError: a value out of its range, or groups of replaced records. BudgetError: no noise is enough.
        AuditError: two accountants contradict each other.
    """
    if noise_multiplier is None:
        noise_multiplier = calibrate_adjacency(epsilon, delta, sample_rate, steps, adjacency, _silent)
    events = [GaussianEvent(noise_multiplier, sample_rate, steps)]
    said: list[str] = []
    bound = compose_adjacency(events, delta, adjacency, said.append)
    opinions = second_opinions(events, delta)
    refuse_contradiction(bound if adjacency != REPLACE_ONE else compose(events, delta, _silent), opinions)
    attacker = trade_off(events, adjacency, said.append)
    for sentence in dict.fromkeys(said):
        warn_by_log(sentence)
    mu, mu_is = attacker.mu, EXACT
    if mu is None:
        mu, mu_is = gaussian_dp_mu(bound.upper, delta), THROUGH_POINT
    elif math.isinf(mu):
        mu, mu_is = None, None
    relation = None
    if adjacency == REPLACE_ONE:
        relation = TWO_MOVES if attacker.mu is None else DOUBLED
    found = [compose_adjacency(events, each, adjacency, _silent).upper for each in CURVE_DELTAS] if curve else []
    group = None if group_size == 1 else _group(events, delta, adjacency, group_size)
    return Account(
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        steps=steps,
        delta=delta,
        epsilon=bound.upper,
        epsilon_estimate=bound.estimate,
        epsilon_lower=bound.lower,
        accountant=bound.accountant,
        opinions=[
            OtherEpsilon(each.name, each.lower, each.upper if math.isfinite(each.upper) else None, each.why)
            for each in opinions
        ],
        equivalent_mu=mu,
        equivalent_mu_is=mu_is,
        adjacency=NEIGHBOURS[adjacency],
        adjacency_relation=relation,
        attack=Attack(
            FALSE_POSITIVE_RATES,
            [attacker.true_positive_rate(rate) for rate in FALSE_POSITIVE_RATES],
            attacker.advantage,
            attacker.source,
        ),
        curve=Curve(CURVE_DELTAS, found) if curve else None,
        group_size=group_size,
        group_epsilon=group and group.upper,
        group_accountant=group and group.accountant,
    )


def _group(events: list[GaussianEvent], delta: float, adjacency: str, size: int) -> EpsilonBound:
    if adjacency == REPLACE_ONE:
        raise UsageError(
            f"--group-size {size} is only for records that are zeroed out together, not replaced",
            fix="leave --adjacency at zero-out",
        )
    return compose_group(events, delta, size, _silent)


def account_lines(result: Account) -> str:
    """``account`` for people: one line, and the curve, if asked for, as a table below it."""
    sampling = "full batch" if result.sample_rate == 1 else f"Poisson q = {result.sample_rate:g}"
    mu = ""
    if result.equivalent_mu is not None:
        named = "" if result.equivalent_mu_is == EXACT else f", {THROUGH_POINT}"
        mu = f"; as Gaussian DP: μ = {result.equivalent_mu:.4g}{named}"
    lines = [
        f"σ = {result.noise_multiplier:.6g}, {sampling}, T = {result.steps}: "
        f"ε = {rounded_up(result.epsilon, 5)} at δ = {result.delta:g} ({result.adjacency}; {result.accountant}{mu})"
    ]
    if result.group_epsilon is not None:
        size, epsilon = result.group_size, result.group_epsilon
        lines.append(f"{size} records together: ε = {rounded_up(epsilon, 5)} at the same δ ({result.group_accountant})")
    if result.curve is not None:
        rows = zip(result.curve.delta, result.curve.epsilon, strict=True)
        lines += ["       δ  ε", *(f"{delta:8.0e}  {rounded_up(epsilon, 5)}" for delta, epsilon in rows)]
    return "\n".join(lines)


def attack_lines(result: Account) -> str:
    """The attacker's gain, in words."""
    attack = result.attack
    alarms = " / ".join(f"{100 * rate:g}" for rate in attack.false_positive_rate)
    found = " / ".join(_percent(rate) for rate in attack.true_positive_rate)
    replacing = result.adjacency == NEIGHBOURS[REPLACE_ONE]
    goal = "which of two records was there" if replacing else "that a record was there"
    lines = [
        f"attacker: knowing all other records and everything released, at {alarms} % false alarms, one can tell {goal} "
        f"in at most {found} % of cases",
        f"best advantage (true minus false positives): {_percent(attack.advantage)} % ({attack.source})",
    ]
    if result.adjacency_relation:
        lines.append(f"adjacency: {result.adjacency_relation}")
    return "\n".join(lines)


def opinion_lines(result: Account) -> str:
    """The ε of other libraries; of zero-out, also where a record is replaced."""
    of = " (of zero-out)" if result.adjacency == NEIGHBOURS[REPLACE_ONE] else ""
    opinions = [
        Opinion(each.name, each.epsilon_lower, math.inf if each.epsilon_upper is None else
                each.epsilon_upper, each.why)
        for each in result.opinions
    ]  # fmt: skip
    return "\n".join(f"another opinion{of}: {opinion}" for opinion in opinions)


def _silent(sentence: str) -> None:
    """Print nothing during searches and curves: the result names its accountant once."""


def _percent(rate: float) -> str:
    """To three digits, rounded up."""
    if rate <= 0:
        return "0"
    rate = max(rate, 1e-100)
    digits = 2 - math.floor(math.log10(100 * rate))
    return f"{min(100.0, math.ceil(round(100 * rate * 10**digits, 6)) / 10**digits):g}"
