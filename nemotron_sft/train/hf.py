"""Hugging Face names -> Megatron-Bridge: where a model's config.json comes from, and the bridge of its family."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path

from nemotron_sft.errors import UserError, first_line
from nemotron_sft.paths import CONF
from nemotron_sft.train.compat.bridge import configs_from, translation

ARCHITECTURES = CONF / "model" / "architecture"  # config.json of published models, for work without the hub


def load_config(source: str, **options):
    """The transformers config of a Hugging Face directory or hub id, and its family's bridge registered.

    Looks in this order: the directory, the hub cache, conf/model/architecture, the hub. So a dry run needs no
    network for the models shipped here, and weights are never downloaded. Raises UserError when there is none.
    """
    from transformers import AutoConfig

    where = config_file(source)
    try:
        config = AutoConfig.from_pretrained(where or source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"no usable config.json for {source}: give a directory that holds one, or a hub id ({first_line(error)})"
        ) from None
    config.name_or_path = source
    register(config, source)
    return config


def config_file(source: str) -> str | None:
    """A local config.json for `source`; None when only the hub can have it."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return source
    if "/" not in source or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source} is neither a directory nor a hub id such as Qwen/Qwen3-8B")
    cached = try_to_load_from_cache(source, "config.json")
    if isinstance(cached, str):
        return cached
    # Base and chat versions, and re-uploads, share an architecture: the files are named without those endings.
    name = re.sub(r"(-Base|-Instruct|-BF16)+$", "", source.split("/")[1])
    shipped = ARCHITECTURES / f"{name}.json"
    return str(shipped) if shipped.exists() else None


def register(config, source: str) -> None:
    """Import the one module of Bridge that registers this architecture (importing them all takes half a minute)."""
    import megatron.bridge.models

    root = Path(megatron.bridge.models.__path__[0])
    names = [name for name in config.architectures or () if isinstance(name, str)]
    decorator = rf'^@\w+\.register_bridge\(\s*source="?({"|".join(map(re.escape, names))})\b'
    for file in sorted(root.rglob("*_bridge.py")):
        if names and re.search(decorator, file.read_text(), flags=re.MULTILINE):
            module = file.relative_to(root).with_suffix("").as_posix().replace("/", ".")
            importlib.import_module(f"megatron.bridge.models.{module}")
            return
    raise UserError(
        f"{source}: Megatron-Bridge has no bridge for the architecture {', '.join(names) or '(none named)'}"
    )


def configs_of(source: str | None) -> contextlib.AbstractContextManager[None]:
    """Let Bridge's recipes find their Hugging Face config as `load_config` does, that of `source` if given."""

    def load(path, trust_remote_code=False, **options):
        # A revision pins weights and tokenizer; the architecture of a published model does not change.
        options.pop("revision", None)
        return load_config(source or str(path), trust_remote_code=trust_remote_code, **options)

    return configs_from(load)


def auto_bridge(source: str):
    """Bridge's AutoBridge for a Hugging Face directory or hub id. Weights are read only when converted."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    with configs_of(source):
        return AutoBridge.from_hf_pretrained(source)


def bridge_for(model):
    """An AutoBridge for a model that no Hugging Face directory describes, from its own configuration.

    Decoders with RMSNorm, rotary positions, gated feed-forward layers and no biases are Llama to transformers, or
    Qwen3 where queries and keys are normalised; hybrids such as Nemotron 3 are NemotronH. Raises UserError for any
    other.
    """
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    if getattr(model, "hybrid_layer_pattern", None):
        return AutoBridge.from_hf_config(_nemotron_h(model))
    plain = (
        model.normalization == "RMSNorm"
        and model.position_embedding_type == "rope"
        and model.gated_linear_unit
        and not (model.add_bias_linear or model.add_qkv_bias or model.num_moe_experts)
    )
    if not plain:
        raise UserError("transformers has no architecture for this model: name one with model.hf")
    if model.qk_layernorm:
        from megatron.bridge.models.qwen.qwen3_bridge import Qwen3Bridge as Family
        from transformers import Qwen3Config as Config
    else:
        from megatron.bridge.models.llama.llama_bridge import LlamaBridge as Family
        from transformers import LlamaConfig as Config
    return AutoBridge.from_hf_config(Config(**Family.megatron_to_hf_config(model)))


def _nemotron_h(model):
    """The NemotronHConfig of a hybrid. Raises UserError for one that computes something else than NemotronH does."""
    from megatron.bridge.models.nemotronh.nemotron_h_bridge import NemotronHBridge
    from megatron.core.activations import squared_relu
    from transformers import NemotronHConfig

    if (
        model.activation_func is not squared_relu
        or model.position_embedding_type != "none"
        or (model.num_moe_experts and model.moe_router_score_function != "sigmoid")
        or model.gated_linear_unit
        or model.add_bias_linear
        or model.add_qkv_bias
        or model.qk_layernorm
    ):
        raise UserError("transformers has no architecture for this hybrid: name one with model.hf")
    described = NemotronHBridge.megatron_to_hf_config(model)
    described.pop("auto_map")  # transformers has the classes itself
    # Without mamba-ssm transformers is right within one chunk only, and raises small steps (compat.transformers).
    described |= {"chunk_size": max(256, described["chunk_size"]), "time_step_min": 1e-9}
    return NemotronHConfig(**described)


def weight_files(directory: Path | str) -> dict[str, Path]:
    """{weight: the safetensors file that holds it} of a Hugging Face directory. Raises UserError without any."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        raise UserError(f"{directory} holds no safetensors")
    return found


# Settings of transformers' configs that the shapes of weights, or which of them there are, depend on.
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "num_experts", "num_local_experts", "n_routed_experts",
    "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "mamba_head_dim",
    "mamba_num_heads", "n_groups", "ssm_state_size", "num_nextn_predict_layers",
)  # fmt: skip


def local_directory(source: str) -> Path | None:
    """Where the files of a directory or hub id are on this machine, None if they are not."""
    found = Path(config_file(source) or ARCHITECTURES)
    folder = found.parent if found.suffix == ".json" else found
    return None if folder in (ARCHITECTURES, ARCHITECTURES.parent) else folder


def export_config(source: str | None, provider):
    """(Bridge's translator of the family, the transformers config of a trained model).

    source: the directory or hub id that describes the architecture; None: the model's own settings say it.
    provider: Bridge's model provider as it was trained, which has the last word on every size: a model made smaller
    than `source` by keys of `model` is exported as what it is. Raises UserError.
    """
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = AutoBridge.from_hf_config(load_config(source)) if source else bridge_for(provider)
    translator, config = translation(found), found.hf_pretrained
    trained = translator.megatron_to_hf_config(provider)
    for name in SIZES:
        fixed = isinstance(getattr(type(config), name, None), property)
        if trained.get(name) is not None and getattr(config, name, trained[name]) != trained[name] and not fixed:
            setattr(config, name, trained[name])
    if pattern := trained.get("hybrid_override_pattern"):
        config.layers_block_type = type(config)(hybrid_override_pattern=pattern).layers_block_type
    if not getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_tied_weights_keys", None):
        config.tie_word_embeddings = False  # NemotronH is never tied in transformers: the head becomes a copy
    for name in ("auto_map", "quantization_config"):  # code of the hub's, and a number format, that are not exported
        if hasattr(config, name):
            delattr(config, name)
    return translator, config
