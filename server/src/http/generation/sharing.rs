//! Which requests read a sequence that another one started.
//!
//! Two kinds join. *Identical* ones would get the same tokens from a sequence of their own: same
//! lane, prompt, sampling, and either greedy or with the same seed, named by both clients. A
//! *continuation* comes from somebody who typed, letter by letter, what a running completion has
//! just proposed: its prompt is the running one's and the beginning of its output, so the rest of
//! that output is the answer. Nobody joins across tenants.
//!
//! Starting costs a look at every running sequence, of which the engine holds some hundreds; texts
//! and tokens are compared only where everything short agrees.

use std::sync::{Arc, Mutex, Weak};

use tandem_engine::{EngineError, EngineHandle, SamplingParams};
use tandem_models::{Detokenizer, Tokenizer};

use super::flight::{Flight, FlightPlan, Reader};

/// Most bytes that can have been typed since the running request: further away, a prompt is
/// answered from the prefix cache.
const MAX_TYPED_BYTES: usize = 256;

/// How a request came by a sequence of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// It asked for the same.
    Identical,
    /// Its prompt goes on with what the sequence has said.
    Continuation,
}

impl Shared {
    /// For headers and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Shared::Identical => "identical",
            Shared::Continuation => "continuation",
        }
    }
}

/// A sequence to read, and how it was come by.
pub(super) struct Boarding {
    pub(super) reader: Reader,
    pub(super) shared: Option<Shared>,
    /// Bytes of the sequence's text that belong to the prompt.
    pub(super) num_typed_bytes: usize,
}

/// The sequences that can be joined.
pub(in crate::http) struct Flights {
    is_enabled: bool,
    running: Mutex<Vec<Weak<Flight>>>,
}

impl Flights {
    /// `is_enabled`: otherwise every request gets its own sequence.
    pub(in crate::http) fn new(is_enabled: bool) -> Self {
        Flights { is_enabled, running: Mutex::new(Vec::new()) }
    }

    /// Joins a running sequence or starts one.
    ///
    /// # Errors
    /// What the engine refuses.
    pub(super) fn board(
        &self,
        engine: &EngineHandle,
        plan: FlightPlan,
        tokenizer: &Arc<Tokenizer>,
    ) -> Result<Boarding, EngineError> {
        let alone = |reader| Boarding { reader, shared: None, num_typed_bytes: 0 };
        // A prompt that is only scored has no output to share.
        if !self.is_enabled || plan.params.max_tokens == 0 {
            return Flight::launch(engine, plan).map(alone);
        }
        // Held until the new sequence is listed, so that of two equal requests one waits for the other.
        let mut running = self.running.lock().expect("no holder of this lock panics: this is a bug");
        let mut flights = Vec::with_capacity(running.len());
        running.retain(|flight| match flight.upgrade().filter(|flight| flight.is_joinable()) {
            Some(flight) => {
                flights.push(flight);
                true
            }
            None => false,
        });
        let joined = flights.iter().find_map(|flight| join_identical(flight, &plan));
        if let Some(joined) =
            joined.or_else(|| flights.iter().find_map(|flight| join_continuation(flight, &plan, tokenizer)))
        {
            return Ok(joined);
        }
        let reader = Flight::launch(engine, plan)?;
        running.push(Arc::downgrade(reader.flight()));
        Ok(alone(reader))
    }
}

/// What both kinds need. Speculation is part of it only because a client that sets it measures.
fn is_compatible(running: &FlightPlan, wanted: &FlightPlan) -> bool {
    let speculation = |plan: &FlightPlan| (plan.speculation.max_draft_tokens, plan.speculation.sources);
    running.lane == wanted.lane
        && running.cache_salt == wanted.cache_salt
        // Interactive work does not wait for a sequence that gives way.
        && running.priority <= wanted.priority
        && speculation(running) == speculation(wanted)
        && same_form(running, wanted)
}

