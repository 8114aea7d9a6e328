"""What following a grammar takes of a step: `python -m benchmarks.grammar`.

Pairs of answers of smollm2, one of a given form and one that is free, one after the other in one
process, each first in turn, without drafts. The forms: a text of anything, whose tokens are the
free one's; lists of numbers; the inside of a JSON text; and of one that has a length, where a mask
takes longest. A figure is the median over the pairs of how much longer a token took. A table goes
to standard error; the last line is JSON.
"""

import argparse
import json
import statistics
import sys
from itertools import chain

from benchmarks.harness import machine
from thinslice import LLM, Constraint, SamplingParams

PAIRS, TOKENS = 25, 64
PROMPT = [{"role": "user", "content": "Tell me a long story about a river, in many words."}]
ROW = {"type": "array", "items": {"type": "integer"}, "minItems": 4}
FORMS = {
    "any text": Constraint.regex("(?s:.)*"),
    "numbers": Constraint.json_schema({"type": "array", "items": ROW, "minItems": 40}),
    "a JSON text": Constraint.regex(r'\{"story": "[^"\\]{4}[^"\\]*"\}'),
    "a text of a length": Constraint.json_schema({"type": "string", "minLength": 4000}),
}


def seconds(llm: LLM, constraint: Constraint | None) -> float:
    """Seconds for a token of an answer."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, constraint=constraint)
    completion = llm.chat(PROMPT, params)
    return completion.decode_s / (len(completion.token_ids) - 1)


def main() -> int:
    """Measure each form and print what it takes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with LLM("smollm2", memory="1GiB", context=1024, draft="off") as llm:
        for constraint in chain((None,), FORMS.values()):
            seconds(llm, constraint)  # the vocabulary, the grammar and the prompt's K and V
        for name, form in FORMS.items():
            pairs = []
            for number in range(options.pairs):
                order = (form, None) if number % 2 else (None, form)
                took = {one: seconds(llm, one) for one in order}
                pairs.append((took[form], took[None]))
            free = statistics.median(free for _, free in pairs)
            more = statistics.median(held / free - 1.0 for held, free in pairs)
            found[name] = {"free_ms": 1e3 * free, "more": more}
            told = f"{name}: {1e3 * free:.2f} ms for a free token, {100 * more:+.1f}% of a form"
            print(told, file=sys.stderr)
    print(json.dumps({"machine": machine(), "forms": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
