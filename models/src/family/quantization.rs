//! `quantization_config`: how a checkpoint's matrices are packed. What changes what they stand for is read and
//! checked; the rest of such a section is the quantiser's own bookkeeping (its data, its damping, its kernels).

use serde_json::{Map, Value};

use std::path::Path;

use super::options::Options;
use crate::ModelError;
use crate::weights::Packing;

const SECTION: &str = "quantization_config";
const METHODS: &str = "\"fp8\", \"gptq\", \"awq\", \"compressed-tensors\" or \"mxfp4\"";
const MAX_BLOCK: usize = 1 << 20;

/// What `json`, a `config.json`, says of the matrices; `None` where they are plain. `path` is for messages.
pub(crate) fn read(path: &Path, json: &Map<String, Value>) -> Result<Option<Packing>, ModelError> {
    let text = json.get("text_config").and_then(Value::as_object);
    let Some(holder) = [Some(json), text].into_iter().flatten().find(|json| json.contains_key(SECTION))
    else {
        return Ok(None);
    };
    let Some(options) = Options::new(path, holder).object(SECTION, "quantization_config.")? else {
        return Ok(None);
    };
    match options.string("quant_method")? {
        Some("fp8") => fp8(&options),
        Some("gptq") => gptq(&options),
        Some("awq") => awq(&options),
        Some("compressed-tensors") => compressed(&options),
        Some("mxfp4") => Ok(Packing::Mxfp4),
        _ => Err(options.error("quant_method", METHODS)),
    }
    .map(Some)
}

fn fp8(options: &Options<'_>) -> Result<Packing, ModelError> {
    one_of(options, "fmt", &["e4m3"])?;
    one_of(options, "scale_fmt", &["float", "ue8m0"])?;
    Ok(Packing::Fp8 { block: block(options, "weight_block_size")? })
}

fn gptq(options: &Options<'_>) -> Result<Packing, ModelError> {
    let bits = match options.count("bits", 0)? {
        bits @ (4 | 8) => bits,
        _ => return Err(options.error("bits", "4 or 8")),
    };
    one_of(options, "pack_dtype", &["int32"])?;
    none_of(options, &["is_marlin_format", "dynamic", "adapter", "rotation"])?;
    let key = if options.has("checkpoint_format") { "checkpoint_format" } else { "format" };
    one_of(options, key, &["gptq", "gptq_v2"])?;
    let newer = options.string(key)? == Some("gptq_v2");
    Ok(Packing::Gptq { bits, zeros_less_one: !newer })
}

fn awq(options: &Options<'_>) -> Result<Packing, ModelError> {
    let key = if options.has("bits") { "bits" } else { "w_bit" };
    if options.count(key, 0)? != 4 {
        return Err(options.error(key, "4"));
    }
    if !options.bool("zero_point", true)? {
        return Err(options.error("zero_point", "true"));
    }
    let version = options.string("version")?.map(str::to_lowercase);
    if version.is_some_and(|version| version != "gemm") {
        return Err(options.error("version", "\"gemm\""));
    }
    Ok(Packing::Awq)
}

fn compressed(options: &Options<'_>) -> Result<Packing, ModelError> {
    const FORMATS: [&str; 5] =
        ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"];
    one_of(options, "format", &FORMATS)?;
    if let Some(sparsity) = options.object("sparsity_config", "quantization_config.sparsity_config.")? {
        one_of(&sparsity, "format", &["dense"])?;
    }
    none_of(options, &["transform_config"])?;
    let groups = options.object("config_groups", "quantization_config.config_groups.")?;
    let groups = groups.ok_or_else(|| options.error("config_groups", "an object with a group"))?;
    let mut shared = None;
    for name in groups.keys() {
        let Some(group) = groups.object(name, "quantization_config.config_groups.*.")? else { continue };
        one_of(&group, "format", &FORMATS)?;
        let Some(weights) = group.object("weights", "quantization_config.config_groups.*.weights.")? else {
            continue;
        };
        one_of(&weights, "type", &["int", "float"])?;
        one_of(&weights, "strategy", &["tensor", "channel", "group", "block"])?;
        let bits = weights.count("num_bits", 8)?;
        let float = weights.string("type")? == Some("float");
        if !(bits == 8 || bits == 4 && !float) {
            return Err(weights.error("num_bits", if float { "8" } else { "4 or 8" }));
        }
        let block = block(&weights, "block_structure")?;
        if block.is_some() && shared.is_some() && block != shared {
            return Err(weights.error("block_structure", "the same in every group"));
        }
        shared = block.or(shared);
    }
    Ok(Packing::CompressedTensors { block: shared })
}

