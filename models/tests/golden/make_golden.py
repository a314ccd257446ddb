"""Writes the golden checkpoints and logits that tests/golden.rs reads.

    pip install torch transformers safetensors
    python models/tests/golden/make_golden.py [CASE ...]

Each case is a tiny random checkpoint as Hugging Face transformers saves it, and `golden.safetensors`
with the token ids, and the logits that transformers computes for them in f32: the prompt in one pass,
the rest token by token over its KV cache. Deterministic for one version of torch; the files in the
repository were made with torch 2 and transformers 5.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = Path(__file__).parent
NUM_PROMPT_TOKENS = 13
NUM_TOKENS = 19

SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=5000.0, factor=2.5)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=3.0)
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=16)
# DeepSeek's spelling: gains instead of a factor on cosines and sines, and a ramp at fractions of channels.
YARN_GAINS = YARN | dict(mscale=0.9, mscale_all_dim=0.4, beta_fast=20.0, beta_slow=2.0, truncate=False)
# Half of a head of 16 turns: 4 frequencies. The prompt is longer than the 8 tokens of pretraining, so
# transformers uses the long factors from the first pass on, as we do.
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    partial_rotary_factor=0.5,
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.0, 2.5, 4.0, 7.5],
    original_max_position_embeddings=8,
)
# Latent attention, and experts behind a first dense layer.
DEEPSEEK = SHAPE | dict(
    num_hidden_layers=3,
    num_key_value_heads=4,
    kv_lora_rank=20,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=10,
    moe_intermediate_size=12,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
)
DEEPSEEK_YARN = YARN | dict(mscale=0.9, mscale_all_dim=0.4)
# Shorter than the prompt, and than any window that would hide a mistake by one.
WINDOW = 5

CASES = {
    "llama_plain": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True), torch.bfloat16),
    "llama_rope_llama3": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3),
        torch.bfloat16,
    ),
    "llama_biases": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
        torch.float16,
    ),
    "llama_head_dim": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE | dict(num_key_value_heads=1, head_dim=12), rms_norm_eps=1e-5),
        torch.bfloat16,
    ),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True), torch.bfloat16),
    "qwen2_untied": (
        Qwen2ForCausalLM,
        Qwen2Config(**SHAPE | dict(num_hidden_layers=1), tie_word_embeddings=False),
        torch.float32,
    ),
    "llama_rope_dynamic": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=DYNAMIC),
        torch.bfloat16,
    ),
    "llama_rope_yarn": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=YARN),
        torch.bfloat16,
    ),
    "llama_rope_yarn_gains": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=YARN_GAINS),
        torch.bfloat16,
    ),
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **SHAPE,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=1,
        ),
        torch.bfloat16,
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(**SHAPE | dict(head_dim=12), attention_bias=True, tie_word_embeddings=True),
        torch.bfloat16,
    ),
    "mistral_window": (
        MistralForCausalLM,
        MistralConfig(**SHAPE, sliding_window=WINDOW, tie_word_embeddings=False),
        torch.bfloat16,
    ),
    "starcoder2": (
        Starcoder2ForCausalLM,
        Starcoder2Config(**SHAPE, sliding_window=WINDOW, use_bias=True, tie_word_embeddings=True),
        torch.bfloat16,
    ),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig(
            **SHAPE,
            attention_bias=True,
            mlp_bias=True,
            embedding_multiplier=3.5,
            attention_multiplier=0.6,
            residual_multiplier=0.4,
            logits_scaling=2.5,
            tie_word_embeddings=True,
        ),
        torch.bfloat16,
    ),
    "phi3_longrope": (
        Phi3ForCausalLM,
        Phi3Config(
            **SHAPE | dict(num_attention_heads=2, num_key_value_heads=1),
            original_max_position_embeddings=8,
            rope_parameters=LONGROPE,
            sliding_window=7,
        ),
        torch.bfloat16,
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **SHAPE | dict(head_dim=12),
            query_pre_attn_scalar=20,
            sliding_window=WINDOW,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
            attention_bias=True,
        ),
        torch.bfloat16,
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SHAPE | dict(head_dim=12, num_hidden_layers=3),
            query_pre_attn_scalar=20,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=4.0, rope_theta=50000.0),
                sliding_attention=dict(rope_type="default", rope_theta=300.0),
            ),
        ),
        torch.bfloat16,
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**SHAPE, attention_bias=True), torch.bfloat16),
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config(
            **SHAPE | dict(num_hidden_layers=3),
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=WINDOW,
            attention_bias=True,
            mlp_bias=True,
        ),
        torch.bfloat16,
    ),
    "glm4": (
        Glm4ForCausalLM,
        Glm4Config(**SHAPE | dict(head_dim=16), attention_bias=True),
        torch.bfloat16,
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SHAPE | dict(num_hidden_layers=3),
            moe_intermediate_size=12,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            tie_word_embeddings=True,
        ),
        torch.bfloat16,
    ),
    "qwen3_moe_shares": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SHAPE,
            moe_intermediate_size=12,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            tie_word_embeddings=True,
        ),
        torch.bfloat16,
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig(
            **SHAPE | dict(head_dim=8, intermediate_size=16),
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            swiglu_limit=1.5,
            rope_parameters=YARN | dict(truncate=False),
            tie_word_embeddings=True,
        ),
        torch.bfloat16,
    ),
    # The shape of DeepSeek-Coder-V2-Lite: queries without a latent.
    "deepseek_v2_lite": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config(**DEEPSEEK, q_lora_rank=None, n_shared_experts=2, rope_parameters=DEEPSEEK_YARN),
        torch.bfloat16,
    ),
    "deepseek_v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config(
            **DEEPSEEK,
            q_lora_rank=14,
            n_shared_experts=1,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-3,
        ),
        torch.bfloat16,
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **DEEPSEEK,
            q_lora_rank=14,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            attention_bias=True,
            rope_parameters=DEEPSEEK_YARN,
        ),
        torch.bfloat16,
    ),
    "deepseek_v3_half_split": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **DEEPSEEK | dict(num_hidden_layers=2),
            q_lora_rank=None,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            rope_interleave=False,
        ),
        torch.bfloat16,
    ),
}


def randomise(model):
    """Larger weights than a fresh model's, so that every part of it matters for the logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            # Gemma's are stored less one.
            parameter.normal_(0.0 if "Gemma" in type(model).__name__ else 1.0, 0.2)
        elif name.endswith(("bias", "sinks")):
            parameter.normal_(0.0, 0.5)
        elif name.endswith("experts.gate_up_proj") and parameter.shape[1] == model.config.hidden_size:
            # gpt-oss: [experts, in, out].
            parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
        elif ".experts." in name:
            parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter.normal_(0.0, 0.7)
        else:
            parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)