/// Equal texts are compiled once, while they are in use.
fn same_form(a: &FlightPlan, b: &FlightPlan) -> bool {
    match (&a.grammar, &b.grammar) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (a, b) => a.is_none() && b.is_none(),
    }
}

fn same_sampling(a: &SamplingParams, b: &SamplingParams) -> bool {
    let comparable = |params: &SamplingParams| SamplingParams { seed: 0, max_tokens: 0, ..params.clone() };
    comparable(a) == comparable(b)
}

/// True if what a token's chances are depends on where the output begins: such an output cannot be
/// taken up by a prompt that ends inside it.
fn counts_output(plan: &FlightPlan) -> bool {
    let params = &plan.params;
    plan.grammar.is_some()
        || params.presence_penalty != 0.0
        || params.frequency_penalty != 0.0
        || params.min_tokens > 0
}

fn join_identical(flight: &Arc<Flight>, wanted: &FlightPlan) -> Option<Boarding> {
    let running = &flight.plan;
    let same_noise = wanted.params.temperature == 0.0
        || (running.names_seed && wanted.names_seed && running.params.seed == wanted.params.seed);
    // Such a one could not go on by itself if the sequence ends before it has what it wants.
    let may_be_cut = wanted.params.max_tokens > flight.max_tokens() || running.max_predict_time.is_some();
    let is_identical = same_noise
        && is_compatible(running, wanted)
        && running.prompt == wanted.prompt
        && same_sampling(&running.params, &wanted.params)
        && !(may_be_cut && counts_output(wanted));
    if !is_identical {
        return None;
    }
    let reader = flight.read()?;
    flight.extend(wanted.params.max_tokens);
    Some(Boarding { reader, shared: Some(Shared::Identical), num_typed_bytes: 0 })
}

fn join_continuation(
    flight: &Arc<Flight>,
    wanted: &FlightPlan,
    tokenizer: &Arc<Tokenizer>,
) -> Option<Boarding> {
    let (running, params) = (&flight.plan, &wanted.params);
    let (running_text, text) = (running.text.as_ref()?, wanted.text.as_ref()?);
    // A named seed asks for the answer to this very prompt, and the tokens of a prompt that was
    // typed on are not always those that the model wrote.
    let is_free = !wanted.names_seed && (params.temperature == 0.0 || !running.names_seed);
    let is_plain = params.logprobs.is_none()
        && params.prompt_logprobs.is_none()
        && params.repetition_penalty == 1.0
        && !counts_output(wanted);
    let num_typed_bytes = text.before.len().checked_sub(running_text.before.len())?;
    let is_near = (1..=MAX_TYPED_BYTES).contains(&num_typed_bytes);
    if !(is_free && is_plain && is_near && is_compatible(running, wanted)) {
        return None;
    }
    let typed = text.before.strip_prefix(&*running_text.before)?;
    if running_text.after != text.after || !same_sampling(&running.params, params) {
        return None;
    }
    let num_typed_tokens = tokens_of_typed(flight, typed, tokenizer)?;
    let reader = flight.read()?;
    flight.extend(params.max_tokens.saturating_add(num_typed_tokens));
    Some(Boarding { reader, shared: Some(Shared::Continuation), num_typed_bytes })
}

/// Tokens whose text lies wholly in `typed`; `None` unless the output begins with it and goes on.
fn tokens_of_typed(flight: &Flight, typed: &str, tokenizer: &Arc<Tokenizer>) -> Option<u32> {
    // A token has a byte of text or more, but for a few control tokens.
    let tokens = flight.first_tokens(2 * MAX_TYPED_BYTES);
    let mut detokenizer = Detokenizer::continuing(tokenizer.clone(), &flight.plan.prompt, true);
    let mut rest = typed;
    for (i, id) in tokens.into_iter().enumerate() {
        let Some(text) = detokenizer.push(id).ok()? else { continue };
        match rest.strip_prefix(text.as_str()) {
            Some(after) => rest = after,
            None => return text.starts_with(rest).then_some(i as u32),
        }
    }
    None
}
