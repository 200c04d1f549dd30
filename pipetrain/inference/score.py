"""How good translations are: BLEU and chrF of sacrebleu, with its signatures and confidence intervals."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

_RESAMPLES = 1000
# Scripts that put no spaces between words: sacrebleu's own tokenizer for Chinese, single characters for the others.
_CHARACTERS = ("ja", "ko", "km", "lo", "my", "th", "bo", "dz")


@dataclass(frozen=True)
class Score:
    """Of one corpus, 0 to 100.

    Attributes:
        plus_minus: half of the 95 % confidence interval, by bootstrap resampling.
        signature: all that the number depends on.
    """

    value: float
    plus_minus: float
    signature: str


def bleu(translations: Sequence[str], references: Sequence[str], language: str) -> Score:
    """
    Args:
        language: of the references; how words are told apart depends on it.
    """
    base = language.replace("_", "-").split("-")[0].lower()
    tokenize = "zh" if base == "zh" else "char" if base in _CHARACTERS else "13a"
    return _score(BLEU(tokenize=tokenize), translations, references)


def chrf(translations: Sequence[str], references: Sequence[str]) -> Score:
    return _score(CHRF(), translations, references)


def _score(metric: BLEU | CHRF, translations: Sequence[str], references: Sequence[str]) -> Score:
    result = metric.corpus_score(translations, [references], n_bootstrap=_RESAMPLES)
    signature = metric.get_signature().format()
    facts = json.loads(result.format(signature=signature, is_json=True))
    plus_minus = facts.get("confidence_var", 0.0)  # it says nothing of a score of zero
    return Score(result.score, plus_minus, f"{result.name}|{signature}")