def randomise_buffers(model):
    """DeepSeek-V3 keeps the bias by which experts are chosen out of the parameters."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.2)


def fix_dynamic_scaling(model):
    """Frequencies of the longest context from the first token on, as every server with a cache has them.

    transformers computes them anew as the context grows, and leaves the keys in its cache as they were.
    """
    rope = model.model.rotary_emb
    if rope.rope_type == "dynamic":
        config = model.config
        longest = int(config.rope_parameters["factor"] * config.max_position_embeddings)
        rope.inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=longest)
        rope.rope_type = "default"


@torch.no_grad()
def write(name, model_class, config, dtype):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    # The families' own lie outside the tiny vocabulary.
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    model = model_class(config)
    randomise(model)
    randomise_buffers(model)
    model.to(dtype).save_pretrained(folder)
    # Loaded afresh: `model.to(torch.float32)` would keep the rotary frequencies rounded to `dtype`.
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    fix_dynamic_scaling(model)

    tokens = torch.randint(0, config.vocab_size, (1, NUM_TOKENS))
    output = model(tokens[:, :NUM_PROMPT_TOKENS], use_cache=True)
    logits = [output.logits[0]]
    for index in range(NUM_PROMPT_TOKENS, NUM_TOKENS):
        output = model(
            tokens[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True
        )
        logits.append(output.logits[0])
    golden = {"tokens": tokens[0].to(torch.int32), "logits": torch.cat(logits)}
    save_file(golden, folder / "golden.safetensors")
    print(f"{name}: |logit| up to {golden['logits'].abs().max():.2f}")


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for seed, (name, case) in enumerate(CASES.items()):
        if not wanted or name in wanted:
            torch.manual_seed(seed)
            write(name, *case)
