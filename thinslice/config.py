"""What a user may set: how a model is loaded, how a generation samples and stops."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from thinslice.constraint import Constraint
from thinslice.errors import ConfigError, RequestError, ThinsliceError, shown
from thinslice.forks import cached_property
from thinslice.units import parse_bytes

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_SALT_LENGTH = 1024
MAX_BIASES = 1024
MAX_BIAS = 100.0
Dtype = Literal["auto", "bfloat16", "float32", "int8", "int4"]
KvDtype = Literal["auto", "bfloat16", "float32", "int8"]
DeviceName = Literal["cpu", "cuda"]
Draft = Literal["auto", "ngram", "mtp", "off"]
MtpHidden = Literal["pre-norm", "post-norm"]
Forms = Literal["auto", "reserved", "off"]
MAX_DRAFT_LENGTH = 64
# Of tokens and of bytes; Python writes no numbers of more than 4,300 digits.
_LARGEST_NUMBER, _LARGEST_MEMORY = 1 << 40, 1 << 60


# What each parameter that a model's files may advise can be, both ends included.
_ADVISABLE_RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 31),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}
ADVISABLE = tuple(_ADVISABLE_RANGES)


@dataclass(frozen=True)
class TokenSampling:
    """A value for each sampling parameter that a model's files may advise.

    The defaults hold where neither the user nor the model gives a value. They are those Xiaomi
    evaluates MiMo-7B with (arXiv 2505.07608: temperature 0.6, top-p 0.95).

    Attributes: as those of SamplingParams.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when a generation ends.

    The order is: penalties, bias, temperature, top-k, top-p, min-p. Temperature, top-k, top-p,
    min-p and the repetition penalty are None where the user gives none: the value is then that of
    the model's files, otherwise the default of TokenSampling.

    Attributes:
        temperature: 0 is greedy: the most likely token, the lowest id among equals. Default: the
            model's advice, otherwise 0.6.
        top_k: Keep the k most likely tokens; 0 keeps all. Default: the model's advice, otherwise 0.
        top_p: Keep the fewest most likely tokens whose probabilities sum to at least this. Default:
            the model's advice, otherwise 0.95.
        min_p: Keep tokens at least this fraction as likely as the most likely one. Default: the
            model's advice, otherwise 0.
        repetition_penalty: Divide positive and multiply negative logits of tokens seen in prompt
            or completion; 1 is off. Source: arXiv 1909.05858. Default: the model's advice,
            otherwise 1.
        presence_penalty: Subtract from the logits of tokens seen in the completion.
        frequency_penalty: Subtract, times the count, from tokens seen in the completion.
        seed: The same seed gives the same text. Default: a fresh one is drawn.
        logit_bias: Add a number from -100 to 100 to the logit of a token id: a mapping from ids to
            numbers. Kept as pairs in the order of the ids.
        stop: Text before which the completion ends; may be given several times.
        stop_token_ids: Token id that ends the completion, in addition to the model's own; may be
            given several times.
        max_tokens: Longest completion. Default: as long as the context allows.
        max_thinking_tokens: Longest thought, in tokens, its tags and the text that leads to its end
            included; then the model answers. They count in max_tokens too. 0 is no thought.
            Default: as long as the model thinks.
        max_thinking_seconds: Seconds after which a thought is led to its end, from its first token
            on. What the text is then depends on the machine's speed. 0 is no thought.
        ignore_eos: Continue past the model's own end token, for measurements.
        n: Completions of the same prompt, which share its KV blocks; the one with index i draws
            from seed + i.
        logprobs: Give each token's log-probability and those of this many likeliest tokens, of
            the model's own distribution: before penalties, temperature and filters. None gives
            none.
        constraint: The form of the answer, or of a plain completion. A thought before the answer is
            free. The same constraint is compiled once.

    Errors: RequestError for a value out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    max_thinking_tokens: int | None = None
    max_thinking_seconds: float | None = None
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for name in ADVISABLE:
            value = getattr(self, name)
            if value is not None:
                check_advisable(name, value)
        _in_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _in_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.seed is not None:
            _in_range("seed", self.seed, 0, (1 << 63) - 1)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, 1 << 31)
        if self.max_thinking_tokens is not None:
            _in_range("max_thinking_tokens", self.max_thinking_tokens, 0, 1 << 31)
        if self.max_thinking_seconds is not None:
            _in_range("max_thinking_seconds", self.max_thinking_seconds, 0.0, 1e9)
        _check_flag("ignore_eos", self.ignore_eos, RequestError)
        _in_range("n", self.n, 1, MAX_SAMPLES)
        if self.logprobs is not None:
            _in_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stops()
        self._check_bias()
        if not isinstance(self.constraint, Constraint | None):
            told = f"constraint is {shown(self.constraint)}; expected Constraint.json_schema(...)"
            raise about("constraint", RequestError(told))
        if self.constraint is not None and self.ignore_eos:
            raise RequestError("ignore_eos goes on past the end, and a constraint ends the answer")

    def _check_bias(self) -> None:
        bias = self.logit_bias
        if isinstance(bias, Mapping):
            bias = tuple(bias.items())
        if not isinstance(bias, tuple) or len(bias) > MAX_BIASES:
            raise RequestError(f"logit_bias is no mapping of at most {MAX_BIASES} token ids")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in bias):
            raise RequestError("logit_bias has something else than pairs of an id and a number")
        for token_id, value in bias:
            _in_range("logit_bias's token id", token_id, 0, 1 << 31)
            _in_range(f"logit_bias of {token_id}", value, -MAX_BIAS, MAX_BIAS)
        object.__setattr__(self, "logit_bias", tuple(sorted(bias)))

    def _check_stops(self) -> None:
        for name, single in (("stop", str), ("stop_token_ids", int)):
            value = getattr(self, name)
            if isinstance(value, single):
                value = (value,)
            if not isinstance(value, tuple | list):
                raise RequestError(f"{name} is {shown(value)}; expected a tuple")
            object.__setattr__(self, name, tuple(value))
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"{len(self.stop)} stop strings; at most {MAX_STOP_STRINGS}")
        for stop in self.stop:
            if not isinstance(stop, str):
                raise RequestError(f"the stop string {shown(stop)} is no text")
            if not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"a stop string of {len(stop)} characters; expected 1..{MAX_STOP_LENGTH}"
                )
        for token_id in self.stop_token_ids:
            _in_range("a stop token id", token_id, 0, 1 << 31)

    def resolved(self, advised: Mapping[str, float]) -> "SamplingParams":
        """These, with a value for each parameter that is None and that a model may advise.

        Args:
            advised: what the model's files advise, by name; they need not name every parameter.
        """
        values = asdict(TokenSampling()) | dict(advised)
        missing = [name for name in ADVISABLE if getattr(self, name) is None]
        return replace(self, **{name: values[name] for name in missing})

    def sources(self, advised: Mapping[str, float]) -> dict[str, str]:
        """Whose value ``resolved`` takes for each of them: ``user``, ``model`` or ``default``."""
        otherwise = {name: "model" if name in advised else "default" for name in ADVISABLE}
        return {
            name: source if getattr(self, name) is None else "user"
            for name, source in otherwise.items()
        }

    @cached_property
    def token_sampling(self) -> TokenSampling:
        """The parameters that a model may advise; where one is None, its default."""
        given = {name: getattr(self, name) for name in ADVISABLE}
        return TokenSampling(**{name: one for name, one in given.items() if one is not None})

    def check_plain(self) -> None:
        """Errors: RequestError for a thinking budget, of which a plain prompt can spend nothing."""
        for name in ("max_thinking_tokens", "max_thinking_seconds"):
            if getattr(self, name) is not None:
                told = f"{name} is for conversations: a plain prompt is gone on with as it stands"
                raise about(name, RequestError(told))

    @property
    def most_thinking_tokens(self) -> int | None:
        """The longest thought, in tokens, as far as that is known before it begins."""
        return 0 if self.max_thinking_seconds == 0 else self.max_thinking_tokens

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is simply the most likely one."""
        return self.token_sampling.temperature == 0.0

    @property
    def has_filter(self) -> bool:
        """Whether top-k, top-p or min-p leaves any token out."""
        tokens = self.token_sampling
        return tokens.top_k > 0 or tokens.top_p < 1.0 or tokens.min_p > 0.0

    @property
    def has_penalty(self) -> bool:
        """Whether tokens seen before change the logits."""
        return (
            self.token_sampling.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class Scheduling:
    """How a request stands beside others. It chooses no token; a deadline may cut a text short.

    Attributes:
        priority: Requests of lower priority values go first, and may displace others.
        deadline_s: Seconds after which a request ends, wherever it is.
        cache_salt: Only requests of the same salt share cached prefixes: who guesses another's
            prompt cannot see by the time an answer takes that the guess is right.
        tenant: Whose request it is: within a priority, tenants that wait go in turn, each with one
            completion, so that who asks much holds back nobody else.

    Errors: RequestError for a value out of range.
    """

    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""
    tenant: str = ""

    def __post_init__(self) -> None:
        _in_range("priority", self.priority, -(1 << 31), 1 << 31)
        if self.deadline_s is not None:
            _in_range("deadline_s", self.deadline_s, 0.0, 1e9)
        for name in ("cache_salt", "tenant"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > MAX_SALT_LENGTH:
                raise RequestError(f"{name} is no text of at most {MAX_SALT_LENGTH} characters")

    def deadline_from(self, now: float) -> float:
        """When a request ends at the latest that begins now; infinity for none."""
        return float("inf") if self.deadline_s is None else now + self.deadline_s


def check_advisable(name: str, value: object) -> None:
    """Refuse what a parameter of ADVISABLE cannot be. Errors: RequestError naming it."""
    _in_range(name, value, *_ADVISABLE_RANGES[name])
    if name == "top_p" and value == 0:
        told = "top_p is 0; expected above 0 (for greedy set temperature to 0)"
        raise about("top_p", RequestError(told))


def about(name: str, error: ThinsliceError) -> ThinsliceError:
    """An error whose message begins with a setting's name; an option has another."""
    error.setting = name if name.isidentifier() else None
    return error


