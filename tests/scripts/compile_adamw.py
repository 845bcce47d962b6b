"""Compiles the kernel of benchmarks/adamw_kernel.py for a CUDA architecture. Needs no CUDA device."""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import adamw_kernel

SCALARS = ('shrinkage', 'share_1', 'share_2', 'step_size', 'correction', 'eps', 'share')
# Vectors of four float32 that a thread reads of each tensor.
VECTORS = adamw_kernel.PIECE // (adamw_kernel.NUM_WARPS * 32 * 4)


def main(architecture: int) -> None:
    for averages in (False, True):
        options = {'AVERAGES': averages, 'PIECE': adamw_kernel.PIECE}
        signature = {'table': '*i64', **dict.fromkeys(SCALARS, 'fp32'), **dict.fromkeys(options, 'constexpr')}
        compiled = triton.compile(
            ASTSource(adamw_kernel.step, signature, constexprs=options),
            target=GPUTarget('cuda', architecture, 32),
            options={'num_warps': adamw_kernel.NUM_WARPS},
        )
        # Each whole piece is read and written four float32 at a time.
        loads, stores = (compiled.asm['ptx'].count(f'{access}.global.v4') for access in ('ld', 'st'))
        assert (loads, stores) == ((5 if averages else 4) * VECTORS, (4 if averages else 3) * VECTORS), (loads, stores)
    print(f'compiled for sm_{architecture} by Triton {triton.__version__}')


if __name__ == '__main__':
    main(int(sys.argv[1]))
