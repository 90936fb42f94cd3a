"""Flip a sign, change a reduction, drop a detach: something must fail.

Each mutation is an edit of the losses' source. The edited modules are executed and given to the checks that the real
losses pass; a mutant that passes them too is a hole in the tests.
"""

from __future__ import annotations

import inspect
import re
from types import ModuleType, SimpleNamespace
from typing import Any

import loss_checks as checks
import pytest

from sparring.losses import adversarial, contrastive, diagnose, distillation, terms

# Each: its name, what it replaces (occurs exactly once in the module), and by what.
MUTATIONS: dict[ModuleType, list[tuple[str, str, str]]] = {
    adversarial: [
        ("reward: sign", "ranker[:, :1] - ranker)", "ranker - ranker[:, :1])"),
        ("reward: positive is the last column", "ranker[:, :1] - ranker)", "ranker[:, -1:] - ranker)"),
        ("adversarial: reward not detached", "r = reward(ranker.detach())", "r = reward(ranker)"),
        ("paper: sign", "return (p * r[:, 1:]).sum()", "return -(p * r[:, 1:]).sum()"),
        (
            "paper: sum over queries",
            '.sum() / denominator(retriever, queries)\n        case "off',
            '.sum()\n        case "off',
        ),
        (
            "paper: support includes the positive",
            "p = retriever[:, 1:].softmax(dim=1)",
            "p = retriever.softmax(dim=1)[:, 1:]",
        ),
        ("paper: log p instead of p", "retriever[:, 1:].softmax(dim=1)", "retriever[:, 1:].log_softmax(dim=1)"),
        ("official: sign", "return (r * (retriever.softmax", "return -(r * (retriever.softmax"),
        ("official: mean over queries", "OFFICIAL_EPS).log()).sum()", "OFFICIAL_EPS).log()).sum() / len(r)"),
        ("official: without the positive", "OFFICIAL_EPS).log()).sum()", "OFFICIAL_EPS).log())[:, 1:].sum()"),
        ("official: eps gone", "OFFICIAL_EPS = 1e-7", "OFFICIAL_EPS = 0.0"),
        ("official: another eps", "OFFICIAL_EPS = 1e-7", "OFFICIAL_EPS = 1e-8"),
        (
            "official: log-softmax in the adversarial term",
            "(r * (retriever.softmax(dim=1) + OFFICIAL_EPS).log())",
            "(r * retriever.log_softmax(dim=1))",
        ),
        (
            "official: log-softmax in the distillation term",
            "= (retriever.softmax(dim=1) + OFFICIAL_EPS).log()",
            "= retriever.log_softmax(dim=1)",
        ),
        ("mean: sign", "(r * retriever.log_softmax(dim=1))", "-(r * retriever.log_softmax(dim=1))"),
        (
            "mean: sum over queries",
            "log_softmax(dim=1)).sum() / denominator(retriever, queries)",
            "log_softmax(dim=1)).sum()",
        ),
        (
            "mean: eps back in",
            "return (r * retriever.log_softmax(dim=1))",
            "return (r * (retriever.softmax(dim=1) + 1e-7).log())",
        ),
        ("mean: weighted by p", "return (r * retriever.log_softmax(dim=1))", "return (r * retriever.softmax(dim=1))"),
        (
            "mean distillation: eps back in",
            "            log_p = retriever.log_softmax(dim=1)",
            "            log_p = (retriever.softmax(dim=1) + 1e-7).log()",
        ),
        ("distillation: sign", "return -(target * log_p)", "return (target * log_p)"),
        (
            "distillation: sum over queries",
            "(target * log_p).sum() / denominator(retriever, queries)",
            "(target * log_p).sum()",
        ),
        (
            "distillation: mean over elements",
            "return -(target * log_p).sum()",
            "return -(target * log_p).mean(dim=1).sum()",
        ),
        (
            "distillation: teacher not detached",
            "target = (ranker.detach() / temperature)",
            "target = (ranker / temperature)",
        ),
        ("distillation: no temperature", "target = (ranker.detach() / temperature)", "target = (ranker.detach())"),
        (
            "distillation: temperature multiplies",
            "target = (ranker.detach() / temperature)",
            "target = (ranker.detach() * temperature)",
        ),
        ("distillation: roles swapped", "return -(target * log_p)", "return -(log_p.exp() * target.log())"),
        ("paper: temperature on the teacher only", 'if variant == "paper":', "if False:"),
        ("mean: temperature on every logit", 'if variant == "paper":', "if True:"),
        (
            "paper: temperature not on the ranker",
            "retriever / temperature, ranker / temperature, 1.0",
            "retriever / temperature, ranker, 1.0",
        ),
        (
            "lambda: swapped",
            "adv_lambda * adv + (1 - adv_lambda) * normal",
            "adv_lambda * normal + (1 - adv_lambda) * adv",
        ),
        ("lambda: distillation unweighted", "+ (1 - adv_lambda) * normal", "+ normal"),
        ("lambda: terms subtracted", "adv_lambda * adv + (1", "-adv_lambda * adv + (1"),
        (
            "queries: not given to the adversarial term",
            "adv = adversarial(retriever, ranker, variant, queries)",
            "adv = adversarial(retriever, ranker, variant)",
        ),
        (
            "queries: not given to distillation",
            "variant, temperature, queries)\n    total",
            "variant, temperature)\n    total",
        ),
        ("parts: weighted", '"adversarial": adv.detach()', '"adversarial": adv_lambda * adv.detach()'),
        ("parts: not detached", '"distillation": normal.detach()', '"distillation": normal'),
    ],
    distillation: [
        ("paper: direction", 'PAPER = KLChoice("de_ce"', 'PAPER = KLChoice("ce_de"'),
        ("paper: teacher detached", 'PAPER = KLChoice("de_ce", False', 'PAPER = KLChoice("de_ce", True'),
        ("paper: mean over queries", '"de_ce", False, "sum")', '"de_ce", False, "query_mean")'),
        ("official: direction", 'OFFICIAL = KLChoice("ce_de"', 'OFFICIAL = KLChoice("de_ce"'),
        ("official: target not detached", 'OFFICIAL = KLChoice("ce_de", True', 'OFFICIAL = KLChoice("ce_de", False'),
        ("official: batchmean", '"ce_de", True, "element_mean")', '"ce_de", True, "query_mean")'),
        ("kl: detach dropped", "(ranker.detach() if detach_teacher else ranker)", "ranker"),
        ("kl: detach always", "(ranker.detach() if detach_teacher else ranker)", "ranker.detach()"),
        ("kl: student detached", "de = retriever.log_softmax(dim=1)", "de = retriever.detach().log_softmax(dim=1)"),
        ("kl: de_ce sign", "(de.exp() * (de - ce))", "(de.exp() * (ce - de))"),
        ("kl: de_ce weighted by the other", "(de.exp() * (de - ce))", "(ce.exp() * (de - ce))"),
        ("kl: ce_de sign", "(ce.exp() * (ce - de))", "(ce.exp() * (de - ce))"),
        ("kl: ce_de cross-entropy only", "(ce.exp() * (ce - de))", "(ce.exp() * -de)"),
        ("kl: weights detached", "(de.exp() * (de - ce))", "(de.exp().detach() * (de - ce))"),
        (
            "kl: query_mean forgets queries",
            "return total / denominator(retriever, queries)\n",
            "return total / len(retriever)\n",
        ),
        (
            "kl: element_mean without n",
            "(denominator(retriever, queries) * retriever.shape[1])",
            "denominator(retriever, queries)",
        ),
        (
            "kl: element_mean forgets queries",
            "(denominator(retriever, queries) * retriever.shape[1])",
            "(len(retriever) * retriever.shape[1])",
        ),
        (
            "kl: sum becomes mean",
            "            return total\n",
            "            return total / denominator(retriever, queries)\n",
        ),
        (
            "rocketqav2: supervised on the retriever",
            "labelled = list_softmax(ranker, queries=queries)",
            "labelled = list_softmax(retriever, queries=queries)",
        ),
        (
            "rocketqav2: supervised forgets queries",
            "labelled = list_softmax(ranker, queries=queries)",
            "labelled = list_softmax(ranker)",
        ),
        ("rocketqav2: supervised subtracted", "Terms(divergence + labelled", "Terms(divergence - labelled"),
        ("rocketqav2: supervised detached", "Terms(divergence + labelled,", "Terms(divergence + labelled.detach(),"),
        ("pointwise: positive's sign", "logsigmoid(ranker[:, 0])", "logsigmoid(-ranker[:, 0])"),
        ("pointwise: negatives' sign", "logsigmoid(-ranker[:, 1:])", "logsigmoid(ranker[:, 1:])"),
        (
            "pointwise: mean over queries only",
            "pairs = denominator(ranker, queries) * ranker.shape[1]",
            "pairs = denominator(ranker, queries)",
        ),
        ("static: detach dropped", "        ranker.detach(),\n", "        ranker,\n"),
        ("static: supervised term left in", 'supervised="none",', 'supervised="listwise",'),
    ],
    contrastive: [
        ("list_softmax: sign", "return -scores.log_softmax(dim=1)[:, 0]", "return scores.log_softmax(dim=1)[:, 0]"),
        ("list_softmax: last column", "scores.log_softmax(dim=1)[:, 0]", "scores.log_softmax(dim=1)[:, -1]"),
        ("list_softmax: over queries", "-scores.log_softmax(dim=1)", "-scores.log_softmax(dim=0)"),
        ("list_softmax: sum", "[:, 0].sum() / denominator(scores, queries)", "[:, 0].sum()"),
        ("list_softmax: valid ignored", 'scores.masked_fill(~valid, float("-inf"))', "scores"),
        ("list_softmax: valid inverted", "masked_fill(~valid,", "masked_fill(valid,"),
        ("in_batch: mask ignored", 'scores.masked_fill(masked, float("-inf"))', "scores"),
        (
            "in_batch: masked scores become 0",
            'scores.masked_fill(masked, float("-inf"))',
            "scores.masked_fill(masked, 0.0)",
        ),
        ("in_batch: the positive can be masked", "    masked = masked.scatter(1, labelled, False)\n", ""),
        ("in_batch: sign", "return -log_p.gather", "return log_p.gather"),
        (
            "in_batch: sum",
            "log_p.gather(1, labelled).sum() / denominator(scores, queries)",
            "log_p.gather(1, labelled).sum()",
        ),
        ("mask: duplicates stay", "(first[inverse] != columns) | (groups < 0)", "groups < 0"),
        (
            "mask: last of the duplicates stays",
            'len(groups)).scatter_reduce(0, inverse, columns, "amin")',
            '-1).scatter_reduce(0, inverse, columns, "amax")',
        ),
        ("mask: padding stays", " | (groups < 0)", ""),
        (
            "mask: repeats of the label stay",
            "never | (groups == groups[positive][:, None])",
            "never.expand(len(positive), -1)",
        ),
        ("mask: other positives stay", "masked = masked | (groups == known[:, None])", "pass"),
        ("mask: the label is masked", "return masked.scatter(1, positive[:, None], False)", "return masked"),
    ],
    terms: [
        ("widen: stays narrow", "scores if scores.dtype == torch.float64 else scores.float()", "scores"),
        ("widen: float64 lost", "scores if scores.dtype == torch.float64 else scores.float()", "scores.float()"),
        ("denominator: queries ignored", "scores.shape[0] if queries is None else queries", "scores.shape[0]"),
        ("denominator: passages", "scores.shape[0] if queries", "scores.shape[1] if queries"),
        (
            "pair: ranker for retriever",
            "return widen(retriever), widen(ranker)",
            "return widen(ranker), widen(retriever)",
        ),
    ],
    diagnose: [
        ("entropy: sign", "-(log_p.exp() * log_p).sum(dim=1)", "(log_p.exp() * log_p).sum(dim=1)"),
        (
            "entropy: negatives only",
            "log_p = retriever.log_softmax(dim=1)",
            "log_p = retriever[:, 1:].log_softmax(dim=1)",
        ),
        ("reward: with the positive", "reward(ranker)[:, 1:]", "reward(ranker)"),
        ("ranker's share: a tie counts", "ranker[:, 1:].amax(dim=1) > ranker", "ranker[:, 1:].amax(dim=1) >= ranker"),
        (
            "retriever's share: a tie counts",
            "retriever[:, 1:].amax(dim=1) > retriever",
            "retriever[:, 1:].amax(dim=1) >= retriever",
        ),
        (
            "retriever's share: the ranker's",
            "(retriever[:, 1:].amax(dim=1) > retriever[:, 0])",
            "(ranker[:, 1:].amax(dim=1) > ranker[:, 0])",
        ),
        ("diagnostics: mean forgets queries", "values.sum() / denominator(retriever, queries)", "values.mean()"),
        ("diagnostics: gradient left on", "@torch.no_grad()\n", ""),
    ],
}


CASES = [
    pytest.param(module, old, new, id=f"{module.__name__.rpartition('.')[2]}: {name}")
    for module, mutations in MUTATIONS.items()
    for name, old, new in mutations
]


def load(edited: ModuleType | None = None, old: str = "", new: str = "") -> Any:
    """The losses from their source, one module of it edited, in one namespace."""
    names: dict[str, Any] = {"__name__": "mutated_losses"}
    for module in (terms, contrastive, adversarial, distillation, diagnose):
        source = inspect.getsource(module)
        if module is edited:
            assert source.count(old) == 1, f"the mutation no longer fits the source: {old!r}"
            source = source.replace(old, new)
        own_imports_removed = re.sub(r"(?m)^from sparring\.losses\.\w+ import .+$", "", source)
        exec(compile(own_imports_removed, f"<mutant of {module.__name__}>", "exec"), names)
    return SimpleNamespace(**names)


def test_the_unedited_source_passes() -> None:
    checks.check_all(load())


@pytest.mark.parametrize(("module", "old", "new"), CASES)
def test_mutant_is_killed(module: ModuleType, old: str, new: str) -> None:
    mutant = load(module, old, new)
    with pytest.raises(AssertionError):
        checks.check_all(mutant)
