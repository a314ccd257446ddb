//! What responses have in common: usage, and why an answer ended.

use serde::Serialize;

use crate::http::generation::{Account, EndReason};

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

impl Usage {
    /// `num_reasoning_tokens`: those of the output that were reasoning.
    pub(super) fn new(account: &Account, num_reasoning_tokens: u64) -> Self {
        Usage {
            prompt_tokens: account.num_prompt_tokens,
            completion_tokens: account.num_output_tokens,
            total_tokens: account.num_prompt_tokens + account.num_output_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: account.num_cached_tokens },
            completion_tokens_details: CompletionDetails {
                reasoning_tokens: num_reasoning_tokens,
                accepted_prediction_tokens: account.num_accepted_prediction_tokens,
                rejected_prediction_tokens: account
                    .num_prediction_tokens
                    .saturating_sub(account.num_accepted_prediction_tokens),
            },
        }
    }
}

/// `finish_reason`
pub(super) fn finish_reason(end: EndReason) -> &'static str {
    match end {
        EndReason::Stop | EndReason::StopString => "stop",
        EndReason::Length => "length",
    }
}
