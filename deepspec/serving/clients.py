"""The engines that can be asked, by name."""

from __future__ import annotations

from deepspec.serving.llamacpp.client import LlamaCpp
from deepspec.serving.protocols import TGI, VLLM, Client, SGLang

CLIENTS: dict[str, type[Client]] = {client.engine: client for client in (VLLM, SGLang, TGI, LlamaCpp)}
