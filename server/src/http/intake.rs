//! The way of every request that generates, whatever its protocol: the model is found, the common
//! fields are checked, the prompts follow, the sequences start.

use std::sync::Arc;

use axum::response::Response;
use http::{HeaderMap, HeaderValue};
use tandem_engine::CacheSalt;

use super::error::ApiError;
use super::fields::{Common, CommonFields, Prediction, in_range};
use super::generation::{Generation, Prompt, Shared};
use super::grammars::GrammarPlan;
use super::lanes::{AUTO, Escalation, LANE_HEADER, REASON_HEADER, Reason, Work, lane_name, route};
use super::state::{AppState, ServedModel};
use super::traces::{ModelWork, WorkRecord};
use super::{auth, lanes};
use crate::keys::{Client, Lanes};

/// Says which seed an answer can be repeated with.
const SEED_HEADER: &str = "x-tandem-seed";

/// Says that the answer is read from a sequence that another request had started.
const SHARED_HEADER: &str = "x-tandem-shared";

/// A request whose prompts are still to come.
pub(super) struct Intake<'a> {
    pub(super) state: &'a Arc<AppState>,
    pub(super) served: &'a ServedModel,
    pub(super) common: Common,
    /// As the client named it.
    model: Option<String>,
    prediction: Option<Prediction>,
    cache_salt: CacheSalt,
    /// Whose request it is; `None` where no key is needed.
    client: Option<Arc<Client>>,
    reason: Reason,
    /// Who answers if the one that was found turns out not to do.
    next: Option<&'a ServedModel>,
    escalation: Option<Escalation>,
}

impl<'a> Intake<'a> {
    /// Finds who answers and checks the common fields. `fills_gap`: the answer ends where another
    /// gap or file begins, too.
    ///
    /// # Errors
    /// If the key is no longer valid or does not open the lane, the model is not served, or a field is outside
    /// its range.
    pub(super) fn new(
        state: &'a Arc<AppState>,
        headers: &HeaderMap,
        mut fields: CommonFields,
        work: Work,
        fills_gap: bool,
    ) -> Result<Self, ApiError> {
        let client = auth::client(state, headers)?;
        let opened = client.as_ref().map_or(Lanes::ALL, |client| client.rules().lanes);
        let key = client.as_ref().and_then(|client| client.name());
        let traits = fields.hints().traits(headers, work, key);
        let lanes::Route { served, reason, next, escalation } =
            route(state, fields.model.as_deref(), &traits, opened)?;
        let stops = if fills_gap { served.fim_stop_token_ids.as_slice() } else { &[] };
        let mut common = fields.resolve(served, &state.limits, stops)?;
        if let Some(client) = &client {
            // The greater is the one that gives way.
            common.priority = common.priority.max(client.rules().priority);
        }
        let cache_salt = state.cache_salt(headers, fields.cache_salt()?);
        let prediction = fields.take_prediction();
        let model = fields.model;
        Ok(Intake { state, served, common, model, prediction, cache_salt, client, reason, next, escalation })
    }

    /// Most tokens of prompt and answer together.
    pub(super) fn max_model_len(&self) -> usize {
        self.state.engine.max_model_len()
    }

    /// Refuses more sequences than run and wait together: such a request could never be admitted, and
    /// trying again, which a 429 asks for, would not help.
    ///
    /// # Errors
    /// The 400 that says so.
    pub(super) fn check_sequences(&self, num_prompts: usize) -> Result<(), ApiError> {
        let num_choices = self.common.num_choices;
        let num_sequences = num_prompts * num_choices;
        let most = self.state.engine.max_sequences();
        if num_sequences <= most {
            return Ok(());
        }
        let message = format!(
            "{num_prompts} prompts with n = {num_choices} are {num_sequences} answers; this server holds at \
             most {most} at a time"
        );
        Err(ApiError::invalid(if num_choices > 1 { "n" } else { "prompt" }, message))
    }

    /// Starts a sequence for every choice of every prompt. If the draft may be unsure, its first tokens are
    /// awaited here, before anything is sent.
    ///
    /// # Errors
    /// If the prediction or the form is refused, the client's budget is spent, or what the engine refuses.
    pub(super) async fn start(mut self, prompts: Vec<Prompt>) -> Result<(Generation, Reply), ApiError> {
        if let Some(prediction) = self.prediction.take() {
            self.common.speculation.prediction = prediction.encode(self.state, self.served).await?;
        }
        if let Some(client) = &self.client {
            auth::spend_prompt(client, prompts.iter().map(|prompt| prompt.tokens.len() as u64).sum())?;
        }
        if self.outgrows_fast(&prompts) {
            self.escalate(Reason::Outgrown);
        }
        let mut reply = Reply {
            model: self.model.take().unwrap_or_else(|| AUTO.to_owned()),
            lane: "",
            reason: HeaderValue::from_static(""),
            seed: self.common.seed,
            shared: None,
            stream: self.common.stream,
            include_usage: self.common.include_usage,
            continuous_usage: self.common.continuous_usage,
            record: None,
        };
        let plan = match (self.common.grammar.take(), &self.common.format) {
            (None, Some(asked)) => Some(GrammarPlan::plain(asked, self.state, self.served).await?),
            (plan, _) => plan,
        };
        let grammar = match plan {
            Some(plan) => Some(plan.compile(self.served).await?),
            None => None,
        };
        // A form says little of how sure the draft is: it leaves some tokens no alternative.
        let has_margins = grammar.is_none() && prompts.iter().any(|prompt| prompt.max_tokens > 0);
        let watched = self.escalation.filter(|_| has_margins);
        self.common.params.num_margins = watched.map_or(0, |escalation| escalation.tokens);
        let common = std::mem::take(&mut self.common);
        let mut request = common.into_request(prompts, self.cache_salt, self.client.clone(), grammar);
        let mut generation = Generation::start(self.state, self.served, &request)?;
        if let Some(escalation) = watched
            && generation.mean_margin(escalation.tokens).await.is_some_and(|mean| mean < escalation.margin)
        {
            // The draft's sequences end with this.
            drop(generation);
            self.escalate(Reason::Unsure);
            request.params.num_margins = 0;
            generation = Generation::start(self.state, self.served, &request)?;
        }
        generation.set_lane_reason(self.reason.clone());
        if self.state.tracer.is_some() {
            let record = WorkRecord::new(ModelWork {
                request_model: reply.model.clone(),
                model: self.served.model.name.clone(),
                lane: lane_name(self.served.lane),
                lane_reason: self.reason.to_string(),
                temperature: request.params.temperature,
                top_p: request.params.top_p,
                max_tokens: request.prompts.iter().map(|prompt| prompt.max_tokens).max().unwrap_or(0),
                num_choices: request.num_choices,
                ..ModelWork::default()
            });
            generation.record(record.clone());
            reply.record = Some(record);
        }
        reply.lane = lane_name(self.served.lane);
        reply.reason = HeaderValue::from_str(&self.reason.to_string())
            .expect("rules have names of visible ASCII: this is a bug");
        self.state.metrics.lane_chosen(self.served.lane, self.reason.kind());
        // A joined sequence has its own seed.
        reply.seed = generation.joined_seed().map_or(reply.seed, i128::from);
        reply.shared = generation.shared();
        Ok((generation, reply))
    }

