"""Writes the packed golden checkpoints that tests/packed.rs reads.

    pip install torch transformers safetensors compressed-tensors
    python models/tests/golden/make_packed.py [CASE ...]

Each case is a tiny random checkpoint whose matrices are packed, and `golden.safetensors` with token ids, the
logits that transformers computes in f32 from the unpacked matrices, and every eighth row of two of these. Packing
follows each format's specification; unpacking is done by somebody else's code where there is one to import:
transformers' for fp8 and MXFP4, compressed-tensors' own for its formats. For GPTQ and AWQ it is written out
below, element by element, from their papers' repositories. Deterministic for one version of torch.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HERE = Path(__file__).parent / "packed"
NUM_TOKENS = 17
SHOWN = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
E4M3 = torch.float8_e4m3fn


def words(codes, bits, order=None):
    """Unsigned codes [..., n] to i32 words [..., n * bits / 32], the first code lowest."""
    per_word = 32 // bits
    codes = codes.to(torch.int64).reshape(*codes.shape[:-1], -1, per_word)
    if order is not None:
        codes = codes[..., order]
    shifts = torch.arange(per_word) * bits
    return ((codes << shifts).sum(-1) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32).contiguous()


def groups_of(weight, group):
    rows, columns = weight.shape
    return weight.reshape(rows, columns // group, group)


def asymmetric(weight, group, bits, symmetric):
    """Codes [out, in], scales and zero points [out, groups]: round to nearest."""
    parts, top = groups_of(weight, group), 2**bits - 1
    if symmetric:
        scale = parts.abs().amax(-1) / (top / 2)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale.half().float()).round().clamp(0, top)
    scale = scale.half()
    codes = (parts / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.reshape(weight.shape), scale, zero


def gptq(group, bits=4, symmetric=True, act_order=False, v2=False):
    def pack(name, weight):
        out, inp = weight.shape
        order = torch.randperm(inp) if act_order else torch.arange(inp)
        codes, scale, zero = asymmetric(weight[:, order], group, bits, symmetric)
        if not v2:
            # In the older form 0 is stored as 15, and few files have one.
            zero = zero.clamp(min=1)
            zero[0, 0] = 1 if not symmetric else zero[0, 0]
        stored = zero if v2 else zero - 1
        back = torch.argsort(order)
        g_idx = (torch.arange(inp) // group)[back]
        codes = codes[:, back]
        tensors = {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words(stored.T.contiguous(), bits),
            "scales": scale.T.contiguous(),
            "g_idx": g_idx.to(torch.int32),
        }
        # In f16, as AutoGPTQ computes it: the product is exact before its one rounding.
        exact = (codes - zero[:, g_idx]).double() * scale[:, g_idx].double()
        return tensors, (exact.half() if act_order else exact).float()

    config = dict(quant_method="gptq", bits=bits, group_size=group, sym=symmetric, desc_act=act_order)
    config |= dict(checkpoint_format="gptq_v2") if v2 else dict(damp_percent=0.01, true_sequential=True)
    return pack, config


def awq(group):
    def pack(name, weight):
        codes, scale, zero = asymmetric(weight, group, 4, False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        tensors = {
            "qweight": words(codes.T.contiguous(), 4, order),
            "qzeros": words(zero.T.contiguous(), 4, order),
            "scales": scale.T.contiguous(),
        }
        value = groups_of(codes, group) - zero[..., None]
        return tensors, (value.double() * scale.double()[..., None]).reshape(weight.shape).float()

    return pack, dict(quant_method="awq", bits=4, group_size=group, zero_point=True, version="gemm")


def fp8(block, by_row=False):
    def pack(name, weight):
        rows, columns = weight.shape
        of = (1, columns) if by_row else block or (rows, columns)
        grid = (-(-rows // of[0]), -(-columns // of[1]))
        scale = torch.empty(grid)
        wide = torch.empty_like(weight)
        for i in range(grid[0]):
            for j in range(grid[1]):
                at = (slice(i * of[0], (i + 1) * of[0]), slice(j * of[1], (j + 1) * of[1]))
                scale[i, j] = (weight[at].abs().max() / 448).to(torch.bfloat16)
                wide[at] = scale[i, j]
        codes = (weight / wide).to(E4M3)
        scale = scale.to(torch.bfloat16)
        if rows % grid[0] == 0 and columns % grid[1] == 0 and rows // grid[0] == of[0]:
            value = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
        else:
            # transformers has no blocks that are cut at the edge; the models' own kernels do.
            value = (codes.float() * wide).to(torch.bfloat16)
        if not block and not by_row:
            scale = scale.reshape(())
        return {"weight": codes, "weight_scale_inv": scale}, value.float()

    config = dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", modules_to_not_convert=["lm_head"])
    return pack, config | (dict(weight_block_size=list(block)) if block else {})


def compressed(form, args, act_order=False):
    args = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = PackedQuantizationCompressor if form == "pack-quantized" else NaiveQuantizationCompressor

    def pack(name, weight):
        group, inp = args.group_size or weight.shape[1], weight.shape[1]
        order = torch.randperm(inp) if act_order else torch.arange(inp)
        weight = weight[:, order]
        if args.num_bits == 8 and not args.symmetric:
            # Off centre, so that codes less their zero points take nine bits.
            weight = weight + weight.std()
        parts = groups_of(weight, group)
        top = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
        if args.symmetric:
            scale, zero = parts.abs().amax(-1) / top, None
        else:
            low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
            scale = (high - low) / (2**args.num_bits - 1)
            zero = (-low / scale - top - 1).round().clamp(-top - 1, top).to(torch.int8)
        state = {"weight": weight.bfloat16(), "weight_scale": scale.bfloat16()}
        if zero is not None:
            state["weight_zero_point"] = zero
        state = compressor.compress(state, scheme)
        exact = {key: value for key, value in state.items()}
        # In f32, so that nothing but the scales is rounded; floats are rounded to bf16 as elsewhere.
        exact["weight_scale"] = exact["weight_scale"].float()
        value = compressor.decompress(exact, scheme)["weight"]
        if act_order:
            # Codes stand in the order of the inputs, and each input names its group.
            back = torch.argsort(order)
            codes = unpack_from_int32(state["weight_packed"], args.num_bits, weight.shape)[:, back]
            state["weight_packed"] = pack_to_int32(codes.contiguous(), args.num_bits)
            state["weight_g_idx"] = (torch.arange(inp) // group)[back].to(torch.int32)
            value = value[:, back]
        # What no block format holds is rounded to bf16: floats, groups that lie apart, codes of nine bits.
        rounded = args.type == "float" or act_order or (args.num_bits == 8 and not args.symmetric)
        return state, (value.bfloat16() if rounded else value).float()

    config = dict(
        quant_method="compressed-tensors",
        format=form,
        ignore=["lm_head"],
        kv_cache_scheme=None,
        quantization_status="compressed",
        config_groups=dict(group_0=json.loads(scheme.model_dump_json())),
    )
    return pack, config


CASES = {
    "gptq_sym": gptq(32),
    "gptq_asym": gptq(32, symmetric=False),
    "gptq_asym_v2": gptq(16, symmetric=False, v2=True),
    "gptq_act_order": gptq(32, act_order=True),
    "gptq_int8": gptq(32, bits=8),
    "awq": awq(32),
    "fp8_block": fp8((32, 32)),
    "fp8_cut_block": fp8((40, 48)),
    "fp8_tensor": fp8(None),
    "ct_int4": compressed("pack-quantized", dict(num_bits=4, strategy="group", group_size=32)),
    "ct_int4_asym": compressed(
        "pack-quantized", dict(num_bits=4, strategy="group", group_size=32, symmetric=False)
    ),
    "ct_int8": compressed("int-quantized", dict(num_bits=8, strategy="channel")),
    "ct_fp8": compressed("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
    "ct_pack8": compressed("pack-quantized", dict(num_bits=8, strategy="channel")),
    "ct_int8_asym": compressed("int-quantized", dict(num_bits=8, strategy="channel", symmetric=False)),
    # Written by older versions of compressed-tensors, with "actorder": "group".
    "ct_int4_act_order": compressed(
        "pack-quantized", dict(num_bits=4, strategy="group", group_size=32), act_order=True
    ),
    "fp8_row": fp8(None, by_row=True),
}

CONFIG = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def golden(model, folder, shown):
    tokens = torch.randint(0, 64, (1, NUM_TOKENS))
    logits = model(tokens).logits[0]
    save_file(
        {"tokens": tokens[0].to(torch.int32), "logits": logits} | {f"shown.{k}": v for k, v in shown.items()},
        folder / "golden.safetensors",
    )
    print(f"{folder.name}: |logit| up to {logits.abs().max():.2f}")


def save(folder, tensors, config, quantization):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads(config.to_json_string(use_diff=True)) | dict(quantization_config=quantization)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


@torch.no_grad()
def write(name, pack, quantization):
    config = Qwen3Config(**CONFIG, architectures=["Qwen3ForCausalLM"])
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    tensors, shown = {}, {}
    for key, parameter in model.named_parameters():
        if key.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        else:
            parameter.normal_(0.0, 0.7 if "embed" in key else 1.5 / parameter.shape[1] ** 0.5)
        parameter.copy_(parameter.bfloat16().float())
        stem = key.removesuffix(".weight")
        if stem.endswith("_proj"):
            packed, value = pack(stem, parameter.clone())
            tensors |= {f"{stem}.{ending}": tensor for ending, tensor in packed.items()}
            parameter.copy_(value)
            if stem in SHOWN:
                shown[key] = value[::8].contiguous()
        else:
            tensors[key] = parameter.bfloat16()
    save(HERE / name, tensors, config, quantization)
    golden(model, HERE / name, shown)


@torch.no_grad()
def write_mxfp4(name):
    config = GptOssConfig(
        **CONFIG | dict(hidden_size=32, intermediate_size=32, head_dim=8),
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=5,
        architectures=["GptOssForCausalLM"],
    )
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    tensors, shown = {}, {}
    for key, parameter in model.named_parameters():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, inp, out = parameter.shape
            blocks = torch.randint(0, 256, (experts, out, inp // 32, 16), dtype=torch.uint8)
            scales = torch.randint(122, 126, (experts, out, inp // 32), dtype=torch.uint8)
            value = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            parameter.copy_(value)
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            if key.endswith("down_proj"):
                shown[key] = value.transpose(1, 2).flatten(0, 1)[::8].contiguous()
            continue
        if key.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        elif key.endswith(("bias", "sinks")):
            parameter.normal_(0.0, 0.5)
        else:
            parameter.normal_(0.0, 0.7 if "embed" in key else 1.5 / parameter.shape[1] ** 0.5)
        parameter.copy_(parameter.bfloat16().float())
        tensors[key] = parameter.bfloat16()
    save(HERE / name, tensors, config, dict(quant_method="mxfp4", modules_to_not_convert=["model.embed_tokens"]))
    golden(model, HERE / name, shown)


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for seed, (name, case) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        if not wanted or name in wanted:
            write(name, *case)
    torch.manual_seed(99)
    if not wanted or "mxfp4" in wanted:
        write_mxfp4("mxfp4")
