//! Does a fast backend compute the same model as the reference? Both read the same tokens, the prompt
//! and then the reference's own greedy continuation, and their logits are compared at every position.
//! `tandem verify MODEL` shows the result.

use crate::batch::ForwardBatch;
use crate::error::ModelError;
use crate::model::Model;

const BLOCK_SIZE: usize = 16;
/// Prompt tokens of a pass: bounds the logits held at once, and crosses passes on the way.
const MAX_CHUNK: usize = 64;

/// How far two models are apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Positions compared.
    pub num_positions: usize,
    /// The largest absolute difference of two logits; infinite if one is not a number.
    pub max_abs_diff: f32,
    /// The position it was found at.
    pub max_abs_diff_position: usize,
    /// The largest absolute logit of the reference, to judge the difference by.
    pub max_abs_logit: f32,
    /// Positions at which both would greedily choose the same token.
    pub num_argmax_agreements: usize,
    /// The first position at which they would not.
    pub first_disagreement: Option<Disagreement>,
}

/// A position at which two models would greedily choose different tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Disagreement {
    /// Tokens before it.
    pub position: usize,
    /// The fast model's choice.
    pub fast: u32,
    /// The reference's choice.
    pub reference: u32,
    /// By how much the reference prefers its own choice; a tie that rounding decides is near 0.
    pub reference_margin: f32,
}

/// Compares `fast` with `reference` at every position of `prompt` and of `decode_steps` tokens after
/// it. Both models' KV caches are allocated anew.
///
/// # Errors
/// If the prompt is empty or too long for the models, their vocabularies differ, or a model fails.
pub fn compare(
    fast: &mut dyn Model,
    reference: &mut dyn Model,
    prompt: &[u32],
    decode_steps: usize,
) -> Result<Comparison, ModelError> {
    let refuse = |reason: String| ModelError::Backend { context: "verify", reason };
    let vocab_size = reference.config().vocab_size;
    if fast.config().vocab_size != vocab_size {
        let found = fast.config().vocab_size;
        return Err(refuse(format!(
            "vocabularies of {found} and {vocab_size} tokens; wanted one model twice"
        )));
    }
    if prompt.is_empty() {
        return Err(refuse("the prompt is empty; wanted at least one token".to_owned()));
    }
    let num_blocks = (prompt.len() + decode_steps).div_ceil(BLOCK_SIZE);
    fast.allocate_kv_cache(num_blocks, BLOCK_SIZE)?;
    reference.allocate_kv_cache(num_blocks, BLOCK_SIZE)?;
    let block_table: Vec<u32> = (0..num_blocks as u32).collect();

    let mut comparison = Comparison {
        num_positions: 0,
        max_abs_diff: 0.0,
        max_abs_diff_position: 0,
        max_abs_logit: 0.0,
        num_argmax_agreements: 0,
        first_disagreement: None,
    };
    let (mut fast_logits, mut reference_logits) = (Vec::new(), Vec::new());
    let mut batch = ForwardBatch::new();
    let mut pass = |tokens: &[u32], comparison: &mut Comparison| -> Result<u32, ModelError> {
        batch.clear();
        let start = comparison.num_positions;
        batch.push_sequence(tokens, start, &block_table, BLOCK_SIZE, tokens.len());
        fast.forward(&batch, &mut fast_logits)?;
        reference.forward(&batch, &mut reference_logits)?;
        let rows = fast_logits.chunks_exact(vocab_size).zip(reference_logits.chunks_exact(vocab_size));
        Ok(rows.map(|(fast, reference)| comparison.add(fast, reference)).last().unwrap_or_default())
    };
    let mut next = 0;
    for chunk in prompt.chunks(MAX_CHUNK) {
        next = pass(chunk, &mut comparison)?;
    }
    for _ in 0..decode_steps {
        next = pass(&[next], &mut comparison)?;
    }
    Ok(comparison)
}

impl Comparison {
    /// Adds the next position's logits; returns the reference's choice.
    fn add(&mut self, fast: &[f32], reference: &[f32]) -> u32 {
        for (&fast, &reference) in fast.iter().zip(reference) {
            let diff = (fast - reference).abs();
            let diff = if diff.is_nan() { f32::INFINITY } else { diff };
            if diff > self.max_abs_diff {
                self.max_abs_diff = diff;
                self.max_abs_diff_position = self.num_positions;
            }
            self.max_abs_logit = self.max_abs_logit.max(reference.abs());
        }
        let (choice, wanted) = (argmax(fast), argmax(reference));
        if choice == wanted {
            self.num_argmax_agreements += 1;
        } else if self.first_disagreement.is_none() {
            self.first_disagreement = Some(Disagreement {
                position: self.num_positions,
                fast: choice as u32,
                reference: wanted as u32,
                reference_margin: reference[wanted] - reference[choice],
            });
        }
        self.num_positions += 1;
        wanted as u32
    }
}

fn argmax(logits: &[f32]) -> usize {
    tandem_kernels::sampling::argmax(logits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Comparison {
        Comparison {
            num_positions: 0,
            max_abs_diff: 0.0,
            max_abs_diff_position: 0,
            max_abs_logit: 0.0,
            num_argmax_agreements: 0,
            first_disagreement: None,
        }
    }

    #[test]
    fn the_worst_position_and_the_first_disagreement_are_kept() {
        let mut comparison = empty();
        assert_eq!(comparison.add(&[0.0, 1.0], &[0.0, 1.5]), 1);
        assert_eq!(comparison.add(&[2.0, 1.0], &[2.0, 3.0]), 1);
        assert_eq!(comparison.add(&[0.0, 1.0], &[1.0, 0.0]), 0);
        assert_eq!((comparison.num_positions, comparison.num_argmax_agreements), (3, 1));
        assert_eq!((comparison.max_abs_diff, comparison.max_abs_diff_position), (2.0, 1));
        assert_eq!(comparison.max_abs_logit, 3.0);
        let wanted = Disagreement { position: 1, fast: 0, reference: 1, reference_margin: 1.0 };
        assert_eq!(comparison.first_disagreement, Some(wanted));
    }

    #[test]
    fn a_nan_is_an_infinite_difference() {
        let mut comparison = empty();
        comparison.add(&[f32::NAN, 1.0], &[0.0, 1.0]);
        assert_eq!(comparison.max_abs_diff, f32::INFINITY);
    }
}
