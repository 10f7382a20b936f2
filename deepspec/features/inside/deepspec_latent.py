"""DeepSeek's models with latent attention, which hand out the state under their first layer too.

vLLM's own add the residual to each state that is asked for, and under the first layer there is none yet: the first
request ends the server (`unsupported operand type(s) for +: 'Tensor' and 'NoneType'`, 0.32).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.models import deepseek_v2


class Body(deepseek_v2.DeepseekV2Model):
    """The layers; in a pipeline of several ranks the first has no way to hand out states, and they stay as they are."""

    hands_out_embeddings = False

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        if not self.hands_out_embeddings:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        embedded = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        lowest = embedded.clone()  # the layers add to theirs
        last, states = super().forward(input_ids, positions, intermediate_tensors, embedded)
        return last, [lowest, *states]


class _Latent(deepseek_v2.DeepseekV2ForCausalLM):
    model_cls = Body

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        if 0 in layers and get_pp_group().world_size == 1:
            self.model.hands_out_embeddings = True
            layers = tuple(layer for layer in layers if layer)
        super().set_aux_hidden_state_layers(layers)


class DeepseekV2ForCausalLM(_Latent):
    """As vLLM knows it by name."""


class DeepseekV3ForCausalLM(_Latent):
    """As vLLM knows it by name."""
