"""The BLEU to publish: sacrebleu's own, with the signature that says how it was computed."""

from collections.abc import Sequence

from torch import distributed

from nmlightning.text.text_packages import import_text_package

Translation = tuple[str, str]  # as it was found, and the reference


def published_bleu(translations: Sequence[Translation]) -> str:
    """Return `BLEU 27.31 (nrefs:1|case:mixed|…)` of the translations of all processes.

    Args:
        translations: this process's, detokenized.

    Raises:
        InputError: sacrebleu is not installed.

    Source: Post (2018), https://aclanthology.org/W18-6319.
    """
    sacrebleu = import_text_package("sacrebleu")
    everywhere = [pair for part in _gather(translations) for pair in part]
    found, references = zip(*everywhere, strict=True)
    bleu = sacrebleu.BLEU()
    score = bleu.corpus_score(list(found), [list(references)]).score
    return f"BLEU {score:.2f} ({bleu.get_signature()})"


def _gather(translations: Sequence[Translation]) -> list[Sequence[Translation]]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [translations]
    parts: list[Sequence[Translation]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, list(translations))
    return parts
