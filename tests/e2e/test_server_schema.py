"""Requests that Schemathesis makes of the server's own document: whatever it says, no bug."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.load_clients import refusal_of
from tests.served_process import served_process
from tests.tiny_llm import write_model


def test_no_request_of_its_document_meets_a_bug(tmp_path: Path, is_long: bool) -> None:
    drawn, count = random.randrange(1 << 32), 300 if is_long else 12
    print(f"seed {drawn}, {count} requests of each path")
    model = str(write_model(tmp_path / "tiny.gguf"))
    options = ["--memory", "400MiB", "--draft", "off", "--context", "192"]
    statuses: Counter[int] = Counter()
    with served_process(model, *options, log=tmp_path / "log") as server:
        document = json.loads(server.get("/openapi.json"))
        for found in schemathesis.openapi.from_dict(document).get_all_operations():
            operation = found.ok()

            @seed(drawn)
            @settings(
                max_examples=count,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=[*HealthCheck],
            )
            @given(case=operation.as_strategy())
            def ask(case: Any) -> None:
                if isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = model  # nothing else is looked at with another
                answer = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=60)
                statuses[answer.status_code] += 1
                known = (200, 400, 404, 405, 413, 429)
                assert answer.status_code in known, (case.path, case.body, answer.text)
                if answer.status_code != 200:
                    assert refusal_of(answer.content)

            ask()
        server.wait_until_idle()
        assert "Traceback" not in (tmp_path / "log").read_text()
    print(statuses)
    assert statuses[200] > 20
