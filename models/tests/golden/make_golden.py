"""Writes the golden checkpoints and logits that tests/golden.rs reads.

    pip install torch transformers safetensors
    python models/tests/golden/make_golden.py

Each case is a tiny random checkpoint as Hugging Face transformers saves it, and `golden.safetensors`
with the token ids, and the logits that transformers computes for them in f32: the prompt in one pass,
the rest token by token over its KV cache. Deterministic for one version of torch; the files in the
repository were made with torch 2 and transformers 5.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

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
}


def randomise(model):
    """Larger weights than a fresh model's, so that every part of it matters for the logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.5)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter.normal_(0.0, 0.7)
        else:
            parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)


@torch.no_grad()
def write(name, model_class, config, dtype):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model = model_class(config)
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    # Loaded afresh: `model.to(torch.float32)` would keep the rotary frequencies rounded to `dtype`.
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

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
    for seed, (name, case) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        write(name, *case)
