"""Writes the drafting heads, their targets and the logits that tests/golden_heads.rs reads.

    pip install torch transformers safetensors
    python models/tests/golden/make_heads.py

Targets are tiny random checkpoints as Hugging Face transformers saves them; the heads' arithmetic is written
down below, from the papers and from what the trainers' own code computes (SafeAILab/EAGLE, XiaomiMiMo/MiMo). The
layer of a DeepSeek's head is transformers' own.
A case holds `tokens`; `logits` after each of them but the first, each from the target's hidden state at the token
before; and a chain of drafts: the tokens that the head likes best, and the logits after them, made from
the head's own hidden states. Deterministic for one version of torch.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu, softmax
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

HERE = Path(__file__).parent / "heads"
NUM_TOKENS = 19
NUM_DRAFTED = 5
NEVER = -1e30

HIDDEN, VOCAB, LAYERS = 16, 64, 7
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
EPS = 1e-5


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


class Layer:
    """A Llama's decoder layer over all rows at once, without the norm before its attention."""

    def __init__(self, weights, prefix, num_heads, num_kv_heads, theta):
        self.get = lambda name: weights[prefix + name].float()
        self.bias = lambda name: weights[prefix + name].float() if prefix + name in weights else 0.0
        self.num_heads, self.num_kv_heads, self.theta = num_heads, num_kv_heads, theta

    def rotate(self, x):
        half = x.shape[-1] // 2
        frequencies = self.theta ** (-torch.arange(half) / half)
        angles = torch.arange(x.shape[1])[:, None] * frequencies
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(self, x):
        def heads(name, count):
            y = x @ self.get(f"self_attn.{name}.weight").T + self.bias(f"self_attn.{name}.bias")
            return y.view(len(x), count, -1).transpose(0, 1)

        group = self.num_heads // self.num_kv_heads
        q = self.rotate(heads("q_proj", self.num_heads))
        k = self.rotate(heads("k_proj", self.num_kv_heads)).repeat_interleave(group, 0)
        v = heads("v_proj", self.num_kv_heads).repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
        mixed = (softmax(scores, -1) @ v).transpose(0, 1).reshape(len(x), -1)
        return mixed @ self.get("self_attn.o_proj.weight").T + self.bias("self_attn.o_proj.bias")

    def feed_forward(self, x):
        gate, up = (x @ self.get(f"mlp.{name}_proj.weight").T for name in ["gate", "up"])
        return (silu(gate) * up) @ self.get("mlp.down_proj.weight").T

    def __call__(self, x, residual):
        residual = residual + self.attention(x)
        return residual + self.feed_forward(norm(residual, self.get("post_attention_layernorm.weight")))


def eagle3(weights, layer, embed, config):
    """From (embeddings, features before them) to (guessed features, logits over the head's outputs)."""

    def forward(tokens, features):
        token = norm(embed[tokens], layer.get("input_layernorm.weight"))
        hidden = norm(features, layer.get("hidden_norm.weight"))
        residual = hidden if config.get("norm_before_residual") else features
        out = layer(torch.cat([token, hidden], -1), residual)
        return out, norm(out, weights["norm.weight"].float()) @ weights["lm_head.weight"].float().T

    return forward


def mimo(layer, embed, lm_head):
    def forward(tokens, features):
        token = norm(embed[tokens], layer.get("token_layernorm.weight"))
        hidden = norm(features, layer.get("hidden_layernorm.weight"))
        x = torch.cat([hidden, token], -1) @ layer.get("input_proj.weight").T
        out = layer(norm(x, layer.get("input_layernorm.weight")), x)
        out = norm(out, layer.get("final_layernorm.weight"))
        return out, out @ lm_head.T

    return forward


def deepseek(weights, layer, rotary, embed, lm_head):
    def forward(tokens, features):
        token = norm(embed[tokens], weights["enorm.weight"])
        hidden = norm(features, weights["hnorm.weight"])
        x = (torch.cat([token, hidden], -1) @ weights["eh_proj.weight"].T)[None]
        mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)[None, None]
        positions = torch.arange(len(tokens))[None]
        out = layer(x, attention_mask=mask, position_embeddings=rotary(x, positions))[0]
        out = norm(out, weights["shared_head.norm.weight"])
        return out, out @ lm_head.T

    return forward


def spread(logits, to_target):
    row = torch.full((*logits.shape[:-1], VOCAB), NEVER)
    row[..., to_target] = logits
    return row


