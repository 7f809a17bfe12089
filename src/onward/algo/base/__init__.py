"""What a learning rule is, and the tiers that hand its author only what such a rule may see."""

from onward.algo.base.block_local import BlockLocal
from onward.algo.base.feedback import Feedback
from onward.algo.base.inference import Inference, States
from onward.algo.base.passes import Passes
from onward.algo.base.perturbation import DRAWS, LossOracle, Perturbation, normal, rademacher
from onward.algo.base.plasticity import Plasticity
from onward.algo.base.rule import Rule, RuleInfo, choice
from onward.algo.base.statistics import held_statistics

__all__ = [
    "DRAWS", "BlockLocal", "Feedback", "Inference", "LossOracle", "Passes", "Perturbation", "Plasticity",
    "Rule", "RuleInfo", "States", "choice", "held_statistics", "normal", "rademacher",
]
