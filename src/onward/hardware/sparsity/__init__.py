"""Which numbers take part in a pass: masks of weights, forward and backward, and sampled gradients."""

from onward.hardware.sparsity.adapter import LateAdapter
from onward.hardware.sparsity.flow import MaskDecay, StructureDecay
from onward.hardware.sparsity.group import Sparsity
from onward.hardware.sparsity.masks import NM, DoublePruned, Independent, Permuted, Unstructured
from onward.hardware.sparsity.sampling import VCAS

__all__ = ["NM", "VCAS", "DoublePruned", "Independent", "LateAdapter", "MaskDecay", "Permuted", "Sparsity",
           "StructureDecay", "Unstructured"]
