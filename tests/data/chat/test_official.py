"""Official templates of other models: text and masks are transformers', whatever the conversation."""

import pytest
from official import CONVERSATIONS, kinds, row, templates

# Family: (templates, conversations that have to be equal)
FAMILIES = {
    "Llama 3": (("llama3_training", "llama3_1", "llama3_2"), 11),
    "Qwen 2.5 and 3": (("qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training", "qwen3_instruct_2507"), 21),
    "Mistral": (("mistral_v2", "mistral_v3", "mistral_v7", "mistral_v11", "mistral_v13"), 18),
    "Gemma": (("gemma", "gemma3", "gemma4_v5"), 5),
    "DeepSeek": (("deepseekv3", "deepseekv3_training"), 11),
    "GLM": (("glm4moe", "glm4moe_training"), 24),
    "gpt-oss": (("gptoss", "gptoss_training"), 19),
    "Phi": (("phi3", "phi3_5_training"), 11),
    "Nemotron": (("nemotron_3_nano", "nemotron_3_super_training", "nemotron_3_ultra"), 24),
}


def check(name: str, least: int) -> None:
    found = row(name)
    assert found.counts["different"] == 0, found.reasons
    assert found.counts.total() == len(CONVERSATIONS) >= 16
    assert found.counts["equal"] >= least
    compared = found.counts["equal"] + found.counts["as it reads it"]
    assert sum(map(len, kinds([found]).values())) == found.counts["refused by us"]
    assert found.masks == (compared if name.endswith("_training") else 0)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_official_templates(family):
    names, least = FAMILIES[family]
    for name in names:
        check(name, least)


@pytest.mark.slow
def test_all_official_templates():
    for name in templates():
        check(name, 0)
