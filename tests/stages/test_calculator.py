"""``dprandp account``: what it says agrees with the accountants, and what it prints is never below the truth."""

from __future__ import annotations

import math

import pytest

from dprandp.inspection import account as calculator
from dprandp.inspection.account import account, account_lines, attack_lines
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon


def test_sampled_steps():
    result = account(None, 9.2, 0.08192, 100, 1e-5)
    assert result.curve.delta == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10])
    epsilons = result.curve.epsilon
    assert epsilons == sorted(epsilons)
    assert epsilons[2] == result.epsilon == compose([GaussianEvent(9.2, 0.08192, 100)], 1e-5).upper
    assert result.equivalent_mu_is == "the Gaussian through (ε, δ)"
    assert gaussian_dp_epsilon(result.equivalent_mu, 1e-5) == pytest.approx(result.epsilon, rel=1e-9)
    assert "μ = 0.0" in account_lines(result)
    assert "the Gaussian through (ε, δ)" in account_lines(result)
    rates = result.attack.true_positive_rate
    for true, false in zip(rates, result.attack.false_positive_rate, strict=True):
        assert false < true < 2 * false
    assert rates == sorted(rates)
    assert result.adjacency == "zero-out of one record"
    assert result.adjacency_relation is None
    assert "adjacency:" not in attack_lines(result)


def test_replacing_costs_more_and_says_how_it_is_known():
    removing = account(None, 9.2, 0.08192, 100, 1e-5, curve=False)
    replacing = account(None, 9.2, 0.08192, 100, 1e-5, "replace-one", curve=False)
    assert 1.9 < replacing.epsilon / removing.epsilon < 2.6
    assert replacing.attack.advantage > 1.8 * removing.attack.advantage
    assert "group privacy" in replacing.accountant
    assert "Theorem 2.14" in attack_lines(replacing)
    assert "which of two records" in attack_lines(replacing)
    assert replacing.adjacency in account_lines(replacing)
    assert account_lines(replacing).count("\n") == 0


def test_full_batches_are_exact():
    result = account(1.0, None, 1.0, 60, 1e-5)
    assert result.equivalent_mu_is == "exact"
    assert result.equivalent_mu == pytest.approx(math.sqrt(60) / result.noise_multiplier)
    assert result.attack.source == "exact Gaussian DP"
    assert account_lines(result).splitlines()[4].split() == ["1e-05", "1"]


def test_without_noise_or_steps():
    open_book = account(math.inf, None, 0.1, 10, 1e-5, "replace-one")
    assert (open_book.epsilon, open_book.equivalent_mu, open_book.equivalent_mu_is) == (math.inf, None, None)
    assert open_book.attack.true_positive_rate == [1, 1, 1]
    assert open_book.attack.advantage == 1
    nothing = account(None, 2.0, 0.1, 0, 1e-5)
    assert (nothing.epsilon, nothing.equivalent_mu, nothing.attack.advantage) == (0, 0, 0)


def test_percentages_are_rounded_up():
    for rate, text in ((0.0, "0"), (1.0, "100"), (0.00239001, "0.24"), (0.00239, "0.239"), (0.5001, "50.1")):
        assert calculator._percent(rate) == text
