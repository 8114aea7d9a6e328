"""/metrics: how the server stands and what it has done, for Prometheus; numbers alone."""

from collections.abc import Iterator
from itertools import accumulate

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from thinslice.engine.metrics import Histogram, Metrics
from thinslice.memory.meter import current_rss_bytes, peak_rss_bytes
from thinslice.serve.served import Served, TheServed

router = APIRouter()
_GAUGES = {
    "num_waiting": "Completions that wait for their turn.",
    "num_running": "Completions that run.",
    "kv_blocks": "Blocks of the KV cache.",
    "kv_blocks_used": "Blocks that running completions hold.",
    "kv_blocks_cached": "Blocks with a prefix that can be found.",
    "kv_blocks_spilled": "Blocks in host memory.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "completion_tokens": "Tokens of completions.",
    "prefix_hit_tokens": "Tokens of prompts that were found in the prefix cache.",
    "preemptions": "Times that a completion lost its blocks to another.",
    "drafted_tokens": "Drafts that were run.",
    "accepted_tokens": "Drafts that stood.",
    "steps": "Batches run.",
    "streamed_bytes": "Bytes of weights read from disk.",
}
_HISTOGRAMS = {
    "time_to_first_token_s": "Seconds from arrival to the first token.",
    "time_per_token_s": "Seconds between tokens, of each finished completion.",
    "schedule_s": "Seconds of each step to choose what runs.",
    "run_s": "Seconds of each step in the model.",
    "sample_s": "Seconds of each step from logits to tokens.",
    "draft_s": "Seconds of each step to draft.",
    "sweep_s": "Seconds of each pass over streamed weights.",
    "slice_wait_s": "Seconds of each pass spent waiting for slices.",
}


@router.get("/metrics")
async def metrics(served: TheServed) -> Response:
    """Counters, gauges and histograms in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(served))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Collector(Collector):
    def __init__(self, served: Served) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        llm = self._served.engine.llm
        yield from _of_engine(llm.engine.metrics)
        for name, text, num_bytes in (
            ("budget_bytes", "The most that the process may hold.", llm.plan.budget_bytes),
            ("planned_bytes", "What it holds at most by its plan.", llm.plan.peak_bytes),
            ("rss_bytes", "What it holds.", current_rss_bytes()),
            ("peak_bytes", "What it has held at most.", peak_rss_bytes()),
        ):
            yield GaugeMetricFamily(f"thinslice_{name}", text, num_bytes)


def _of_engine(numbers: Metrics) -> Iterator[Metric]:
    for name, text in _GAUGES.items():
        yield GaugeMetricFamily(f"thinslice_{name}", text, getattr(numbers, name))
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"thinslice_{name}", text, getattr(numbers, name))
    ended = CounterMetricFamily(
        "thinslice_requests", "Completions that ended, by their reason.", labels=["reason"]
    )
    for reason, count in [*numbers.requests.items()]:
        ended.add_metric([reason], count)
    yield ended
    for name, text in _HISTOGRAMS.items():
        seconds = name.removesuffix("_s") + "_seconds"
        yield _histogram(f"thinslice_{seconds}", text, getattr(numbers, name))


def _histogram(name: str, text: str, found: Histogram) -> Metric:
    bounds = [*map(str, found.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(found.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=found.total)