    /// True if the fast lane was to answer and a prompt with its answer is more than that takes.
    fn outgrows_fast(&self, prompts: &[Prompt]) -> bool {
        let Some(most) = self.state.policy.fast_context.filter(|_| self.next.is_some()) else { return false };
        prompts.iter().any(|prompt| prompt.tokens.len() + prompt.max_tokens as usize > most)
    }

    /// Lets the other lane answer. Both make the same of the request, so the answer is that lane's own.
    fn escalate(&mut self, reason: impl FnOnce(Arc<str>) -> Reason) {
        self.served = self.next.take().expect("it is asked for only if there is one: this is a bug");
        self.escalation = None;
        let rule = match &self.reason {
            Reason::Rule(name) => name.clone(),
            _ => Arc::from("none"),
        };
        self.reason = reason(rule);
    }
}

/// How a request is answered.
pub(super) struct Reply {
    /// The name that the client used; nobody named is `auto`.
    pub(super) model: String,
    pub(super) lane: &'static str,
    /// Why that lane answers.
    pub(super) reason: HeaderValue,
    /// The seed that the answer can be repeated with.
    pub(super) seed: i128,
    pub(super) shared: Option<Shared>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    /// For the request's span.
    record: Option<WorkRecord>,
}

impl Reply {
    /// Adds lane, seed and sharing to a response's headers, and what its span is to tell.
    pub(super) fn add_headers(&self, response: &mut Response) {
        if let Some(record) = &self.record {
            response.extensions_mut().insert(record.clone());
        }
        let headers = response.headers_mut();
        headers.insert(LANE_HEADER, HeaderValue::from_static(self.lane));
        headers.insert(REASON_HEADER, self.reason.clone());
        let seed =
            HeaderValue::from_str(&self.seed.to_string()).expect("digits are a header value: this is a bug");
        headers.insert(SEED_HEADER, seed);
        if let Some(shared) = self.shared {
            headers.insert(SHARED_HEADER, HeaderValue::from_static(shared.name()));
        }
    }
}

/// Checks a client's bound on the tokens of an answer. What exceeds the context is no fault: see
/// [`answer_tokens`].
///
/// # Errors
/// If it is less than `least`, or no count at all.
pub(super) fn asked_tokens(param: &str, asked: Option<i128>, least: i128) -> Result<Option<i128>, ApiError> {
    asked.map(|value| in_range(param, value, least, i64::MAX.into())).transpose()
}

/// The tokens that an answer may have: what the client asked for, as far as the context has room for it. Agents
/// ask for what the largest models can say.
///
/// # Errors
/// If the prompt leaves no room at all.
pub(super) fn answer_tokens(
    asked: Option<i128>,
    default: Option<u32>,
    num_prompt_tokens: usize,
    max_model_len: usize,
) -> Result<u32, ApiError> {
    let room = max_model_len.saturating_sub(num_prompt_tokens);
    let only_scores = asked == Some(0) && num_prompt_tokens <= max_model_len;
    if room == 0 && !only_scores {
        let error = tandem_engine::EngineError::PromptTooLong { num_prompt_tokens, max_model_len };
        return Err(error.into());
    }
    let wanted = asked.or(default.map(i128::from)).unwrap_or(room as i128);
    Ok(wanted.min(room as i128) as u32)
}

#[cfg(test)]
mod tests {
    use super::answer_tokens;

    #[test]
    fn an_answer_is_bounded_by_what_the_prompt_leaves() {
        let tokens = |asked, default, prompt| {
            answer_tokens(asked, default, prompt, 100).map_err(|error| error.message)
        };
        assert_eq!(tokens(None, Some(16), 10), Ok(16));
        assert_eq!(tokens(None, Some(16), 95), Ok(5));
        assert_eq!(tokens(None, None, 60), Ok(40));
        assert_eq!(tokens(Some(40), None, 60), Ok(40));
        assert_eq!(tokens(Some(1 << 60), None, 60), Ok(40));
        assert_eq!(tokens(Some(0), None, 100), Ok(0));
        let error = tokens(Some(1), None, 100).unwrap_err();
        assert!(error.contains("100"), "{error}");
    }
}
