"""Several prediction layers: each drafts one token, from the output of the layer before.

Source of the arithmetic: arXiv 2412.19437, section 2.2, in MiMo's order of the halves. Row p of
layer k pairs the output of layer k - 1 at p with the embedding of token p + 1 + k.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.arrays import array_of
from tests.engines import resident_weights, run_all
from tests.numerics.test_drafting import (
    MODES,
    PROMPTS,
    Loaded,
    add_all,
    load,
    plan_of,
    rows_are_right,
    streamed,
    texts,
)
from tests.numerics.test_mtp import TINY, Tensors, plain_mtp
from tests.speculation import SMALL_MTP
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import SamplingParams
from thinslice.engine.draft_length import DraftLength
from thinslice.engine.mtp_drafter import CertainRows, MTPDrafter
from thinslice.engine.planning import Model
from thinslice.engine.sequence import Status
from thinslice.kernels.paged_kv import PagedKv
from thinslice.model.decoder import Decoder
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan.case import Workload
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.planner import plan
from thinslice.plan.processor import Processor
from thinslice.plan.tensors import tensors_of
from thinslice.units import GIB

pytestmark = pytest.mark.usefixtures("one_thread")
THREE = replace(TINY, num_nextn_predict_layers=3)
BLOCK_SIZE = 4
Fault = Callable[[MTPDrafter], None]


def random_tensors() -> Tensors:
    torch.manual_seed(3)
    return {one.name: torch.randn(one.shape) * 0.3 for one in tensors_of(THREE)}


def layer_of(tensors: Tensors, index: int) -> Tensors:
    """The weights of one layer under the first one's names."""
    prefix, first = f"model.mtp_layers.{index}.", "model.mtp_layers.0."
    return {first + k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def plain_drafts(tensors: Tensors, hidden: torch.Tensor, ids: list[int]) -> list[int]:
    """Five drafts in float64 from a whole text, each layer over all of it, the last one again over
    its own output."""
    table, head = tensors["model.embed_tokens.weight"].double(), tensors["lm_head.weight"].double()
    tokens, drafts = list(ids), list[int]()
    rows = out = hidden
    for index in range(3):
        rows = out
        tokens = [*tokens[1:], *drafts[-1:]] if drafts else tokens
        out = plain_mtp(layer_of(tensors, index), rows, table[tokens])
        drafts.append(int((out[-1] @ head.T).argmax()))
    for _ in range(2):
        rows, tokens = torch.cat((rows, out[-1:])), [*tokens, drafts[-1]]
        out = plain_mtp(layer_of(tensors, 2), rows, table[tokens])
        drafts.append(int((out[-1] @ head.T).argmax()))
    return drafts


def drafts_in_steps(
    tensors: Tensors, hidden: torch.Tensor, ids: list[int], steps: list[int], fault: Fault | None
) -> list[list[int]]:
    """The drafts after each of the steps, which bring so many rows."""
    size = (8, 2, BLOCK_SIZE, 8)
    nines = np.full(size, 9.0, np.float32)
    caches = [PagedKv(nines.copy(), -nines) for _ in range(3)]
    weights, blocks = resident_weights(THREE, tensors), [5, 2, 7, 0, 1, 3]
    drafter = MTPDrafter(Decoder(THREE), weights, caches)
    if fault is not None:
        fault(drafter)
    drafted, first, stop = [], 0, 0
    for count in steps:
        stop += count
        rows = CertainRows(first, array_of(hidden[first:stop]), ids[first:stop], blocks, 5)
        drafted += drafter.propose([rows])
        first = max(stop - 2, 0)
    return drafted


def case() -> tuple[torch.Tensor, list[int]]:
    torch.manual_seed(5)
    return torch.randn(14, 32), torch.randint(0, 61, (14,)).tolist()


STEPS = [1, 1, 5, 1, 2, 4]


def test_drafts_are_those_of_a_plain_implementation() -> None:
    tensors, (hidden, ids) = random_tensors(), case()
    stops = [sum(STEPS[: i + 1]) for i in range(len(STEPS))]
    expected = [plain_drafts(tensors, hidden[:stop], ids[:stop]) for stop in stops]
    assert drafts_in_steps(tensors, hidden, ids, STEPS, None) == expected


def layers_swapped(drafter: MTPDrafter) -> None:
    caches = [layer.kv_cache for layer in drafter.layers]
    drafter.layers.reverse()
    for layer, cache in zip(drafter.layers, caches, strict=True):
        layer.kv_cache = cache


def one_cache_for_all(drafter: MTPDrafter) -> None:
    for layer in drafter.layers:
        layer.kv_cache = drafter.layers[0].kv_cache


def only_the_first_layer(drafter: MTPDrafter) -> None:
    drafter.layers = drafter.layers[:1]


@pytest.mark.parametrize("fault", [layers_swapped, one_cache_for_all, only_the_first_layer])
def test_faults_are_seen(fault: Fault) -> None:
    tensors, (hidden, ids) = random_tensors(), case()
    expected = drafts_in_steps(tensors, hidden, ids, STEPS, None)
    assert drafts_in_steps(tensors, hidden, ids, STEPS, fault) != expected


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The small trained model with two random layers more."""
    folder: Path = tmp_path_factory.mktemp("three") / "model"
    folder.mkdir()
    for path in SMALL_MTP.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 3}))
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(4)
    for name, value in [*tensors.items()]:
        for index in (1, 2):
            other = name.replace("mtp_layers.0", f"mtp_layers.{index}")
            if other != name:
                tensors[other] = value + 0.01 * torch.randn_like(value)
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    if request.param != "int8":
        return Loaded(checkpoint, request.param)
    pack_model(checkpoint, folder.with_name("int8"), PackOptions(PackedFormat.INT8, "three"))
    return Loaded(open_checkpoint(folder.with_name("int8")), "int8")


@pytest.fixture(scope="module")
def plain(three: Loaded) -> list[list[int]]:
    return texts(load(three, plan_of(three, "off")))


@pytest.fixture
def full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(self: DraftLength, num_drafting: int, num_other_rows: int = 0) -> int:
        return self.max_length if num_drafting else 0

    monkeypatch.setattr(DraftLength, "choose", choose)


@pytest.mark.usefixtures("full_length")
@pytest.mark.parametrize("mode", MODES)
def test_no_mode_changes_a_token(three: Loaded, plain: list[list[int]], mode: str) -> None:
    chosen = plan_of(three, "mtp", **MODES[mode])
    assert chosen.num_mtp_layers == 3
    engine = load(three, chosen)
    assert texts(engine) == plain
    assert engine.metrics.accepted_tokens > 100
    assert (engine.metrics.preemptions > 0) == (mode == "preemption")


@pytest.mark.usefixtures("full_length")
def test_cached_prefixes_change_no_token(three: Loaded, plain: list[list[int]]) -> None:
    engine = load(three, plan_of(three, "mtp", num_kv_blocks=600))
    add_all(engine)
    while engine.has_work:
        engine.step()
        engine.scheduler.blocks.check()
    assert texts(engine) == plain
    assert engine.metrics.prefix_hit_tokens > 500


SHARED = PROMPTS[0][:20] + PROMPTS[1][:12]  # two blocks of sixteen positions


def rows_after_a_hit(model: Loaded, own: list[int], lookahead: int = 3) -> tuple[int, bool]:
    """How much of a text was cached by another, and whether all layers' K and V are its own."""
    engine = load(model, plan_of(model, "mtp"))
    engine.scheduler.blocks.lookahead = lookahead
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add_request([*SHARED, *PROMPTS[2][:9]], params)
    run_all(engine)
    sequence = engine.add_request(own, params)
    for _ in range(4):
        engine.step()
    assert sequence.status is Status.RUNNING
    return sequence.num_cached, rows_are_right(engine, sequence)


@pytest.mark.usefixtures("full_length")
def test_a_block_is_shared_where_all_that_layers_looked_at_is_the_same(three: Loaded) -> None:
    first, second, third, *rest = PROMPTS[2][:9]
    other = (third + 1) % 256
    assert rows_after_a_hit(three, [*SHARED, first, second, other, *rest]) == (16, True)
    assert rows_after_a_hit(three, [*SHARED, first, second, third, *rest]) == (32, True)
    assert rows_after_a_hit(three, [*SHARED, first, second, third]) == (32, True)
    assert rows_after_a_hit(three, [*SHARED, first, second]) == (16, True)
    # The planted fault: as if there were one layer.
    assert rows_after_a_hit(three, [*SHARED, first, second, other, *rest], 1) == (32, False)


@pytest.mark.usefixtures("full_length")
def test_streamed_weights_change_no_token(three: Loaded, plain: list[list[int]]) -> None:
    assert texts(load(three, streamed(three, plan_of(three, "mtp")))) == plain


def test_memory_of_all_layers_is_in_the_plan(three: Loaded) -> None:
    model, shape = Model.of(three.checkpoint), three.checkpoint.shape
    single = replace(model, shape=replace(shape, num_nextn_predict_layers=1))
    workload = Workload(320, 8, three.dtype, draft="mtp")
    layouts = [one.layout(three.dtype) for one in (model, single)]
    plans = [
        plan(one.shape, layout, workload, Processor.of(GIB, 0))
        for one, layout in zip((model, single), layouts, strict=True)
    ]
    assert layouts[0].prediction_bytes == 3 * layouts[1].prediction_bytes
    parts = [dict(one.parts) for one in plans]
    assert parts[0]["drafting"] - parts[1]["drafting"] == 2 * layouts[1].prediction_bytes
    per_block = [one["kv cache"] / a.num_kv_blocks for one, a in zip(parts, plans, strict=True)]
    num_main = shape.num_hidden_layers
    assert per_block[0] / per_block[1] == pytest.approx((num_main + 3) / (num_main + 1))