def _in_range(name: str, value: object, smallest: float, largest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise about(name, RequestError(f"{name} is {shown(value)}; expected a number"))
    if isinstance(smallest, int) and not isinstance(value, int):
        raise about(name, RequestError(f"{name} is {value}; expected a whole number"))
    if not smallest <= value <= largest:  # NaN is in no range
        told = f"{name} is {shown(value)}; expected {smallest}..{largest}"
        raise about(name, RequestError(told))


def _check_flag(name: str, value: object, error: type[ThinsliceError]) -> None:
    if not isinstance(value, bool):
        raise about(name, error(f"{name} is {shown(value)}; expected True or False"))


def _check_bytes(name: str, size: object, least: int) -> None:
    """Errors: ConfigError for what is neither a number of bytes nor a text that names one."""
    if isinstance(size, str):
        try:
            size = parse_bytes(size)
        except ConfigError as error:
            raise about(name, ConfigError(f"{name}: {error}")) from None
    elif type(size) is not int or size < least:
        told = f"{name} is {shown(size)}; expected bytes, or text as in 4GiB"
        raise about(name, ConfigError(told))
    if size > _LARGEST_MEMORY:
        raise about(name, ConfigError(f"{name} is more memory than there is"))


def _check_choice(name: str, value: object, choices: object) -> None:
    """Errors: ConfigError for a value that is not one of a Literal's."""
    if not isinstance(value, str) or value not in get_args(choices):
        known = ", ".join(get_args(choices))
        raise about(name, ConfigError(f"{name} {shown(value)} is unknown; one of {known}"))


@dataclass(frozen=True)
class EngineSettings:
    """How a model is planned and loaded.

    Attributes:
        memory: Memory budget of the whole process, as 4GiB or 4GB; at most what this machine or its
            control group has. Default: 80% of the free memory, or 95% of a control group in which
            nothing else runs. With the device cuda: the card's memory, CUDA's context included.
        device: Device to run on: cpu or cuda. cuda is never selected automatically (experimental).
        host_memory: With the device cuda, the budget of the process in main memory. Default: as for
            the memory.
        context: Tokens of prompt and completion together. Default: as many as fit beside resident
            weights, if that is at least 1,024; otherwise the weights are streamed.
        dtype: Weight type. auto: int4 or int8 if the file is quantised so, otherwise bfloat16. For
            int4 or int8, a model of floats is packed once; the copy is kept in the store.
        kv_dtype: KV cache type. auto: bfloat16, or float32 with float32 weights.
        draft: Speculative drafting; the output does not change. ngram: prompt lookup. mtp: the
            model's own prediction layer. auto: ngram, otherwise mtp if the model has it and it fits
            beside a resident head.
        draft_length: Most draft tokens per step; fewer, or none, when drafting does not pay.
        mtp_hidden: Hidden state the prediction layer was trained on: the last one before or after
            the final norm. MiMo's layers take it before.
        offline: Use no network; the model must be stored already.
        max_num_seqs: Sequences that run at once.
        reserve: Memory that the program around the model will come to hold, beside what it holds
            when the model is loaded; as 64MiB.
        reserve_per_token: Bytes more of that for each token of the context.
        forms: Memory for answers of a given form, as JSON or as a call of a tool that is required.
            reserved: set aside in the plan. auto: reserved by serve; elsewhere taken from what is
            left to answers when one is first asked for. off: none, and such answers are refused.

    Errors: ConfigError for a value out of range.
    """

    memory: str | int | None = None
    device: DeviceName = "cpu"
    host_memory: str | int | None = None
    context: int | None = None
    dtype: Dtype = "auto"
    kv_dtype: KvDtype = "auto"
    draft: Draft = "auto"
    draft_length: int = 8
    mtp_hidden: MtpHidden = "pre-norm"
    offline: bool = False
    max_num_seqs: int = 8
    reserve: str | int = 0
    reserve_per_token: int = 0
    forms: Forms = "auto"

    def __post_init__(self) -> None:
        for name, kind in (
            ("device", DeviceName),
            ("dtype", Dtype),
            ("kv_dtype", KvDtype),
            ("draft", Draft),
            ("mtp_hidden", MtpHidden),
            ("forms", Forms),
        ):
            _check_choice(name, getattr(self, name), kind)
        if self.device == "cpu" and self.host_memory is not None:
            raise ConfigError("--host-memory goes with --device cuda; on the CPU name --memory")
        _check_flag("offline", self.offline, ConfigError)
        for name, size in (("memory", self.memory), ("host_memory", self.host_memory)):
            if size is not None:
                _check_bytes(name, size, least=1)
        _check_bytes("reserve", self.reserve, least=0)
        for name in ("context", "draft_length", "max_num_seqs", "reserve_per_token"):
            value = getattr(self, name)
            if type(value) is not int and not (value is None and name == "context"):
                told = f"{name} is {shown(value)}; expected a whole number"
                raise about(name, ConfigError(told))
            if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
                told = f"{name} is beyond {-_LARGEST_NUMBER}..{_LARGEST_NUMBER}"
                raise about(name, ConfigError(told))
        if not 0 < self.max_num_seqs <= 1024:
            told = f"max_num_seqs is {self.max_num_seqs}; expected 1..1024"
            raise about("max_num_seqs", ConfigError(told))
        if self.reserve_per_token < 0:
            told = f"reserve_per_token is {self.reserve_per_token}; expected 0 or more"
            raise about("reserve_per_token", ConfigError(told))
        if not 0 < self.draft_length <= MAX_DRAFT_LENGTH:
            told = f"draft_length is {self.draft_length}; expected 1..{MAX_DRAFT_LENGTH}"
            raise about("draft_length", ConfigError(f"{told} (for none, draft off)"))
        if self.mtp_hidden != "pre-norm" and self.draft not in ("auto", "mtp"):
            raise ConfigError(
                f"mtp_hidden {self.mtp_hidden} is for a prediction layer, and draft {self.draft} "
                "uses none; draft mtp does"
            )

    @property
    def memory_bytes(self) -> int | None:
        """The budget in bytes, or None where none was named."""
        return parse_bytes(self.memory) if isinstance(self.memory, str) else self.memory

    @property
    def reserve_bytes(self) -> int:
        """What is reserved whatever the context, in bytes."""
        return parse_bytes(self.reserve) if isinstance(self.reserve, str) else self.reserve

    @property
    def host_memory_bytes(self) -> int | None:
        """The budget of the machine's own memory beside a card, or None where none was named."""
        given = self.host_memory
        return parse_bytes(given) if isinstance(given, str) else given


# A request as any other: behind what can check it.
DEFAULT_SCHEDULING = Scheduling()
