"""Settings of adapters are checked against the model before anything is loaded; each mistake is one line."""

import re
from types import SimpleNamespace

import pytest

from nemotron_sft.errors import UserError

DENSE = SimpleNamespace(num_layers=2, num_moe_experts=None, hybrid_layer_pattern=None)
EXPERTS = SimpleNamespace(
    num_layers=2, num_moe_experts=2, moe_layer_freq=1, hybrid_layer_pattern=None, moe_shared_expert_intermediate_size=64
)
HYBRID = SimpleNamespace(hybrid_layer_pattern="M*E|M-", num_moe_experts=2, moe_shared_expert_intermediate_size=64)


def settled(model, scheme="lora", **settings):
    from nemotron_sft.train import peft

    adapters = peft.schemes()[scheme]()
    adapters.target_modules = None
    for key, value in settings.items():
        setattr(adapters, key, value)
    peft.settle(adapters, model)
    return adapters.target_modules


@pytest.mark.parametrize(
    ("model", "scheme", "expected"),
    [
        (DENSE, "lora", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]),
        (DENSE, "dora", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]),
        (HYBRID, "lora", ["linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2"]),
        (
            HYBRID,
            "dora",
            ["linear_qkv", "linear_proj", "out_proj", "*.shared_experts.linear_fc1", "*.shared_experts.linear_fc2"],
        ),
        (EXPERTS, "dora", ["linear_qkv", "linear_proj", "*.shared_experts.linear_fc1", "*.shared_experts.linear_fc2"]),
    ],
)
def test_without_names_every_linear_layer_is_adapted(bridge, model, scheme, expected):
    assert settled(model, scheme) == expected


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        (DENSE, ["linear_qkv"]),
        (DENSE, ["decoder.layers.0.mlp.linear_fc1", "*.layers.1.*.linear_proj"]),
        (HYBRID, ["in_proj", "*.mixer.out_proj", "*.experts.linear_fc1", "*.experts.local_experts.*.linear_fc2"]),
        (HYBRID, ["router"]),
    ],
)
def test_names_and_patterns_that_are_there(bridge, model, targets):
    assert settled(model, target_modules=targets) == targets


@pytest.mark.parametrize(
    ("model", "scheme", "settings", "message"),
    [
        (
            DENSE,
            "lora",
            {"target_modules": ["q_proj", "v_proj"]},
            "no layer is called q_proj: q_proj is part of linear_qkv",
        ),
        (DENSE, "lora", {"target_modules": ["model.layers.0.mlp.gate_proj"]}, "gate_proj is part of linear_fc1 here"),
        (DENSE, "lora", {"target_modules": ["linear_qkv", "linear_projj"]}, "did you mean linear_proj?"),
        (DENSE, "lora", {"target_modules": ["Linear_FC1"]}, "did you mean linear_fc1?"),
        (DENSE, "lora", {"target_modules": ["in_proj"]}, "no layer is called in_proj"),
        (HYBRID, "lora", {"target_modules": ["inproj"]}, "did you mean in_proj?"),
        (DENSE, "lora", {"target_modules": ["*.layers.2.*"]}, r"no layer is called *.layers.2.*"),
        (DENSE, "lora", {"target_modules": ["all-linear"]}, "target_modules=null takes every linear layer"),
        (DENSE, "lora", {"target_modules": []}, "give a list of layers"),
        (DENSE, "lora", {"target_modules": "linear_qkv"}, "give a list of layers"),
        (DENSE, "lora", {"target_modules": [1]}, "give a list of layers"),
        (DENSE, "lora", {"exclude_modules": ["linear_qkv"]}, "exclude_modules is not supported"),
        (EXPERTS, "dora", {"target_modules": ["linear_qkv", "linear_fc1"]}, "DoRA cannot adapt mlp.experts.linear_fc1"),
        (
            HYBRID,
            "dora",
            {"target_modules": ["linear_qkv", "in_proj"]},
            "DoRA cannot adapt mixer.in_proj, which in_proj",
        ),
        (HYBRID, "dora", {"target_modules": ["router"]}, "DoRA cannot adapt mlp.router"),
        (DENSE, "lora", {"dim": 0}, "dim must be a whole number above 0"),
        (DENSE, "lora", {"alpha": 0}, "alpha above 0"),
        (DENSE, "lora", {"dropout": 1.0}, "dropout from 0 to below 1"),
        (DENSE, "lora", {"dropout_position": "middle"}, "choose pre or post"),
        (DENSE, "dora", {"dropout_position": "post"}, "choose pre"),
        (DENSE, "lora", {"lora_A_init_method": "xaver"}, "choose one of xavier, kaiming"),
    ],
)
def test_mistakes_are_one_line(bridge, model, scheme, settings, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        settled(model, scheme, **settings)
    assert "\n" not in str(refused.value)
