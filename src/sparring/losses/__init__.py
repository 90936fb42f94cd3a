"""The losses: pure functions, tensors in, tensors out. Nothing here knows a model, a batch or a file.

contrastive.py holds the supervised losses, adversarial.py AR2's retriever step, distillation.py RocketQAv2's joint
loss, duet.py Duet's two steps, diagnose.py what to log beside them, terms.py what they share.
"""

from sparring.losses.adversarial import ar2, reward
from sparring.losses.contrastive import in_batch, known_positive_mask, list_softmax
from sparring.losses.diagnose import diagnostics
from sparring.losses.distillation import rocketqav2, static
from sparring.losses.duet import complement, follow
from sparring.losses.terms import Terms

__all__ = [
    "Terms",
    "ar2",
    "complement",
    "diagnostics",
    "follow",
    "in_batch",
    "known_positive_mask",
    "list_softmax",
    "reward",
    "rocketqav2",
    "static",
]
