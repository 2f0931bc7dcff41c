"""Tiny random Hugging Face models, one for every architecture TransformerLens can wrap and that builds offline.

    model = tiny("LlamaForCausalLM")            # keys of ARCHITECTURES are TransformerLens architecture names
    model = tiny("FalconForCausalLM/40b")       # a "/suffix" names another layout of the same architecture
    model(**sample_inputs("LlamaForCausalLM"))  # token ids, plus decoder ids, pixels or a waveform where needed

Every model is float32, in eval mode, without gradients, free of dropout, and the same for the same seed. Widths are
chosen so that a weight matrix is square only where its family leaves no choice: code that guesses an orientation or a
head layout from a shape then fails loudly. Norm gains and biases are random, so no term is hidden by being zero or one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS, CONTEXT = 61, 24, 4, 2, 8, 40, 2, 64
EXPERTS, TOP_K, EXPERT_INNER = 3, 2, 20
SCALE = 0.3  # spread of the weight matrices
JITTER = 0.2  # spread added to every 1-D parameter


class ArchitectureMissing(RuntimeError):  # noqa: N818 - a reason to skip, not a failure
    """The installed transformers has no class for this architecture: a test should skip."""


# Applied to a configuration only where its class declares a field of that name; entries in TABLE win over these.
_COMMON: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd"], HIDDEN),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"], LAYERS),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"], HEADS),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], KV_HEADS),
    **dict.fromkeys(["head_dim", "d_kv", "kv_channels"], HEAD_DIM),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"], INNER),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"], INNER),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], CONTEXT),
    **dict.fromkeys(["max_encoder_position_embeddings", "max_decoder_position_embeddings"], CONTEXT),
    **dict.fromkeys(["initializer_range", "init_std"], SCALE),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "moe_k"], TOP_K),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], EXPERT_INNER),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_intermediate_size"], EXPERT_INNER),
    **dict.fromkeys(["n_shared_experts", "moe_num_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    **dict.fromkeys(["num_nextn_predict_layers", "num_mtp_layers"], 0),
    **dict.fromkeys(["sliding_window", "attention_window_size", "local_attention", "attention_chunk_size"], 4),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "rotary_dim": 4,
    "query_pre_attn_scalar": 10,
    # granite-style scalar multipliers: away from one, so that a forgotten factor shows
    **{"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.4},
    # multi-head latent attention
    **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5},
    # state-space and linear-attention mixers
    **{"state_size": 4, "mamba_d_state": 4, "ssm_state_size": 4, "time_step_rank": 3, "mamba_dt_rank": 3},
    **{"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_num_heads": 6, "mamba_head_dim": 8, "mamba_d_ssm": 48},
    **{"mamba_chunk_size": 4, "chunk_size": 4, "n_groups": 1, "n_mamba_heads": 6},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5},
    # vision and audio towers
    **{"image_size": 16, "patch_size": 8, "num_mel_bins": 16, "classifier_proj_size": 20, "depth": 1},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False},
    **dict.fromkeys(["num_position_embeddings", "position_embedding_size", "max_source_positions"], 16),
    **dict.fromkeys(["out_hidden_size", "projector_hidden_size", "projector_input_dim", "output_proj_dims"], HIDDEN),
    **dict.fromkeys(["projector_output_dim", "vision_output_dim", "mm_embed_dim", "mm_posemb_size"], HIDDEN),
    **dict.fromkeys(["audio_embed_dim", "hidden_size_per_layer_input"], 6),
}

_HALF_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_MHA = {"num_key_value_heads": HEADS}
_MLA = {**_MHA, "head_dim": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_CONVS = {"conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 3)}
_WIDE = {"hidden_size": 32}  # where the head width is hidden_size / heads and must be a multiple of four


def _rows(names: str, fields: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """One table row per blank-separated name, all with the same fields."""
    return {name: dict(fields or {}) for name in names.split()}


def _towers(text: str | None, **towers: str) -> dict[str, dict[str, Any]]:
    """Sub-model slots filled with configurations of the given model types."""
    slots = {name: {"model_type": kind} for name, kind in towers.items()}
    return slots | ({"text_config": {"model_type": text}} if text else {})


# Architecture name, or name/variant -> configuration fields beyond _COMMON; a nested dict configures a sub-model.
TABLE: dict[str, dict[str, Any]] = {
    # decoders
    **_rows(
        """AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM BitNetForCausalLM CohereForCausalLM
        Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM FlexOlmoForCausalLM GemmaForCausalLM Gemma1ForCausalLM
        Glm4ForCausalLM GlmForCausalLM GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM HrmTextForCausalLM
        HunYuanDenseV1ForCausalLM Jais2ForCausalLM JetMoeForCausalLM JetMoEForCausalLM LagunaForCausalLM
        LlamaForCausalLM MiniMaxM2ForCausalLM Ministral3ForCausalLM MistralForCausalLM MixtralForCausalLM
        ModernBertDecoderForCausalLM NanoChatForCausalLM NemotronForCausalLM OlmoForCausalLM Olmo2ForCausalLM
        OlmoeForCausalLM Phi3ForCausalLM PhiMoEForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM
        Qwen3MoeForCausalLM SeedOssForCausalLM Starcoder2ForCausalLM BloomForCausalLM BloomModel CodeGenForCausalLM
        GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM MPTForCausalLM MptForCausalLM OpenAIGPTLMHeadModel
        OPTForCausalLM XGLMForCausalLM"""
    ),
    "LlamaForCausalLM/bias": {"attention_bias": True, "mlp_bias": True},
    "LlamaForCausalLM/tied": {"tie_word_embeddings": True},
    "CohereForCausalLM/qk_norm": {"use_qk_norm": True},
    "Cohere2ForCausalLM": _SLIDING,
    "Gemma2ForCausalLM": _SLIDING,
    "Gemma3ForCausalLM": _SLIDING,
    "Gemma4ForCausalLM": {**_SLIDING, "global_head_dim": 10, "num_experts": None, "moe_intermediate_size": None},
    "VaultGemmaForCausalLM": _SLIDING,
    "Exaone4ForCausalLM": _SLIDING,
    "Olmo3ForCausalLM": _SLIDING,
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0]},
    "Llama4ForCausalLM": {"moe_layers": [1], "no_rope_layers": [1, 0]},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "NeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "GPTNeoXForCausalLM": _WIDE | _HALF_ROPE,
    "GPTNeoXForCausalLM/sequential": _WIDE | _HALF_ROPE | {"use_parallel_residual": False},
    "NeoXForCausalLM": _WIDE | _HALF_ROPE,
    "GPTBigCodeForCausalLM/multi_head": {"multi_query": False},
    "PhiForCausalLM": _WIDE | _HALF_ROPE,
    "StableLmForCausalLM": _WIDE | _HALF_ROPE | {"use_qkv_bias": True},
    "StableLmForCausalLM/parallel": _WIDE | _HALF_ROPE | {"use_parallel_residual": True},
    "OPTForCausalLM/350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 12},
    "BloomForCausalLM/post_residual": {"apply_residual_connection_post_layernorm": True},
    "FalconForCausalLM": {"num_kv_heads": None},
    "FalconForCausalLM/bias": {"num_kv_heads": None, "bias": True},
    "FalconForCausalLM/40b": {"new_decoder_architecture": True, "multi_query": False},
    "FalconForCausalLM/rw": {
        **{"num_kv_heads": None, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    },
    # latent attention, mixtures of experts
    "YoutuForCausalLM": _MLA,
    "DeepseekV2ForCausalLM": _MLA | {"first_k_dense_replace": 1},
    "DeepseekV3ForCausalLM": _MLA | {"first_k_dense_replace": 1},
    "DeepseekV4ForCausalLM": {
        **{"o_groups": 2, "o_lora_rank": 6, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 2, "hc_mult": 2},
        **{"num_key_value_heads": 1, "partial_rotary_factor": 0.5},
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "GlmMoeDsaForCausalLM": _MLA | _SPARSE | {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    "Glm4MoeForCausalLM": {"first_k_dense_replace": 1},
    "Glm4MoeLiteForCausalLM": _MHA | _SPARSE,
    # state-space, recurrent and hybrid
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "FalconH1ForCausalLM": {},
    "FalconMambaForCausalLM": {},
    "GraniteMoeHybridForCausalLM": _MIXED | {"position_embedding_type": "rope"},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MambaForCausalLM": {},
    "Mamba2ForCausalLM": {"num_heads": 6},
    "NemotronHForCausalLM": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
    },
    "OlmoHybridForCausalLM": _MIXED,
    "Qwen3NextForCausalLM": _MIXED,
    "Qwen3_5ForCausalLM": _MIXED,
    "Qwen3_5MoeForCausalLM": _MIXED,
    "RecurrentGemmaForCausalLM": {"block_types": ("recurrent", "attention"), "lru_width": 32},
    "RwkvForCausalLM": {},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"]},
    # encoders and encoder-decoders
    "BertForMaskedLM": {},
    "BertLMHeadModel": {"is_decoder": True},
    "RobertaForMaskedLM": {},
    **_rows(
        """BartForConditionalGeneration BlenderbotForConditionalGeneration M2M100ForConditionalGeneration MarianMTModel
        MBartForConditionalGeneration PegasusForConditionalGeneration T5ForConditionalGeneration T5WithLMHeadModel
        MT5ForConditionalGeneration"""
    ),
    "T5ForConditionalGeneration/gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "LEDForConditionalGeneration": {"attention_window": 4},
    "LongT5ForConditionalGeneration": {"local_radius": 3, "global_block_size": 4},
    "LongT5ForConditionalGeneration/global": {"encoder_attention_type": "transient-global", "global_block_size": 4},
    "SwitchTransformersForConditionalGeneration": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "T5GemmaForConditionalGeneration": {"encoder": _SLIDING, "decoder": _SLIDING},
    "T5Gemma2ForConditionalGeneration": {
        "encoder": {"text_config": _SLIDING, "vision_config": {"model_type": "siglip_vision_model"}},
        "decoder": _SLIDING,
    },
    # vision and audio
    **_rows("ViTModel ViTForImageClassification DeiTModel DeiTForImageClassification"),
    "ASTForAudioClassification": {"max_length": 32, "frequency_stride": 8, "time_stride": 8},
    **_rows("HubertForCTC HubertModel Wav2Vec2ForCTC Wav2Vec2ForPreTraining Wav2Vec2Model", _CONVS),
    # multimodal (run on text)
    "AudioFlamingo3ForConditionalGeneration": _towers("qwen2", audio_config="audioflamingo3_encoder"),
    "MusicFlamingoForConditionalGeneration": _towers("qwen2", audio_config="audioflamingo3_encoder"),
    "Qwen2AudioForConditionalGeneration": _towers("qwen2", audio_config="qwen2_audio_encoder"),
    "GlmAsrForConditionalGeneration": _towers("llama", audio_config="glmasr_encoder"),
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<image>": 60, "<|extra_200|>": 59, "<|visual token 000000|>": 58},
        "vq_config": {"base_channels": 32, "codebook_size": 8, "channel_multiplier": (1,), "num_res_blocks": 1},
    },
    "Florence2ForConditionalGeneration": {
        "text_config": {"model_type": "bart"},
        "vision_config": {
            **{"depths": (1,), "patch_size": (4,), "patch_stride": (4,), "patch_padding": (0,), "embed_dim": (24,)},
            **{"patch_prenorm": (False,), "num_heads": (4,), "num_groups": (4,), "projection_dim": 24},
            "window_size": 2,
        },
    },
    "Gemma3ForConditionalGeneration": _towers(None, vision_config="siglip_vision_model") | {"text_config": _SLIDING},
    "Gemma4ForConditionalGeneration": {
        "text_config": {**_SLIDING, "global_head_dim": 10, "num_experts": None, "moe_intermediate_size": None},
        "audio_config": {"subsampling_conv_channels": (4, 4)},
    },
    "Gemma4UnifiedForConditionalGeneration": {"text_config": {**_SLIDING, "global_head_dim": 10}},
    "Glm4vForConditionalGeneration": {"text_config": _WIDE | _MROPE},
    "Idefics3ForConditionalGeneration": _towers("llama"),
    "Llama4ForConditionalGeneration": {"text_config": {"moe_layers": [1], "no_rope_layers": [1, 0]}},
    "LlavaForConditionalGeneration": _towers("llama", vision_config="clip_vision_model"),
    "LlavaNextForConditionalGeneration": _towers("llama", vision_config="clip_vision_model"),
    "LlavaOnevisionForConditionalGeneration": _towers("qwen2", vision_config="siglip_vision_model"),
    "Mistral3ForConditionalGeneration": _towers("mistral", vision_config="pixtral"),
    "MuseGlimmerForConditionalGeneration": {"text_config": _SLIDING},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": _WIDE | _MROPE, "vision_config": {"out_hidden_size": 32}},
    "Qwen3VLForConditionalGeneration": {
        "text_config": _MROPE,
        "vision_config": {"deepstack_visual_indexes": (0,)},
    },
    "Qwen3VLMoeForConditionalGeneration": {
        "text_config": _MROPE,
        "vision_config": {"deepstack_visual_indexes": (0,)},
    },
    "Qwen3_5ForConditionalGeneration": {"text_config": _MIXED},
    "Qwen3_5MoeForConditionalGeneration": {"text_config": _MIXED},
}

# TransformerLens name -> class name in transformers, where the two differ.
_CLASS_NAMES: dict[str, str] = {
    "Gemma1ForCausalLM": "GemmaForCausalLM",
    "JetMoEForCausalLM": "JetMoeForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
    "NeoForCausalLM": "GPTNeoForCausalLM",
    "NeoXForCausalLM": "GPTNeoXForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
}

_REMOTE = "its code is not part of transformers (remote code on the Hub)"
_FOREIGN = "not a transformers model: the adapter wraps a module tree from another code base"
_REMOTE_NAMES = """BaiChuanForCausalLM BaichuanForCausalLM BD3LM DreamModel ExaoneForCausalLM GiddForDiffusionLM
    HyenaDNAForCausalLM InternLM2ForCausalLM LLaDA2MoeModelLM LLaDAModelLM OpenELMForCausalLM OuroForCausalLM
    QwenForCausalLM RavenForCausalLM RWKV7ForCausalLM"""
_FOREIGN_NAMES = """GPT2LMHeadCustomModel MinGPTForCausalLM NanoGPTForCausalLM NeelSoluOldForCausalLM
    TransformerLensPretrain"""
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(_REMOTE_NAMES.split(), _REMOTE),
    **dict.fromkeys(_FOREIGN_NAMES.split(), _FOREIGN),
    "TransformerLensNative": "TransformerLens' own module: build it with TransformerBridge.boot_native",
    "Gemma3nForConditionalGeneration": "its vision tower needs the package timm",
}


def bridge_name(key: str) -> str:
    """The TransformerLens architecture name of a key of ARCHITECTURES or TABLE."""
    return key.partition("/")[0]


def _model_class(key: str) -> type[PreTrainedModel]:
    name = bridge_name(key)
    name = _CLASS_NAMES.get(name, name)
    try:
        return getattr(transformers, name)
    except AttributeError:
        raise ArchitectureMissing(f"transformers {transformers.__version__} has no class {name}") from None


def _make_config(cls: type, overrides: dict[str, Any]) -> Any:
    """The tiny configuration of class `cls`; an AutoConfig slot takes its class from overrides["model_type"]."""
    overrides = dict(overrides)
    if cls is transformers.AutoConfig:
        cls = transformers.CONFIG_MAPPING[overrides.pop("model_type")]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in _COMMON:
            values[field.name] = _COMMON[field.name]
        elif "drop" in field.name and isinstance(field.default, float):
            values[field.name] = 0.0
    for name, sub in cls.sub_configs.items():
        if sub is not transformers.AutoConfig or "model_type" in overrides.get(name, {}):
            values[name] = _make_config(sub, overrides.pop(name, {}))
    return cls(**(values | overrides))


def _build(key: str, seed: int = 0) -> PreTrainedModel:
    cls = _model_class(key)
    config = _make_config(cls.config_class, TABLE[key])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, attn_implementation="eager").float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, SCALE)
                else:
                    parameter.add_(torch.randn_like(parameter) * JITTER)
    return model.eval().requires_grad_(False)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    key: functools.partial(_build, key) for key in TABLE if "/" not in key
}


def tiny(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A fresh tiny model of the architecture; two calls with the same seed give identical models."""
    if architecture in NOT_BUILT:
        raise ArchitectureMissing(f"{architecture}: {NOT_BUILT[architecture]}")
    return _build(architecture, seed)


def sample_inputs(architecture: str, seed: int = 0, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Keyword arguments for one forward pass of `tiny(architecture)`."""
    rng = torch.Generator().manual_seed(seed)
    cls = _model_class(architecture)
    if cls.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=rng)}
    if cls.main_input_name == "input_values":
        shape = (batch, 32, 16) if architecture.startswith("AST") else (batch, 64)
        return {"input_values": torch.randn(*shape, generator=rng)}
    tokens = torch.randint(0, VOCAB, (batch, length), generator=rng)
    if cls.config_class.is_encoder_decoder:
        decoder = torch.randint(0, VOCAB, (batch, length - 2), generator=rng)
        return {"input_ids": tokens, "decoder_input_ids": decoder}
    return {"input_ids": tokens}
