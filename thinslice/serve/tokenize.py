"""/tokenize and /detokenize: the model's tokens of texts and conversations, as vLLM has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from thinslice.engine.llm import LLM
from thinslice.engine.results import Held
from thinslice.serve.bodies import DetokenizeBody, TokenizeBody
from thinslice.serve.errors import ApiError
from thinslice.serve.lazy_json import json_answer
from thinslice.serve.served import Served, TheServed
from thinslice.text.messages import Conversation, for_template

router = APIRouter()
# Of one request, where the context is shorter: evaluations cut long documents by their tokens.
MOST_TOKENS = 65_536
# An id in a list, and its digits in an answer.
_BYTES_PER_TOKEN = 48


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, served: TheServed) -> Response:
    """The tokens of a text, or of a conversation as the model's template writes it."""
    _check(body, served)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt or messages is needed, and not both", "prompt")
    llm, most = served.engine.llm, _most(served)
    # Texts are tokenized one at a time: that one's tokens are among what callers hold anyway.
    ids = await served.engine.apart(_encoded, llm, body, most)
    if len(ids) > most:
        raise ApiError(400, f"the text has more than {most} tokens; give it in parts", "prompt")
    with _room(served, len(ids)):
        answer = {"count": len(ids), "max_model_len": llm.plan.context, "tokens": ids}
        if body.return_token_strs:
            strings = [llm.tokenizer.token_bytes(one).decode(errors="replace") for one in ids]
            answer["token_strs"] = strings
        return json_answer(answer)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, served: TheServed) -> dict[str, str]:
    """The text of tokens, special ones written out."""
    _check(body, served)
    most = _most(served)
    if len(body.tokens) > most:
        told = f"{len(body.tokens)} tokens; at most {most} at a time"
        raise ApiError(400, told, "tokens")
    decode = served.engine.llm.tokenizer.decode
    return {"prompt": await served.engine.apart(decode, body.tokens, skip_special_tokens=False)}


@router.get("/tokenizer_info")
async def tokenizer_info(served: TheServed) -> dict[str, Any]:
    """The texts of the tokenizer's special tokens, which evaluation harnesses look for."""
    tokenizer = served.engine.llm.tokenizer
    named = tokenizer.special.named
    return {
        **{name: named.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        "model_max_length": served.engine.llm.plan.context,
        "vocab_size": tokenizer.vocab_size,
    }


def _check(body: TokenizeBody | DetokenizeBody, served: Served) -> None:
    if body.model is not None:
        served.check_model(body.model)
    served.check_others(body.model_extra)


def _most(served: Served) -> int:
    return max(served.engine.llm.plan.context, MOST_TOKENS)


@contextmanager
def _room(served: Served, num_tokens: int) -> Iterator[None]:
    """Promise the plan's room for the ids of one answer. Errors: BusyError."""
    held = Held(served.engine.llm.engine.results)
    try:
        held.need(num_tokens * _BYTES_PER_TOKEN, "the tokens of a text")
        yield
    finally:
        held.release()


def _encoded(llm: LLM, body: TokenizeBody, most: int) -> list[int]:
    """Errors: RequestError."""
    if body.prompt is not None:
        is_plain = body.add_special_tokens is not False
        return llm.tokenizer.encode(body.prompt, add_special_tokens=is_plain, limit=most)
    conversation = for_template(Conversation(body.messages or (), body.tools or ()))
    text = llm.rendered(conversation, add_generation_prompt=body.add_generation_prompt)
    is_plain = body.add_special_tokens is True
    return llm.tokenizer.encode(text, add_special_tokens=is_plain, limit=most)
