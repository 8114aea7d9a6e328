"""Compile every kernel for cards that are not here, and print what came out as JSON.

Run in a process of its own without TRITON_INTERPRET: there kernels are compiled, not interpreted.
"""

import json
import re
import sys
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from thinslice.kernels import triton_attention, triton_elementwise, triton_linear
from thinslice.plan.packed_format import PackedFormat

KINDS = ("fp32", "bf16")
Case = tuple[str, triton.JITFunction, dict[str, str], dict[str, object], int]


def cases() -> Iterator[Case]:
    """Name, kernel, types of the arguments, constants and warps of each."""
    for kind in KINDS:
        for fmt in PackedFormat:
            formats = triton_linear.constants_of(fmt)
            types = linear_types(kind)
            for rows in (1, 2, 4):
                sizes = triton_linear.rows_constants(rows)
                name = f"linear_rows {fmt} {kind} {rows}"
                yield name, triton_linear.linear_rows, types, {**sizes, **formats}, 8
            sizes = {"ROWS": 64, "COLUMNS": 64, **formats}
            yield f"linear_tiles {fmt} {kind}", triton_linear.linear_tiles, types, sizes, 4
        yield f"norm_rows {kind}", *norm(kind), 4
        yield f"rotate_heads {kind}", *rotary(kind), 1
        for cache in KINDS:
            yield f"attend_split {kind} {cache}", *attention(kind, cache), 4
        yield f"join_splits {kind}", *joining(kind), 1


def linear_types(kind: str) -> dict[str, str]:
    names = ("x", "bias", "residual", "out")
    counts = ("num_rows", "num_out", "num_in", "residual_stride", "out_stride", "panel_words")
    types = {f"{name}_ptr": f"*{kind}" for name in names}
    types |= {"words_ptr": "*i32", "halves_ptr": "*fp16"}
    return types | dict.fromkeys(counts, "i32")


def norm(kind: str) -> tuple[triton.JITFunction, dict[str, str], dict[str, object]]:
    types = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), f"*{kind}")
    return triton_elementwise.norm_rows, types | {"size": "i32", "eps": "fp32"}, {"SIZE": 4096}


def rotary(kind: str) -> tuple[triton.JITFunction, dict[str, str], dict[str, object]]:
    types = {"x_ptr": f"*{kind}", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "num_heads": "i32"}
    return triton_elementwise.rotate_heads, types, {"HALF": 64, "IDX": 64}


def attention(
    kind: str, cache: str
) -> tuple[triton.JITFunction, dict[str, str], dict[str, object]]:
    types = {"q_ptr": f"*{kind}", "k_ptr": f"*{cache}", "v_ptr": f"*{cache}", "rows_ptr": "*i64"}
    types |= dict.fromkeys(("part_ptr", "top_ptr", "total_ptr"), "*fp32")
    types |= dict.fromkeys(("sequences_ptr", "lengths_ptr", "tables_ptr"), "*i32")
    types |= dict.fromkeys(("table_stride", "num_splits", "window"), "i32") | {"scale": "fp32"}
    sizes = {"NUM_KV": 8, "HEADS_PER_KV": 4, "HEADS": 16, "HEAD_DIM": 128, "DIMS": 128}
    return triton_attention.attend_split, types, {**sizes, "BLOCK_SIZE": 16, **splits()}


def splits() -> dict[str, object]:
    return {"SPLIT_SIZE": triton_attention.SPLIT, "TILE": triton_attention.TILE}


def joining(kind: str) -> tuple[triton.JITFunction, dict[str, str], dict[str, object]]:
    types = dict.fromkeys(("part_ptr", "top_ptr", "total_ptr"), "*fp32")
    types |= {"out_ptr": f"*{kind}", "rows_ptr": "*i64", "lengths_ptr": "*i32", "num_splits": "i32"}
    sizes = {"NUM_HEADS": 32, "HEAD_DIM": 128, "DIMS": 128, "SPLIT_SIZE": triton_attention.SPLIT}
    return triton_attention.join_splits, types, sizes


def compiled(case: Case, capability: int) -> dict[str, object]:
    """Bytes of code, shared memory, and the layouts that sums are taken in."""
    _, kernel, types, constants, warps = case
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # As at run time: addresses and sizes are multiples of 16, but for these.
    odd = {"num_rows", "num_out", "num_heads", "num_splits", "table_stride", "window"}
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if name not in odd and kind != "fp32"
    }
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    result = triton.compile(source, target=target, options={"num_warps": warps})
    text = result.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", text, re.MULTILINE))
    used = set(re.findall(r"\}\) : \(tensor<[^>]*, (#\w+)>\) ->", text))
    return {
        "code_bytes": len(result.asm["cubin"]),
        "shared_bytes": result.metadata.shared,
        "reduced_in": sorted(layouts[name] for name in used if name in layouts),
    }


if __name__ == "__main__":
    report = {
        f"sm_{capability} {case[0]}": compiled(case, capability)
        for capability in (int(one) for one in sys.argv[1:])
        for case in cases()
    }
    print(json.dumps(report))
