"""Which saved average each average of a run continues from, where a checkpoint has other labels than the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Continuation:
    """What becomes of the averages of a checkpoint.

    Args:
        sources: label in the run to label in the checkpoint. What is not here starts at the weights.
        remark: a sentence for the user; empty where every label continues under its own name and none is left over.
    """

    sources: dict[str, str]
    remark: str


def continued(
    saved: Mapping[str, str],
    wanted: Mapping[str, str],
    what: str,
    *,
    to_start_anew: str = "pass load_ignore_keys=['state/algorithms'] to the Trainer",
) -> Continuation:
    """Finds for each average of a run the saved one that it continues from.

    That is the one of the same label; else one with the same profile that no label claims; else the only one saved. If
    at least one average continues, those that are new start at the weights. Saved ones that nobody continues are
    dropped.

    Args:
        saved: label to profile, of the averages in the checkpoint; at least one.
        wanted: likewise, of those in the run.
        what: the state, in the words of an error.
        to_start_anew: how a user loads the rest without the averages, in words. Default: by the Trainer.

    Raises:
        ValueError: none of the wanted ones continues from any of the saved ones.

    Example:
        >>> continued({'ema': 'half_life=1ep'}, {'short': 'half_life=9ba', 'long': 'half_life=1ep'}, 'it').sources
        {'long': 'ema', 'short': 'ema'}
    """
    sources = {label: label for label in wanted if label in saved}
    for label, profile in wanted.items():
        if label not in sources:
            free = [each for each in saved if each not in sources.values() and saved[each] == profile]
            if free:
                sources[label] = free[0]
    if len(saved) == 1:
        sources |= {label: next(iter(saved)) for label in wanted if label not in sources}
    if not sources:
        raise ValueError(
            f'{what} holds the averages {_listed(saved)}, and this run keeps {_listed(wanted)}: neither labels nor '
            f'profiles agree. Label the average as the one to continue from, as in half_life={{{next(iter(saved))!r}: '
            f'...}}. To start a new average {to_start_anew}.'
        )
    return Continuation(sources, _remark(saved, wanted, sources))


def _remark(saved: Mapping[str, str], wanted: Mapping[str, str], sources: Mapping[str, str]) -> str:
    if wanted.keys() == saved.keys():
        return ''
    parts = []
    for label, profile in wanted.items():
        source = sources.get(label)
        if source is None:
            parts.append(f'{label!r} ({profile}) is new and starts at the weights')
        elif source != label:
            parts.append(f'{label!r} ({profile}) continues from {source!r}')
        elif saved[label] != profile:
            parts.append(f'{label!r} continues with {profile}')
    parts += [f'{label!r} is not kept any longer' for label in saved if label not in sources.values()]
    return f'the checkpoint holds the averages {_listed(saved)}: {", ".join(parts)}.'


def _listed(profiles: Mapping[str, str]) -> str:
    return ', '.join(f'{label!r} ({profile})' for label, profile in profiles.items())
