"""What an answer is worth besides being right (`colora.rewards.match:exact_match` sees to that)."""

import re
from collections import Counter
from collections.abc import Sequence

from colora.rewards.format import XmlSections
from colora.rewards.text import Completion, completion_text

form = XmlSections(["facts", "work", "answer"])


def found_facts(completions: Sequence[Completion], evidence: Sequence[Sequence[str]], **_: object) -> list[float]:
    """Partial credit, from 0 to 1: how many of the needed numbers stand between <facts> and </facts>.

    hits / max(needed, quoted): to copy every number of the document earns little, nor does one number said twice.
    """
    scores = []
    for completion, needed in zip(completions, evidence, strict=True):
        section = re.search(r"<facts>(.*?)</facts>", completion_text(completion), re.DOTALL)
        quoted = Counter(re.findall(r"\d+", section[1] if section else ""))
        hits = (Counter(needed) & quoted).total()
        scores.append(hits / max(len(needed), quoted.total()))
    return scores
