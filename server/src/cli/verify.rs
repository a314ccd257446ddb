//! `tandem verify`: does the fast backend compute this model as the reference does?

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tandem_models::verify::{Comparison, compare};
use tandem_models::{
    BackendKind, Checkpoint, Dtype, FileType, HubOptions, RopeOverride, Tokenizer, WeightMemory,
};

use super::quantize::parse_format;
use crate::runtime;

const LONG_ABOUT: &str = "\
Compare the fast backend with the reference backend on a model's own weights.

Both read the same prompt and then the reference's own greedy continuation; their logits are compared at \
every position. The reference is plain candle tensors, slow and with nothing in common with the fast \
kernels. Rounding differs in the last digits; anything more is a bug in Tandem or in this machine, \
and worth a report. Quantised weights are multiplied with activations of eight bits, which the reference \
does not do, so there more is allowed. The exit status is 1 if a model fails.";

/// Shares of the largest logit by which rounding alone may change one: of f32 sums in another order, and of
/// activations to eight bits (on models of random weights every block format stays within it).
const FLOAT_TOLERANCE: f32 = 1e-3;
const QUANTIZED_TOLERANCE: f32 = 3e-2;

const EXAMPLES: &str = "\
Examples:
  tandem verify                                   the demo pair
  tandem verify ./models/mine ./models/mine-draft
  tandem verify Qwen/Qwen2.5-Coder-0.5B-Instruct --tokens 16
  TANDEM_ISA=scalar tandem verify                 the plain kernels instead of this CPU's own";

/// A prompt with the things code has: indentation, names, numbers, strings, two languages.
const PROMPT: &str = "\
import os\n\n\ndef sizes(folder, minimum=1024):\n    \"\"\"Yield (name, bytes) of the larger files.\"\"\"\n    \
for entry in os.scandir(folder):\n        size = entry.stat().st_size\n        if size >= minimum:\n            \
yield entry.name, size\n\n\nfn main() {\n    let total: u64 = [1, 2, 3].iter().sum();\n    \
println!(\"total: {total}\");\n}\n\n# 0.5 % of naïve users\n";

/// Arguments of `tandem verify`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(super) struct VerifyArgs {
    /// Folders, GGUF files or hub ids; without any, the demo pair
    #[arg(value_name = "MODEL")]
    models: Vec<String>,

    /// Text to read first [default: a short piece of code]
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,

    /// Tokens to generate after it
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(0..=4096))]
    tokens: u16,

    /// Largest difference of two logits that passes, relative to the largest logit [default: 0.001; 0.03
    /// for quantised weights]
    #[arg(long, value_name = "SHARE")]
    tolerance: Option<f32>,

    /// Quantise both first, as `--quantize` of `tandem serve` would: q8, q4, q6_k or q4_k_m
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    quantize: Option<FileType>,

    /// Scale the rotary embedding first, as `--rope-scaling` of `tandem serve` would: yarn:4, say
    #[arg(long, value_name = "KIND:FACTOR|JSON")]
    rope_scaling: Option<RopeOverride>,

    /// Threads of the fast backend [default: one a CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

