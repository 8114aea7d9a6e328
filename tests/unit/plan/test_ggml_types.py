"""The table of types is that of the llama.cpp project's own package."""

from gguf.constants import GGML_QUANT_SIZES

from thinslice.plan.ggml_types import BY_NAME, BY_NUMBER


def test_numbers_names_and_sizes_are_those_of_the_package() -> None:
    found = {n: (one.name, one.block_size, one.block_bytes) for n, one in BY_NUMBER.items()}
    assert found == {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}
    assert all(BY_NAME[one.name] is one for one in BY_NUMBER.values())
