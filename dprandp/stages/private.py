"""What the two private stages share: one budget, one ledger, and private pixels read only once a plan is accepted.

The order matters and is the same in both stages:

    1. name the data set (declared facts only)      4. fix the plan in privacy/plan.json
    2. open the budget and the ledger               5. read the private pixels
    3. plan: σ from what is left, or refuse         6. train through ``PrivateMechanism`` alone
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dprandp.privacy.ledger import Ledger
from dprandp.privacy.plan import PrivateMechanism, PrivatePlan

from dprandp.datasets import Dataset, DataSpec
from dprandp.privacy.accounting import EpsilonBound
from dprandp.privacy.noise import InsecureSeed, RandomSource, SystemRandom
from dprandp.stages.context import Context


@dataclass
class PrivateStage:
    """A private stage that may begin: its plan fits the budget. No private pixel has been read yet.

    Attributes:
        name: 'probe' or 'finetune'.
        dataset: named, not read.
        plan: accepted.
        ledger: the run's.
    """

    name: str
    dataset: Dataset
    plan: PrivatePlan
    ledger: Ledger
    context: Context

    @property
    def spec(self) -> DataSpec:
        """Declared facts about the data."""
        return self.dataset.spec

    def mechanism(self, steps_done: int) -> PrivateMechanism:
        """The only way to the data's gradients: charges before it hands out a batch.

        Args:
            steps_done: steps whose updates the caller's checkpoint holds. Steps charged beyond it were lost in a crash;
                they stay paid and are not repeated.
        """
        return PrivateMechanism(self.plan, self.ledger, self.random(), start_step=self.charged_steps())

    def charged_steps(self) -> int:
        """Steps of this attempt that the ledger holds."""
        return self.ledger.charged_steps(self.name, self.plan.attempt)

    def random(self) -> RandomSource:
        """OS entropy, or the insecure seed of a test."""
        seed = self.context.insecure_seed
        return SystemRandom() if seed is None else InsecureSeed(seed)

    def spent(self) -> EpsilonBound:
        """What the whole run has spent so far."""
        return self.ledger.spent(self.plan.delta)

    @property
    def private(self) -> bool:
        """Whether the run deserves to be called private: finite ε and noise from OS entropy, in every charge."""
        return self.ledger.private and math.isfinite(self.plan.epsilon_total)
