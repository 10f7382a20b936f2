"""vLLM's connector that writes hidden states, on CPUs too, each file saying which layers are in it, and in which form.

vLLM loads it by name (`kv_connector_module_path`), with this folder on its path. A file appears whole, under the lock
that vLLM's own connector holds until it is written. States are encoded before they are written, where
`kv_connector_extra_config` names a form.
"""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

import torch
from deepspec_codec import packed
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class _Done:
    """A copy that was waited for already, in the place of a CUDA event."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing."""


class DeepSpecStates(ExampleHiddenStatesConnector):
    """As vLLM's own, which copies through pinned memory and so needs a GPU."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        cache = self._kv_cache
        if cache is None or cache.is_cuda:
            return super()._submit_async_write(pending)
        if not self._is_tp_rank_zero:
            return None
        blocks = torch.tensor(pending.block_ids)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten()
        states = extract_from_kv_cache(cache, slots, len(pending.token_ids)).contiguous()
        tensors = {"hidden_states": states, "token_ids": pending.token_ids.clone()}
        copied, lock = _Done(), self._lock_fds.pop(pending.req_id, None)
        future = self._executor.submit(self._write_tensors, tensors, copied, pending.filename, lock)
        self._req_copy_events[pending.req_id] = copied
        self._req_futures[pending.req_id] = future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))

    def _write_tensors(
        self, tensors: dict[str, torch.Tensor], event: Any, filename: str, lock_fd: Any
    ) -> None:
        """Write a file whole, and let go of its lock."""
        draft = self._vllm_config.speculative_config.draft_model_config.hf_config
        layers = json.dumps(list(draft.eagle_aux_hidden_state_layer_ids))
        form = self._kv_transfer_config.get_from_extra_config("form", "bf16")
        try:
            event.synchronize()
            kept = packed(tensors["hidden_states"], form) | {"token_ids": tensors["token_ids"]}
            save_file(kept, f"{filename}.part", {"layer_ids": layers, "form": form})
            os.replace(f"{filename}.part", filename)
        finally:
            if lock_fd is not None:
                os.close(lock_fd)
