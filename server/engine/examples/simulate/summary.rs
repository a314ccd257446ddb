//! What simulations came across, so that one can see that they are not idle.

use std::fmt;

use tandem_engine::{DraftSource, EngineStats, FinishReason};

use super::client::Client;

/// Sums over scenarios.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Summary {
    pub(crate) steps: u64,
    pub(crate) sequences: u64,
    pub(crate) stopped: u64,
    pub(crate) at_length: u64,
    pub(crate) at_deadline: u64,
    pub(crate) aborted: u64,
    pub(crate) failed: u64,
    pub(crate) output_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) preemptions: u64,
    pub(crate) evictions: u64,
    pub(crate) draft_tokens: [u64; 3],
    pub(crate) accepted_tokens: [u64; 3],
    /// Of those that a head proposed.
    pub(crate) head_tokens: u64,
    pub(crate) accepted_head_tokens: u64,
    pub(crate) embeddings: u64,
    pub(crate) kv_events: u64,
    pub(crate) found_tokens: u64,
}

impl Summary {
    pub(crate) fn add(&mut self, other: &Summary) {
        self.steps += other.steps;
        self.sequences += other.sequences;
        self.stopped += other.stopped;
        self.at_length += other.at_length;
        self.at_deadline += other.at_deadline;
        self.aborted += other.aborted;
        self.failed += other.failed;
        self.output_tokens += other.output_tokens;
        self.cached_tokens += other.cached_tokens;
        self.preemptions += other.preemptions;
        self.evictions += other.evictions;
        for source in 0..3 {
            self.draft_tokens[source] += other.draft_tokens[source];
            self.accepted_tokens[source] += other.accepted_tokens[source];
        }
        self.head_tokens += other.head_tokens;
        self.accepted_head_tokens += other.accepted_head_tokens;
        self.embeddings += other.embeddings;
        self.kv_events += other.kv_events;
        self.found_tokens += other.found_tokens;
    }

    /// Takes up a scenario's end.
    pub(super) fn note(&mut self, clients: &[Client<'_>], stats: &EngineStats, has_head: bool) {
        self.steps += stats.num_steps;
        self.sequences += clients.len() as u64;
        for finished in clients.iter().filter_map(|c| c.answer.finished) {
            *match finished.reason {
                FinishReason::Stop(_) | FinishReason::Complete => &mut self.stopped,
                FinishReason::Length => &mut self.at_length,
                FinishReason::Deadline => &mut self.at_deadline,
                FinishReason::Aborted => continue,
            } += 1;
        }
        self.aborted += stats.num_aborted;
        self.failed += stats.num_failed;
        self.output_tokens += stats.num_fast_tokens + stats.num_deep_tokens;
        self.cached_tokens += stats.num_cached_tokens;
        self.preemptions += stats.num_preemptions;
        self.evictions += stats.num_evictions;
        self.draft_tokens = stats.num_draft_tokens;
        self.accepted_tokens = stats.num_accepted_tokens;
        if has_head {
            self.head_tokens = stats.num_draft_tokens[DraftSource::Draft as usize];
            self.accepted_head_tokens = stats.num_accepted_tokens[DraftSource::Draft as usize];
        }
        self.embeddings = stats.num_embeddings;
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} steps, {} sequences: {} stopped, {} reached their length, {} their deadline, \
             {} aborted, {} failed; {} were texts to embed",
            self.steps,
            self.sequences,
            self.stopped,
            self.at_length,
            self.at_deadline,
            self.aborted,
            self.failed,
            self.embeddings
        )?;
        writeln!(
            f,
            "{} output tokens, {} cached prompt tokens, {} preemptions, {} evictions; \
             {} events of the cache, {} tokens found that they told of",
            self.output_tokens,
            self.cached_tokens,
            self.preemptions,
            self.evictions,
            self.kv_events,
            self.found_tokens
        )?;
        let [model, ngram, prediction] = self.draft_tokens;
        let [stood, ngram_stood, prediction_stood] = self.accepted_tokens;
        write!(
            f,
            "draft tokens accepted of offered: model {} of {}, head {} of {}, n-gram {ngram_stood} of {ngram}, \
             prediction {prediction_stood} of {prediction}",
            stood - self.accepted_head_tokens,
            model - self.head_tokens,
            self.accepted_head_tokens,
            self.head_tokens
        )
    }
}
