//! A client at work: it carries out its plan and notes what it sees.

use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::Duration;

use tandem_engine::{EmbedRequest, Engine, Event, Lane, SequenceId, SubmitRequest};

use super::rng::Rng;
use super::workload::{AMPLE_CAPACITY, Deed, Plan};
use crate::common::{Answer, Grammar};

/// One client and its sequence.
pub(crate) struct Client<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) id: SequenceId,
    pub(crate) arrived_at: usize,
    pub(crate) submitted: Duration,
    /// When the client had the first token, and steps since it should have had the last.
    first_token: Option<Duration>,
    pub(crate) overdue_steps: usize,
    /// When the client had the last event.
    pub(crate) ended: Option<Duration>,
    pub(crate) answer: Answer,
    pub(crate) aborted: bool,
    pub(crate) closed: bool,
    /// `max_tokens` that it asked for later, and whether the sequence surely ran then.
    pub(crate) extended: Option<(u32, bool)>,
    receiver: Option<Receiver<Event>>,
    /// The engine has let go of its end of the channel.
    pub(crate) hung_up: bool,
}

impl<'a> Client<'a> {
    /// Submits the plan's request.
    pub(crate) fn arrive(
        plan: &'a Plan,
        id: SequenceId,
        engine: &mut Engine,
        now: Duration,
        step: usize,
    ) -> Self {
        let (sender, receiver) = sync_channel(plan.capacity);
        let (lane, priority, events) = (plan.lane, plan.priority, Box::new(sender));
        if plan.is_embedding {
            engine.embed(EmbedRequest { id, lane, tokens: plan.prompt.clone(), priority, events }, now);
        } else {
            let request = SubmitRequest {
                id,
                lane,
                prompt: plan.prompt.clone(),
                params: plan.params.clone(),
                priority,
                cache_salt: plan.salt,
                max_predict_time: plan.max_predict_time,
                speculation: plan.speculation.clone(),
                constraint: plan.grammar.as_ref().map(Grammar::start),
                events,
            };
            engine.submit(request, now);
        }
        Client {
            plan,
            id,
            arrived_at: step,
            submitted: now,
            first_token: None,
            overdue_steps: 0,
            ended: None,
            answer: Answer::default(),
            aborted: false,
            closed: false,
            extended: None,
            receiver: Some(receiver),
            hung_up: false,
        }
    }

    /// True if everything that the engine says is seen before its next step.
    pub(crate) fn is_prompt_reader(&self) -> bool {
        self.plan.reads_one_in == 1 && self.plan.capacity >= AMPLE_CAPACITY
    }

    /// True once nothing more can be seen.
    pub(crate) fn has_ended(&self) -> bool {
        self.answer.finished.is_some() || self.answer.failed.is_some()
    }

    /// Counts a step that began at `now`, if the sequence's time was up by then. For the deep lane the draft's do not
    /// count: between two layers of the target's pass there are as many as there is time for.
    pub(crate) fn count_overdue(&mut self, now: Duration, is_draft_step: bool) {
        let limit = self.plan.max_predict_time.zip(self.first_token);
        let is_between = is_draft_step && self.plan.lane == Lane::Deep;
        if !is_between
            && limit.is_some_and(|(limit, first)| now >= first + limit)
            && self.is_prompt_reader()
            && !self.closed
            && !self.has_ended()
        {
            self.overdue_steps += 1;
        }
    }

    /// Does what the plan says for this step.
    pub(crate) fn act(&mut self, engine: &mut Engine, step: usize) -> Option<Deed> {
        let (when, deed) = self.plan.deed?;
        if step != self.arrived_at + when {
            return None;
        }
        match deed {
            Deed::Abort => {
                engine.abort(self.id);
                self.aborted = true;
            }
            Deed::Close => {
                self.receiver = None;
                self.closed = true;
            }
            Deed::Extend(max_tokens) => {
                engine.extend(self.id, max_tokens);
                self.extended = Some((max_tokens, self.is_prompt_reader() && !self.has_ended()));
            }
        }
        Some(deed)
    }

    /// Takes what is in the channel, if it is this reader's turn; `heard` is told of every event.
    pub(crate) fn read(&mut self, rng: &Rng, hurry: bool, now: Duration, mut heard: impl FnMut(&Event)) {
        let Some(receiver) = &self.receiver else { return };
        if !(hurry || rng.one_in(self.plan.reads_one_in)) {
            return;
        }
        loop {
            match receiver.try_recv() {
                Ok(event) => {
                    heard(&event);
                    self.answer.take(event);
                    if self.first_token.is_none() && !self.answer.tokens.is_empty() {
                        self.first_token = Some(now);
                    }
                    if self.ended.is_none() && self.has_ended() {
                        self.ended = Some(now);
                    }
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.hung_up = true;
                    return;
                }
            }
        }
    }
}
