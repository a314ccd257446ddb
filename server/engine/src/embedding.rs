//! Embeddings: the mean of a text's last hidden states, as a kind of work of its own.
//!
//! An embedding is a sequence that asks for no output: it waits, has a seat and blocks, is computed in chunks
//! and can be preempted as any other, and shares passes with those that generate. It differs in three ways.
//! Nobody watches it come token by token, so its chunks are small, by a limit of their own, which they have also
//! where prompts have none because there is no fast lane; and it does not count among those that wait for a
//! first token. Every one of its rows is computed, so it takes nothing from the prefix cache, and leaves
//! nothing there, as nobody would find it of use. And what it is after is not logits but the rows themselves,
//! which are added up here.
//!
//! The sum runs over the positions in ascending order, in f64, one row after the other. So it does not show
//! how the text was cut into passes, and neither does a preemption: rows that are computed again are passed
//! over.

use std::sync::Arc;

use crate::api::{
    CacheSalt, EngineError, EventSink, Lane, Priority, SamplingParams, SequenceId, SpeculationParams,
    SubmitRequest, TokenId,
};
use crate::sequence::Sequence;

/// A text to embed.
pub struct EmbedRequest {
    /// As [`SubmitRequest::id`].
    pub id: SequenceId,
    /// Whose hidden states: the draft's or the target's.
    pub lane: Lane,
    /// The text; at least one token, all inside the vocabulary.
    pub tokens: Arc<[TokenId]>,
    /// Who goes first when there is not room for all.
    pub priority: Priority,
    /// Is given one [`crate::Event::Embedding`], then [`crate::Event::Finished`]; or it is told why not.
    pub events: Box<dyn EventSink>,
}

impl EmbedRequest {
    /// The sequence that computes all tokens and puts out none.
    pub(crate) fn into_submit(self) -> SubmitRequest {
        SubmitRequest {
            id: self.id,
            lane: self.lane,
            prompt: self.tokens,
            params: SamplingParams { max_tokens: 0, ..SamplingParams::default() },
            priority: self.priority,
            cache_salt: CacheSalt::default(),
            max_predict_time: None,
            speculation: SpeculationParams::default(),
            constraint: None,
            events: self.events,
        }
    }
}

/// The sum of the hidden states of a sequence's first tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pooling {
    /// `[hidden_size]`; empty before the first row.
    sum: Vec<f64>,
    num_rows: usize,
}

impl Pooling {
    /// Adds rows of `width`, the first of which is that of the token at `start`.
    pub(crate) fn add(&mut self, start: usize, rows: &[f32], width: usize) {
        self.sum.resize(width, 0.0);
        for row in rows.chunks_exact(width).skip(self.num_rows - start.min(self.num_rows)) {
            for (sum, &value) in self.sum.iter_mut().zip(row) {
                *sum += f64::from(value);
            }
            self.num_rows += 1;
        }
    }

    /// The mean of all rows.
    ///
    /// # Errors
    /// If it is not a number.
    fn mean(&self) -> Result<Vec<f32>, EngineError> {
        let mean: Vec<f32> = self.sum.iter().map(|sum| (sum / self.num_rows as f64) as f32).collect();
        match mean.iter().all(|value| value.is_finite()) {
            true => Ok(mean),
            false => Err(EngineError::Forward("the hidden states are not finite".to_owned())),
        }
    }
}

impl Sequence {
    /// True if hidden states are wanted of it, and no output.
    pub(crate) fn is_embedding(&self) -> bool {
        self.pooling.is_some()
    }

    /// True if it must not make anybody wait: nobody watches its tokens come.
    pub(crate) fn is_bulk(&self) -> bool {
        self.lane == Lane::Deep || self.is_embedding()
    }

    /// Takes the hidden states of its tokens from `start` on, and at the last has the mean sent.
    ///
    /// # Errors
    /// As [`Pooling::mean`].
    pub(crate) fn pool(&mut self, start: usize, rows: &[f32], width: usize) -> Result<(), EngineError> {
        let num_tokens = self.num_prompt_tokens();
        let Some(pooling) = &mut self.pooling else { return Ok(()) };
        pooling.add(start, rows, width);
        if pooling.num_rows == num_tokens {
            let mean = pooling.mean()?;
            self.send_embedding(mean);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Pooling;

    #[test]
    fn chunks_and_repetition_do_not_show() {
        let rows: Vec<f32> = (0..30).map(|i| ((i * 7919) % 101) as f32 * 0.37 - 11.0).collect();
        let mut whole = Pooling::default();
        whole.add(0, &rows, 3);
        let mut parts = Pooling::default();
        parts.add(0, &rows[..9], 3);
        parts.add(0, &rows[..6], 3); // Preempted: it begins again.
        parts.add(2, &rows[6..21], 3);
        parts.add(7, &rows[21..], 3);
        assert_eq!(whole.num_rows, 10);
        assert_eq!((whole.num_rows, &whole.sum), (parts.num_rows, &parts.sum));
        let mut broken = Pooling::default();
        broken.add(0, &[1.0, f32::NAN], 2);
        assert!(whole.mean().is_ok() && broken.mean().is_err());
    }
}
