//! What responses have in common: usage and timings.

use serde::Serialize;

use crate::http::generation::{Account, EndReason, Generation};
use crate::http::metrics::milliseconds;

/// OpenAI's account of tokens.
#[derive(Serialize)]
pub(super) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Serialize)]
struct PromptDetails {
    cached_tokens: u64,
}

#[derive(Serialize)]
struct CompletionDetails {
    reasoning_tokens: u64,
    accepted_prediction_tokens: u64,
    rejected_prediction_tokens: u64,
}

impl From<&Account> for Usage {
    fn from(account: &Account) -> Self {
        Usage {
            prompt_tokens: account.num_prompt_tokens,
            completion_tokens: account.num_output_tokens,
            total_tokens: account.num_prompt_tokens + account.num_output_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: account.num_cached_tokens },
            completion_tokens_details: CompletionDetails {
                reasoning_tokens: 0,
                accepted_prediction_tokens: account.num_accepted_prediction_tokens,
                rejected_prediction_tokens: account
                    .num_prediction_tokens
                    .saturating_sub(account.num_accepted_prediction_tokens),
            },
        }
    }
}

/// Where the time went, in llama.cpp's words.
#[derive(Serialize)]
pub(super) struct Timings {
    queue_ms: f64,
    cache_n: u64,
    prompt_n: u64,
    prompt_ms: f64,
    predicted_n: u64,
    predicted_ms: f64,
    predicted_per_second: f64,
    draft_n: u64,
    draft_n_accepted: u64,
}

impl Timings {
    pub(super) fn of(generation: &Generation, account: &Account) -> Self {
        Timings {
            queue_ms: milliseconds(account.queue_time),
            cache_n: account.num_cached_tokens,
            prompt_n: account.num_prompt_tokens,
            prompt_ms: milliseconds(account.prefill_time),
            predicted_n: account.num_output_tokens,
            predicted_ms: milliseconds(account.decode_time),
            predicted_per_second: account.tokens_per_second(generation.num_sequences()),
            draft_n: account.num_draft_tokens,
            draft_n_accepted: account.num_accepted_tokens,
        }
    }
}

/// `finish_reason`
pub(super) fn finish_reason(end: EndReason) -> &'static str {
    match end {
        EndReason::Stop => "stop",
        EndReason::Length => "length",
    }
}
