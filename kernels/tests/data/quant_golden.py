"""Writes quant_golden.txt: random blocks of every format and their values by the `gguf` package.

    python quant_golden.py > quant_golden.txt      (gguf 0.17 or later, numpy)

A line: the format, the blocks' bytes in hex, the values as the hex of little-endian f32. Scales are
finite; everything else is random bytes.
"""

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize

# Offsets of the f16 scales in a block.
HALVES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108],
    T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.IQ4_NL: [0], T.IQ4_XS: [0], T.MXFP4: [],
}

rng = np.random.default_rng(4)
for kind, halves in HALVES.items():
    block_len, block_bytes = GGML_QUANT_SIZES[kind]
    count = 3 if block_len == 32 else 1
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    for at in halves:
        scales = rng.normal(0, 0.1, count).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(count, 2)
    if kind == T.MXFP4:
        blocks[:, 0] = [0, 1, 120]
    values = dequantize(blocks, kind).astype("<f4")
    print(kind.name, blocks.tobytes().hex(), values.tobytes().hex())
