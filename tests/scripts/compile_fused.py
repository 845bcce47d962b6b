"""Compiles the fused kernel for CUDA architectures, in every combination of its options. Needs no CUDA device."""

import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from composer_ema.kernels import fused, fused_kernel
from composer_ema.kernels.rules import FIRST_PIECE_OF_BUFFERS, GROUP, PHILOX_ROUNDS, PIECE

SIGNATURE = {'table': '*i64', 'weights': '*fp32', 'control': '*i64', 'skipped': '*i64'}


def main(architecture: int) -> None:
    count = 0
    for averages, source, shadow, guard, stochastic, copies, mends, aligned, compensated in itertools.product(
        (1, 2), (0, 1, 2, -1), (0, 1, -1), *[(False, True)] * 6
    ):
        options = {
            'K': averages, 'SOURCE': source, 'SHADOW': shadow, 'GUARD': guard, 'STOCHASTIC': stochastic,
            'COPIES': copies, 'MENDS': mends, 'ALIGNED': aligned, 'PIECE': PIECE, 'ROUNDS': PHILOX_ROUNDS,
            'COMPENSATED': compensated, 'FIRST': FIRST_PIECE_OF_BUFFERS if stochastic else 0,
        }  # fmt: skip
        if (stochastic and shadow == 0) or (averages == 2 and (source, shadow) != (-1, -1)):
            continue
        if (copies or mends) and (source, shadow) not in ((0, 0), (-1, -1)):
            continue
        if mends and (stochastic or not copies or not aligned):  # which stand for the others
            continue
        if compensated and (stochastic or copies != mends or not aligned or source > 0):  # likewise
            continue
        num_warps = fused._NUM_WARPS_DRAWING if stochastic else fused._NUM_WARPS
        signature = SIGNATURE | dict.fromkeys(options, 'constexpr')
        compiled = triton.compile(
            ASTSource(fused_kernel.update, signature, constexprs=options),
            target=GPUTarget('cuda', architecture, 32),
            options={'num_warps': num_warps},
        )
        assert len(compiled.asm['cubin']) > 0
        # Whole, aligned pieces are read and written four float32 at a time.
        if aligned and source == 0 and shadow == 0:
            assert 'ld.global.v4' in compiled.asm['ptx'], options
            assert 'st.global.v4' in compiled.asm['ptx'], options
            # No load waits behind the barrier of a sum: that took an H100 a fifth of the time of an update.
            if guard and not copies:  # copies have barriers of their own
                assert compiled.asm['ptx'].rindex('ld.global.v4') < compiled.asm['ptx'].index('bar.sync'), options
        # No warp of a program may read the counter after the program has raised it.
        if stochastic:
            assert 0 < compiled.asm['ptx'].rfind('bar.sync') < compiled.asm['ptx'].rindex('atom.global'), options
        # Each call of Philox serves a group of elements, once in whole pieces and once in others.
        if stochastic and averages == 1 and shadow == 1:
            calls = 2 * PIECE // GROUP // (32 * num_warps)
            assert compiled.asm['ptx'].count('mul.hi.u32') <= calls * 2 * PHILOX_ROUNDS, options
        count += 1
    print(f'{count} variants compiled for sm_{architecture} by Triton {triton.__version__}')


if __name__ == '__main__':
    main(int(sys.argv[1]))