def save(folder, forward, tokens, features, to_target):
    """`features[i]` are those of token `i`; the head's row of token `t` reads `features[t - 1]`."""
    guesses, logits = forward(tokens[1:], features[:-1])
    golden = {"tokens": tokens.to(torch.int32), "logits": spread(logits, to_target)}
    # While it drafts, a head has nothing but its own guesses from the last token on.
    features, drafted, chain = torch.cat([features[:-1], guesses[-1:]]), [], []
    for _ in range(NUM_DRAFTED):
        token = to_target[logits[-1].argmax()]
        drafted.append(token)
        tokens = torch.cat([tokens, token[None]])
        guesses, logits = forward(tokens[1:], features)
        features = torch.cat([features, guesses[-1:]])
        chain.append(spread(logits[-1], to_target))
    golden |= {"drafted": torch.stack(drafted).to(torch.int32), "chain": torch.stack(chain)}
    save_file(golden, folder / "golden.safetensors")


def random(generator, *shape, scale=0.4):
    return torch.randn(*shape, generator=generator) * scale


def random_layer(generator, prefix, attn_width, norms):
    weights = {
        "self_attn.q_proj.weight": random(generator, HIDDEN, attn_width),
        "self_attn.k_proj.weight": random(generator, HIDDEN // 2, attn_width),
        "self_attn.v_proj.weight": random(generator, HIDDEN // 2, attn_width),
        "self_attn.o_proj.weight": random(generator, HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": random(generator, 24, HIDDEN),
        "mlp.up_proj.weight": random(generator, 24, HIDDEN),
        "mlp.down_proj.weight": random(generator, HIDDEN, 24),
    }
    weights |= {f"{name}.weight": 1 + random(generator, HIDDEN, scale=0.2) for name in norms}
    return {prefix + name: weight for name, weight in weights.items()}


def save_config(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def save_target(folder, model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter) if "norm" in name else 0.4 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def hidden_states(model, tokens):
    """The residual stream after 0, 1, ... layers, and what the output matrix reads."""
    states = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: states.append((args or tuple(kwargs.values()))[0][0]), with_kwargs=True)
        for layer in model.model.layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0][0])))
    last = model.model(tokens[None]).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return states, last


LAYER_CONFIG = SHAPE | dict(model_type="llama", num_hidden_layers=1, rms_norm_eps=EPS, hidden_act="silu")
EAGLE_NORMS = ["input_layernorm", "hidden_norm", "post_attention_layernorm"]
MIMO_NORMS = ["token_layernorm", "hidden_layernorm", "input_layernorm", "post_attention_layernorm", "final_layernorm"]


