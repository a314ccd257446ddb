//! The verification rule: a draft token stands if and only if it equals the token that the target
//! draws at that position (drafter-invariant speculative decoding, Daliri, Musco, Suresh,
//! arXiv 2408.07978). The draw uses noise that depends only on seed, position and token id, so the
//! committed tokens are the ones that plain decoding would have drawn, whatever was drafted.

use std::time::Duration;

use crate::api::{EngineError, FinishReason};
use crate::sampler::{Draw, LogprobScratch, Sampler, margin};
use crate::sequence::Sequence;

/// Draws at each of the `1 + num_draft_tokens` rows of logits (`[num_token_ids]`, row `i` predicting the token
/// after the `i`-th draft token) until a draft token falls or the sequence ends; commits what was
/// drawn and rolls the rest back. Without draft tokens this is plain decoding.
///
/// # Errors
/// If logits are not finite; the tokens before them are committed.
pub(crate) fn verify<'a>(
    sequence: &mut Sequence,
    rows: impl Iterator<Item = &'a [f32]>,
    sampler: &mut Sampler,
    logprobs: &mut LogprobScratch,
    now: Duration,
) -> Result<(), EngineError> {
    let num_draft_tokens = sequence.draft_tokens().len();
    let mut num_accepted_tokens = 0;
    let is_decode_step = sequence.num_output_tokens() > 0;
    for row in rows {
        let draw = Draw {
            params: &sequence.params,
            counts: sequence.counts.as_ref(),
            provisional: &[],
            position: sequence.num_tokens(),
            num_output_tokens: sequence.num_output_tokens(),
        };
        let id = sampler.draw(row, &draw)?;
        if sequence.params.stop_token_ids.contains(&id) {
            // The stop token is not output, but a draft that foresaw it was right.
            num_accepted_tokens += usize::from(sequence.draft_tokens().first() == Some(&id));
            sequence.finished = Some(FinishReason::Stop(id));
            break;
        }
        let reported = sequence.params.logprobs.map(|top| logprobs.compute(row, id, top.into()));
        let accepted = sequence.draft_tokens().first() == Some(&id);
        if !accepted {
            sequence.rollback();
        }
        let is_watched = sequence.num_output_tokens() < sequence.params.num_margins as usize;
        sequence.commit(id, accepted, reported, now);
        if is_watched {
            sequence.push_margin(margin(row));
        }
        num_accepted_tokens += usize::from(accepted);
        if sequence.num_remaining_tokens() == 0 {
            sequence.finished = Some(FinishReason::Length);
            break;
        }
        if !accepted {
            break;
        }
    }
    sequence.rollback();
    sequence.usage.num_decode_steps += u32::from(is_decode_step);
    let source = sequence.drafting.source as usize;
    sequence.usage.num_draft_tokens[source] += num_draft_tokens as u32;
    sequence.usage.num_accepted_tokens[source] += num_accepted_tokens as u32;
    Ok(())
}
