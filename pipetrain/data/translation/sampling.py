"""How often each language is seen: in proportion to the number of its pairs to a power below one.

p ~ n^S, S = 0.7 in multilingual BERT, whose sampling Huang et al. 2019, section 5, use: languages with few pairs are
seen more often than they would be, without the many being lost.
"""

from collections.abc import Mapping


def quotas(counts: Mapping[str, int], power: float) -> dict[str, int]:
    """Pairs of each language in an epoch, which has as many as there are in all: at least one of each.

    >>> quotas({"de": 900, "om": 100}, 1.0), quotas({"de": 900, "om": 100}, 0.5)
    ({'de': 900, 'om': 100}, {'de': 750, 'om': 250})
    """
    weights = {language: float(count) ** power for language, count in counts.items() if count}
    total, whole = sum(weights.values()), sum(counts.values())
    return {language: max(1, round(whole * weight / total)) for language, weight in weights.items()}