@torch.no_grad()
def main():
    shutil.rmtree(HERE, ignore_errors=True)
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)

    target = LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=EPS, tie_word_embeddings=False)).float()
    save_target(HERE / "llama", target)
    states, _ = hidden_states(target, tokens)

    # EAGLE's own form: the usual three layers, fewer outputs than tokens, the target's embedding.
    folder = HERE / "eagle3"
    config = LAYER_CONFIG | dict(
        architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=24, rope_theta=500.0, tie_word_embeddings=False
    )
    save_config(folder, config)
    to_target = torch.randperm(VOCAB, generator=generator)[:24].sort().values
    weights = random_layer(generator, "midlayer.", 2 * HIDDEN, EAGLE_NORMS) | {
        "fc.weight": random(generator, HIDDEN, 3 * HIDDEN),
        "norm.weight": 1 + random(generator, HIDDEN, scale=0.2),
        "lm_head.weight": random(generator, 24, HIDDEN),
    }
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[to_target] = True
    save_file(weights | {"d2t": to_target - torch.arange(24), "t2d": mask}, folder / "model.safetensors")
    layer = Layer(weights, "midlayer.", 2, 1, 500.0)
    features = torch.cat([states[i] for i in [2, LAYERS // 2, LAYERS - 3]], -1) @ weights["fc.weight"].float().T
    embed = target.model.embed_tokens.weight
    save(folder, eagle3(weights, layer, embed, config), tokens, features, to_target)

    # That of the speculators library: named layers, the last one's output among them, all tokens, an embedding of
    # its own, biases, and a stream that begins with the norm.
    folder = HERE / "speculators"
    config = dict(
        architectures=["Eagle3Speculator"],
        speculators_model_type="eagle3",
        speculators_config=dict(algorithm="eagle3"),
        draft_vocab_size=VOCAB,
        norm_before_residual=True,
        target_hidden_size=None,
        eagle_aux_hidden_state_layer_ids=[0, 3, LAYERS],
        transformer_layer_config=LAYER_CONFIG | dict(attention_bias=True, rope_theta=10000.0),
    )
    save_config(folder, config)
    weights = random_layer(generator, "layers.0.", 2 * HIDDEN, EAGLE_NORMS) | {
        "layers.0.self_attn.q_proj.bias": random(generator, HIDDEN),
        "layers.0.self_attn.k_proj.bias": random(generator, HIDDEN // 2),
        "layers.0.self_attn.v_proj.bias": random(generator, HIDDEN // 2),
        "layers.0.self_attn.o_proj.bias": random(generator, HIDDEN),
        "fc.weight": random(generator, HIDDEN, 3 * HIDDEN),
        "norm.weight": 1 + random(generator, HIDDEN, scale=0.2),
        "lm_head.weight": random(generator, VOCAB, HIDDEN),
        "embed_tokens.weight": random(generator, VOCAB, HIDDEN),
    }
    save_file(weights, folder / "model.safetensors")
    layer = Layer(weights, "layers.0.", 2, 1, 10000.0)
    features = torch.cat([states[i] for i in [0, 3, LAYERS]], -1) @ weights["fc.weight"].T
    save(folder, eagle3(weights, layer, weights["embed_tokens.weight"], config), tokens, features, torch.arange(VOCAB))

    # MiMo: a Qwen2 that carries its head.
    folder = HERE / "mimo"
    target = Qwen2ForCausalLM(
        Qwen2Config(**SHAPE | dict(num_hidden_layers=2), rms_norm_eps=EPS, tie_word_embeddings=False)
    ).float()
    save_target(folder, target)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(model_type="mimo", architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)
    save_config(folder, config)
    prefix = "model.mtp_layers.0."
    weights = random_layer(generator, prefix, HIDDEN, MIMO_NORMS) | {
        f"{prefix}self_attn.q_proj.bias": random(generator, HIDDEN),
        f"{prefix}self_attn.k_proj.bias": random(generator, HIDDEN // 2),
        f"{prefix}self_attn.v_proj.bias": random(generator, HIDDEN // 2),
        f"{prefix}input_proj.weight": random(generator, HIDDEN, 2 * HIDDEN),
    }
    save_file(load_file(folder / "model.safetensors") | weights, folder / "model.safetensors")
    _, features = hidden_states(target, tokens)
    layer = Layer(weights, prefix, 2, 1, 10000.0)
    forward = mimo(layer, target.model.embed_tokens.weight, target.lm_head.weight)
    save(folder, forward, tokens, features, torch.arange(VOCAB))

    # DeepSeek-V3: its head is one more layer, with latent attention and experts, behind the others.
    folder = HERE / "deepseek"
    config = DeepseekV3Config(
        **SHAPE | dict(num_hidden_layers=2, num_key_value_heads=2),
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
        q_lora_rank=10,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=12,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
    )
    target = DeepseekV3ForCausalLM(config).float()
    save_target(folder, target)
    config_json = json.loads((folder / "config.json").read_text())
    save_config(folder, config_json | dict(num_nextn_predict_layers=1))
    layer = DeepseekV3DecoderLayer(config, 2).float()
    for name, tensor in layer.state_dict().items():
        tensor.copy_((1 if "norm" in name else 0) + random(generator, *tensor.shape, scale=0.2 if "norm" in name else 0.4))
    head = {
        "enorm.weight": 1 + random(generator, HIDDEN, scale=0.2),
        "hnorm.weight": 1 + random(generator, HIDDEN, scale=0.2),
        "eh_proj.weight": random(generator, HIDDEN, 2 * HIDDEN),
        "shared_head.norm.weight": 1 + random(generator, HIDDEN, scale=0.2),
    }
    weights = {}
    for name, tensor in (layer.state_dict() | head).items():
        match name:
            case "mlp.experts.gate_up_proj":
                for expert, both in enumerate(tensor):
                    for half, rows in zip(["gate", "up"], both.chunk(2)):
                        weights[f"mlp.experts.{expert}.{half}_proj.weight"] = rows.clone()
            case "mlp.experts.down_proj":
                weights |= {f"mlp.experts.{expert}.down_proj.weight": x.clone() for expert, x in enumerate(tensor)}
            case _:
                weights[name] = tensor
    # Published files have the shared matrices a second time.
    weights |= {"embed_tokens.weight": target.model.embed_tokens.weight, "shared_head.head.weight": target.lm_head.weight}
    weights = {f"model.layers.2.{name}": tensor.clone() for name, tensor in weights.items()}
    save_file(load_file(folder / "model.safetensors") | weights, folder / "model.safetensors")
    _, features = hidden_states(target, tokens)
    embed, lm_head = target.model.embed_tokens.weight, target.lm_head.weight
    forward = deepseek(head, layer, target.model.rotary_emb, embed, lm_head)
    save(folder, forward, tokens, features, torch.arange(VOCAB))


main()
