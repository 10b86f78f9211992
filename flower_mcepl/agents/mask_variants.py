"""The ablations of the paper (arXiv:2504.17520): MCE-PL with one parameter fixed."""

from dataclasses import replace

from flower_mcepl.agents.mcepl import MCEPL

# No fine-tuning step: the neighbors' masks count in the aggregation tensor alone.
NO_FINETUNING = replace(MCEPL, fixed={"finetune_lr": 0.0})

# Masks trained alone, in whatever graph: y = z, and nothing is sent.
LOCAL_MASKS = replace(MCEPL, fixed={"fusion": "none"})

# Direct averaging: the network lives under the mean of its own and its neighbors'
# masks, m̄_i = (m_i + Σ_{j in N_i} m_j) / (1 + |N_i|), in training and evaluation,
# where m_i is the top-k mask of |z_i| alone and what travels. The density is the share
# of weights with m̄ > 0. All else is MCE-PL, the fine-tuning step included. The gradient
# passes the mean as if it were the agent's own mask, g = ∂CE/∂(w * m̄) * w * sign(z):
# the chain rule's 1 / (1 + |N_i|) is left out, which would only make the step size
# depend on the number of neighbors.
MASK_AVERAGING = replace(MCEPL, fixed={"fusion": "mask-averaging"})
