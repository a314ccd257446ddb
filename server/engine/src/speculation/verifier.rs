//! The verification rule: a draft token stands if and only if it equals the token that the target
//! draws at that position (drafter-invariant speculative decoding, Daliri, Musco, Suresh,
//! arXiv 2408.07978). The draw uses noise that depends only on seed, position and token id, so the
//! committed tokens are the ones that plain decoding would have drawn, whatever was drafted.
//!
//! Where the output has a form, each draw is under the mask of what may follow the tokens before it, and
//! tokens to which the form leaves no alternative are committed without a draw ([`Sequence::jump`]).

use std::time::Duration;

use crate::api::{EngineError, FinishReason};
use crate::rows::{Asked, Row};
use crate::sampler::Sampler;
use crate::sequence::Sequence;

/// Draws at each of the `1 + num_draft_tokens` rows (of `num_token_ids` logits if whole, row `i` predicting the token
/// after the `i`-th draft token) until a draft token falls or the sequence ends; commits what was
/// drawn and rolls the rest back. Without draft tokens this is plain decoding.
///
/// # Errors
/// If logits are not finite, or the output's form cannot be followed; the tokens before are committed.
pub(crate) fn verify<'a>(
    sequence: &mut Sequence,
    rows: impl Iterator<Item = Row<'a>>,
    sampler: &mut Sampler,
    now: Duration,
) -> Result<(), EngineError> {
    let num_draft_tokens = sequence.draft_tokens().len();
    let mut num_accepted_tokens = 0;
    let is_decode_step = sequence.num_output_tokens() > 0;
    if sequence.is_complete_after(0)? {
        sequence.finished = Some(FinishReason::Complete);
    }
    for row in rows {
        if sequence.finished.is_some() {
            break;
        }
        let asked = Asked::of(sequence, 0, false);
        let drawn = sampler.draw(row, &sequence.draw_after(0)?, asked)?;
        let id = drawn.id;
        if sequence.params.stop_token_ids.contains(&id) {
            // The stop token is not output, but a draft that foresaw it was right.
            num_accepted_tokens += usize::from(sequence.draft_tokens().first() == Some(&id));
            sequence.finished = Some(FinishReason::Stop(id));
            break;
        }
        let reported = sequence.params.logprobs.map(|num_top| drawn.logprobs(num_top.into()));
        let accepted = sequence.draft_tokens().first() == Some(&id);
        if !accepted {
            sequence.rollback();
        }
        // Of a token without alternative there is none, whether it was drafted and judged or never drawn.
        let is_watched = sequence.num_output_tokens() < sequence.params.num_margins as usize
            && sequence.draw_after(0)?.only_token().is_none();
        num_accepted_tokens += usize::from(accepted);
        sequence.take_token(id, accepted, reported, now)?;
        if is_watched {
            sequence.push_margin(drawn.margin());
        }
        if !accepted {
            break;
        }
    }
    sequence.rollback();
    sequence.jump(now)?;
    sequence.usage.num_decode_steps += u32::from(is_decode_step);
    let source = sequence.drafting.source as usize;
    sequence.usage.num_draft_tokens[source] += num_draft_tokens as u32;
    sequence.usage.num_accepted_tokens[source] += num_accepted_tokens as u32;
    Ok(())
}
