"""The reference backend: the formula in float64, written like the equation. The fast backends are tested against it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from composer_ema.kernels.backend import Steps
from composer_ema.kernels.layout import Pair, flat
from composer_ema.kernels.rules import GROUP, PHILOX_ROUNDS, PIECE, Rules


def average(shadow: Tensor, source: Tensor, weight: float) -> Tensor:
    """Returns ``shadow + weight * (source - shadow)`` in float64, or complex128 for complex tensors.

    A weight of 0 returns the shadow and 1 the source, even where the other is not finite.
    """
    wide = torch.complex128 if shadow.is_complex() else torch.float64
    old, new = shadow.to(wide), source.detach().to(device=shadow.device, dtype=wide)
    if weight in (0, 1):
        return new if weight else old
    return old + weight * (new - old)


def refusal_of_device(device: torch.device, *, is_asked: bool) -> str | None:
    """The reference runs on every device."""
    del device, is_asked
    return None


def refusal(shadow: Tensor, source: Tensor, rules: Rules) -> str | None:
    """The reference averages every pair."""
    del shadow, source, rules
    return None


def refusal_to_copy(copy: Tensor, source: Tensor) -> str | None:
    """The reference copies every pair."""
    del copy, source
    return None


def keeps_address(shadow: Tensor, source: Tensor) -> bool:
    """A step would follow its source, but a step that is prepared again also has its shapes checked again."""
    del shadow, source
    return True


def prepare(
    shadow_sets: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    rules: Rules,
    copied: Sequence[Pair],
    are_mended: Sequence[bool],
    compensations: Sequence[Sequence[Tensor]] | None,
) -> Steps:
    """Returns a step that averages in float64 and rounds once, into the shadow's dtype."""
    pieces = [-(-source.numel() // PIECE) for source in sources]
    first_pieces = list(itertools.accumulate(pieces, initial=rules.first_piece))[:-1]
    next_step = rules.first_step

    if compensations is None:
        term_sets: Sequence[Sequence[Tensor | None]] = [[None] * len(sources) for _ in shadow_sets]
    else:
        term_sets = compensations

    @torch.no_grad()
    def step(weights: Sequence[float]) -> None:
        nonlocal next_step
        for which, (shadows, terms, weight) in enumerate(zip(shadow_sets, term_sets, weights, strict=True)):
            for shadow, term, source, first_piece, is_mended in zip(
                shadows, terms, sources, first_pieces, are_mended, strict=True
            ):
                old = shadow if term is None else average(shadow, shadow, 0.0) + average(term, term, 0.0)
                new, current = average(old, source, weight), average(shadow, source, 1.0)
                is_copied = torch.full_like(shadow, weight == 1, dtype=torch.bool)
                if is_mended and weight > 0:
                    is_copied |= ~(shadow.isfinite() & current.isfinite())
                    new = torch.where(is_copied, current, new)
                if rules.stochastic and shadow.dtype is torch.bfloat16:
                    new = round_stochastically(new, shadow, rules.seed, first_piece, next_step, which)
                is_kept = torch.full_like(shadow, weight == 0, dtype=torch.bool)
                if rules.skip_nonfinite:
                    is_bad = ~source.detach().isfinite().to(shadow.device)
                    is_kept |= is_bad
                    if rules.skipped is not None and which == 0:
                        rules.skipped.add_(is_bad.sum())
                rounded = torch.where(is_kept, shadow, new.to(shadow.dtype))
                if term is not None:
                    rest = torch.where(is_copied, 0, new - rounded.to(new.dtype))
                    term.copy_(torch.where(is_kept, term.to(rest.dtype), rest))
                shadow.copy_(rounded)
        for copy, source in copied:
            copy.copy_(source)
        next_step += 1

    return step


def round_stochastically(value: Tensor, like: Tensor, seed: int, first_piece: int, step: int, which: int) -> Tensor:
    """Rounds to bfloat16, up or down at random in proportion to the distance.

    Args:
        value: what to round; converted to float32 first.
        like: has the shape of ``value``. Its order in memory is the order in which the bits are counted.
        seed: key of the random bits.
        first_piece: number of the tensor's first piece.
        step: number of the update.
        which: number of the average.

    Returns:
        float32 values that bfloat16 holds exactly, in the shape of ``value``.
    """
    groups = torch.arange(-(-value.numel() // GROUP), device=value.device)
    in_piece = PIECE // GROUP
    words = philox(seed, groups % in_piece, first_piece + groups // in_piece, step, which)
    random = torch.stack([words & 0xFFFF, words >> 16], 1).flatten(0, 1).T.reshape(-1)[: value.numel()]
    in_shape = torch.empty_like(like, dtype=torch.int64)
    in_memory = flat(in_shape)
    assert in_memory is not None
    in_memory.copy_(random)
    single = value.to(torch.float32)
    bits = single.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = ((bits + in_shape) & 0xFFFF0000).to(torch.uint32).view(torch.float32)
    return torch.where(single.abs() <= torch.finfo(torch.bfloat16).max, rounded, single)


def philox(seed: int, group: Tensor, piece: Tensor, step: int, which: int) -> Tensor:
    """Returns the four words of Philox4x32 (Salmon et al. 2011, section 3.3) along dimension 0, as int64 in [0, 2**32).

    The counter is (group, piece, step, which). The key is the lower and the upper half of ``seed``.
    """
    word = 0xFFFFFFFF
    c0, c1 = group & word, piece & word
    c2, c3 = torch.full_like(c0, step & word), torch.full_like(c0, which & word)
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(PHILOX_ROUNDS):
        high_a, low_a = _multiply(0xD2511F53, c0)
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return torch.stack([c0, c1, c2, c3])


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the upper and lower 32 bits of the product of two 32-bit words, by arithmetic in signed int64."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
