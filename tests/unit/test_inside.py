"""What vLLM's processes load, beside stand-ins for vLLM: the plugin is found, and DeepSeek's models hand out id 0."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import distributions
from types import ModuleType, SimpleNamespace

import pytest
import torch

from deepspec.serving.launch import INSIDE


class Model:
    """vLLM's body: adds the residual to each state that is asked for, and there is none under the first layer."""

    aux_hidden_state_layers: tuple[int, ...] = ()

    def embed_input_ids(self, ids):
        return ids[:, None].float()

    def forward(self, input_ids, positions, intermediate_tensors, inputs_embeds=None):
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual, states = None, []
        for layer in range(2):
            if layer in self.aux_hidden_state_layers:
                states.append(hidden + residual)
            residual = hidden if residual is None else residual.add_(hidden)
            hidden = torch.ones_like(hidden)
        if 2 in self.aux_hidden_state_layers:
            states.append(hidden + residual)
        return hidden, states


class ForCausalLM:
    model_cls = Model

    def __init__(self):
        self.model = self.model_cls()

    def set_aux_hidden_state_layers(self, layers):
        self.model.aux_hidden_state_layers = layers


@pytest.fixture
def inside(monkeypatch):
    """Loads a module of the folder beside a vLLM with pipelines of some ranks; what it registers is kept."""
    ranks, registered = SimpleNamespace(world_size=1), {}
    parts = {
        "vllm": {"ModelRegistry": SimpleNamespace(register_model=registered.__setitem__)},
        "vllm.distributed": {"get_pp_group": lambda: ranks},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {
            "deepseek_v2": SimpleNamespace(DeepseekV2Model=Model, DeepseekV2ForCausalLM=ForCausalLM)
        },
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(INSIDE))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield SimpleNamespace(load=load, ranks=ranks, registered=registered)
    for name in ("deepspec_plugin", "deepspec_latent"):
        sys.modules.pop(name, None)


def test_the_plugin_is_found_on_the_path_and_names_models_that_are_there(inside):
    (found,) = [entry for dist in distributions(path=[str(INSIDE)]) for entry in dist.entry_points]
    assert (found.group, found.value) == ("vllm.general_plugins", "deepspec_plugin:register")
    inside.load("deepspec_plugin").register()
    assert sorted(inside.registered) == ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"]
    for name, place in inside.registered.items():
        module, _, own = place.partition(":")
        assert own == name and issubclass(getattr(inside.load(module), own), ForCausalLM)


def states(model, layers):
    model.set_aux_hidden_state_layers(layers)
    _, found = model.model.forward(torch.tensor([3, 5]), None, None)
    return [state.flatten().tolist() for state in found]


def test_the_state_under_the_first_layer_is_the_embedding_and_the_others_are_as_they_were(inside):
    latent = inside.load("deepspec_latent")
    with pytest.raises(TypeError):
        states(ForCausalLM(), (0, 1, 2))
    theirs = states(ForCausalLM(), (1, 2))
    assert states(latent.DeepseekV3ForCausalLM(), (1, 2)) == theirs
    assert states(latent.DeepseekV3ForCausalLM(), (0, 1, 2)) == [[3.0, 5.0], *theirs]


def test_a_pipeline_of_several_ranks_is_left_to_vllm(inside):
    latent = inside.load("deepspec_latent")
    inside.ranks.world_size = 2
    with pytest.raises(TypeError):
        states(latent.DeepseekV2ForCausalLM(), (0, 1))