pub(super) fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let threads = args.threads.map_or_else(runtime::default_threads, usize::from);
    let pool = runtime::thread_pool(threads)?;
    let options = HubOptions::from_env();
    let mut dirs = Vec::new();
    for model in &args.models {
        dirs.push(tandem_models::source::resolve(model, &options)?);
    }
    if dirs.is_empty() {
        let demo = runtime::find_demo_pair()?;
        dirs.extend([demo.join("target"), demo.join("draft")]);
    }
    // Opened first, so that a wrong name in the list does not cost the models before it.
    let open = |dir| Checkpoint::open_with(dir, args.rope_scaling.as_ref());
    let mut checkpoints = dirs.iter().map(|dir| open(dir)).collect::<Result<Vec<_>, _>>()?;
    for checkpoint in &mut checkpoints {
        checkpoint.quantize = args.quantize;
    }
    println!(
        "fast backend: cpu, {}, {threads} threads; reference: candle",
        tandem_kernels::isa::active().name()
    );
    let mut all_passed = true;
    for checkpoint in &checkpoints {
        let dir = &checkpoint.dir;
        let tokenizer = Tokenizer::from_dir(dir)?;
        let mut prompt = tokenizer.encode(args.prompt.as_deref().unwrap_or(PROMPT), true)?;
        let room = checkpoint.config.max_position_embeddings.saturating_sub(usize::from(args.tokens)).max(1);
        prompt.truncate(room);
        let mut fast = tandem_models::load(checkpoint, BackendKind::Cpu, Arc::clone(&pool))?;
        let mut reference = tandem_models::load(checkpoint, BackendKind::Reference, Arc::clone(&pool))?;
        let comparison = compare(fast.as_mut(), reference.as_mut(), &prompt, usize::from(args.tokens))?;
        let tolerance = args.tolerance.unwrap_or_else(|| tolerance_of(&fast.weight_memory()));
        let passed = passes(&comparison, tolerance);
        all_passed &= passed;
        print!("{}", describe(&dir.display().to_string(), &comparison, tolerance, passed));
    }
    Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn tolerance_of(memory: &WeightMemory) -> f32 {
    let is_quantized = memory.types.iter().any(|(dtype, ..)| matches!(dtype, Dtype::Quantized(_)));
    if is_quantized { QUANTIZED_TOLERANCE } else { FLOAT_TOLERANCE }
}

/// The largest difference that is rounding.
fn allowed(comparison: &Comparison, tolerance: f32) -> f32 {
    tolerance * comparison.max_abs_logit.max(1.0)
}

fn passes(comparison: &Comparison, tolerance: f32) -> bool {
    // Written so that NaN fails. Within the tolerance, choices can only differ where two tokens tie.
    comparison.max_abs_diff <= allowed(comparison, tolerance)
}

fn describe(model: &str, comparison: &Comparison, tolerance: f32, passed: bool) -> String {
    let mut text = format!(
        "{}  {model}\n  positions compared      {}\n  largest difference      {:.2e} at position {} \
         (allowed {:.2e}; largest logit {:.2})\n  same greedy choice      {} of {}\n",
        if passed { "PASS" } else { "FAIL" },
        comparison.num_positions,
        comparison.max_abs_diff,
        comparison.max_abs_diff_position,
        allowed(comparison, tolerance),
        comparison.max_abs_logit,
        comparison.num_argmax_agreements,
        comparison.num_positions,
    );
    if let Some(first) = &comparison.first_disagreement {
        text += &format!(
            "  first other choice      position {}: token {} instead of {}, which leads by {:.2e}{}\n",
            first.position,
            first.fast,
            first.reference,
            first.reference_margin,
            if passed { " (a tie)" } else { "" }
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison(max_abs_diff: f32) -> Comparison {
        Comparison {
            num_positions: 10,
            max_abs_diff,
            max_abs_diff_position: 3,
            max_abs_logit: 20.0,
            num_argmax_agreements: 10,
            first_disagreement: None,
        }
    }

    #[test]
    fn rounding_passes_and_anything_more_fails() {
        assert!(passes(&comparison(0.019), 1e-3));
        assert!(!passes(&comparison(0.021), 1e-3));
        assert!(!passes(&comparison(f32::INFINITY), 1e-3));
        assert!(!passes(&comparison(f32::NAN), 1e-3));
    }

    #[test]
    fn the_verdict_names_model_position_and_bound() {
        let text = describe("m", &comparison(0.5), 1e-3, false);
        assert!(text.starts_with("FAIL  m\n") && text.contains("5.00e-1 at position 3"), "{text}");
        assert!(text.contains("allowed 2.00e-2"), "{text}");
    }
}
