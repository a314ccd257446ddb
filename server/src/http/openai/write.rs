//! Streamed chunks written by hand.
//!
//! What does not change between chunks is rendered once; a token costs its escaped text and two
//! copies. Only the last chunk is serialised as a whole.

use serde::Serialize;

use super::types::Usage;
use crate::http::error::ApiError;
use crate::http::generation::Generation;
use crate::http::intake::Reply;
use crate::http::state::unix_seconds;
use crate::http::wire::{Timings, json, random_id};

/// What every body of one response carries.
pub(super) struct Identity {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) created: u64,
    /// The name that the client used.
    pub(super) model: String,
    pub(super) seed: i128,
    include_usage: bool,
    continuous_usage: bool,
}

impl Identity {
    /// A fresh id that begins with `prefix`.
    pub(super) fn new(prefix: &str, object: &'static str, reply: &Reply) -> Self {
        Identity {
            id: random_id(prefix),
            object,
            created: unix_seconds(),
            model: reply.model.clone(),
            seed: reply.seed,
            include_usage: reply.include_usage,
            continuous_usage: reply.continuous_usage,
        }
    }

    /// The body of a whole answer.
    pub(super) fn write_whole<C: Serialize>(
        &self,
        generation: &Generation,
        choices: &[C],
        num_reasoning_tokens: u64,
        out: &mut Vec<u8>,
    ) {
        #[derive(Serialize)]
        struct Body<'a, C> {
            id: &'a str,
            object: &'a str,
            created: u64,
            model: &'a str,
            choices: &'a [C],
            usage: Usage,
            seed: i128,
            timings: Timings,
        }
        let account = generation.account();
        let Identity { id, object, created, model, seed, .. } = self;
        let usage = Usage::new(&account, num_reasoning_tokens);
        let timings = Timings::of(generation, &account);
        json(out, &Body { id, object, created: *created, model, choices, usage, seed: *seed, timings });
    }
}

/// Writes chunks of one stream.
pub(super) struct ChunkWriter {
    /// `data: {"id":...,"model":"...",` up to `"choices":[`
    head: Vec<u8>,
    seed: i128,
    include_usage: bool,
    continuous_usage: bool,
    num_ended: usize,
}

impl ChunkWriter {
    pub(super) fn new(identity: &Identity) -> Self {
        #[derive(Serialize)]
        struct Head<'a> {
            id: &'a str,
            object: &'a str,
            created: u64,
            model: &'a str,
        }
        let Identity { id, object, created, model, seed, include_usage, continuous_usage } = identity;
        let mut head = b"data: ".to_vec();
        json(&mut head, &Head { id, object, created: *created, model });
        head.pop();
        head.extend_from_slice(b",\"choices\":[");
        ChunkWriter {
            head,
            seed: *seed,
            include_usage: *include_usage,
            continuous_usage: *continuous_usage,
            num_ended: 0,
        }
    }

    /// Opens a chunk for one choice: `...{"index":N,`.
    pub(super) fn open(&self, index: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"{\"index\":");
        json(out, &index);
        out.push(b',');
    }

    /// Closes what [`ChunkWriter::open`] opened. The chunk that ends the last choice carries the
    /// seed and the timings, unless a usage chunk follows to carry them.
    pub(super) fn close(
        &mut self,
        generation: &Generation,
        finish_reason: Option<&'static str>,
        out: &mut Vec<u8>,
    ) {
        out.extend_from_slice(b",\"finish_reason\":");
        json(out, &finish_reason);
        out.extend_from_slice(b"}]");
        if self.continuous_usage {
            out.extend_from_slice(b",\"usage\":");
            json(out, &Usage::new(&generation.account(), 0));
        } else if self.include_usage {
            out.extend_from_slice(b",\"usage\":null");
        }
        self.num_ended += usize::from(finish_reason.is_some());
        if finish_reason.is_some() && self.num_ended == generation.num_sequences() && !self.include_usage {
            self.closing_fields(generation, out);
        }
        out.extend_from_slice(b"}\n\n");
    }

    fn closing_fields(&self, generation: &Generation, out: &mut Vec<u8>) {
        out.extend_from_slice(b",\"seed\":");
        json(out, &self.seed);
        out.extend_from_slice(b",\"timings\":");
        json(out, &Timings::of(generation, &generation.account()));
    }

    /// The usage chunk, if asked for, and the end mark.
    pub(super) fn end(&self, generation: &Generation, num_reasoning_tokens: u64, out: &mut Vec<u8>) {
        if self.include_usage {
            out.extend_from_slice(&self.head);
            out.extend_from_slice(b"],\"usage\":");
            json(out, &Usage::new(&generation.account(), num_reasoning_tokens));
            self.closing_fields(generation, out);
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// A failure after the stream began. No end mark follows: the answer is not whole.
    pub(super) fn error(error: &ApiError, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(&error.to_json());
        out.extend_from_slice(b"\n\n");
    }
}