/// Extents of a block, if `key` is there.
fn block(options: &Options<'_>, key: &str) -> Result<Option<[usize; 2]>, ModelError> {
    let extents = |value: &Value| {
        let items: Vec<usize> =
            value.as_array()?.iter().map(|item| Some(item.as_u64()? as usize)).collect::<Option<_>>()?;
        <[usize; 2]>::try_from(items).ok().filter(|block| block.iter().all(|e| (1..=MAX_BLOCK).contains(e)))
    };
    match options.get(key) {
        None => Ok(None),
        Some(value) => {
            extents(value).map(Some).ok_or_else(|| options.error(key, "two sizes, rows and columns"))
        }
    }
}

/// Fails unless `key` is absent or one of `known`.
fn one_of(options: &Options<'_>, key: &str, known: &[&str]) -> Result<(), ModelError> {
    match options.string(key)? {
        Some(found) if !known.contains(&found) => {
            let known: Vec<String> = known.iter().map(|known| format!("{known:?}")).collect();
            Err(options.error(key, format!("{}; others are not supported", known.join(", "))))
        }
        _ => Ok(()),
    }
}

/// Fails if one of `keys` switches something on.
fn none_of(options: &Options<'_>, keys: &[&str]) -> Result<(), ModelError> {
    match keys.iter().find(|key| options.switches(key)) {
        Some(key) => Err(options.error(key, "absent: this option is not supported")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(section: Value) -> Result<Option<Packing>, String> {
        let config = json!({"quantization_config": section});
        read(Path::new("config.json"), config.as_object().unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn published_sections_are_read() {
        let qwen3 = json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "modules_to_not_convert": ["lm_head"], "weight_block_size": [128, 128]});
        assert_eq!(of(qwen3), Ok(Some(Packing::Fp8 { block: Some([128, 128]) })));
        let gptq = json!({"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": false, "sym": true,
            "static_groups": false, "true_sequential": true, "model_name_or_path": null,
            "model_file_base_name": "model", "quant_method": "gptq"});
        assert_eq!(of(gptq), Ok(Some(Packing::Gptq { bits: 4, zeros_less_one: true })));
        let v2 = json!({"bits": 8, "checkpoint_format": "gptq_v2", "quant_method": "gptq", "meta": {"a": 1}});
        assert_eq!(of(v2), Ok(Some(Packing::Gptq { bits: 8, zeros_less_one: false })));
        let awq = json!({"bits": 4, "group_size": 128, "modules_to_not_convert": null, "quant_method": "awq",
            "version": "GEMM", "zero_point": true});
        assert_eq!(of(awq), Ok(Some(Packing::Awq)));
        let compressed = json!({"config_groups": {"group_0": {"input_activations": null,
            "output_activations": null, "targets": ["Linear"], "weights": {"actorder": "weight",
            "block_structure": null, "dynamic": false, "group_size": 128, "num_bits": 4, "observer": "minmax",
            "observer_kwargs": {}, "strategy": "group", "symmetric": true, "type": "int"}}},
            "format": "pack-quantized", "global_compression_ratio": 1.5, "ignore": ["lm_head"],
            "kv_cache_scheme": null, "quant_method": "compressed-tensors",
            "quantization_status": "compressed"});
        assert_eq!(of(compressed), Ok(Some(Packing::CompressedTensors { block: None })));
        assert_eq!(of(json!({"quant_method": "mxfp4"})), Ok(Some(Packing::Mxfp4)));
        assert_eq!(of(Value::Null), Ok(None));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (section, parts) in [
            (json!({"quant_method": "bitsandbytes"}), ["quant_method", "bitsandbytes"]),
            (json!({"bits": 4}), ["quant_method", "compressed-tensors"]),
            (json!({"quant_method": "fp8", "fmt": "e5m2"}), ["quantization_config.fmt", "e4m3"]),
            (
                json!({"quant_method": "fp8", "weight_block_size": [128]}),
                ["weight_block_size", "rows and columns"],
            ),
            (json!({"quant_method": "gptq", "bits": 3}), ["quantization_config.bits", "4 or 8"]),
            (json!({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {}}}), ["dynamic", "not supported"]),
            (
                json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
                ["marlin", "gptq_v2"],
            ),
            (json!({"quant_method": "awq", "bits": 4, "version": "gemv"}), ["version", "gemm"]),
            (
                json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
                ["format", "nvfp4"],
            ),
            (
                json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
                    "config_groups": {"a": {"weights": {"num_bits": 2, "type": "int"}}}}),
                ["config_groups.*.weights.num_bits", "4 or 8"],
            ),
        ] {
            let error = of(section).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{error} lacks one of {parts:?}");
        }
    }
}
