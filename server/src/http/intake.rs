//! The way of every request that generates, whatever its protocol: the model is found, the common
//! fields are checked, the prompts follow, the sequences start.

use std::sync::Arc;

use axum::response::Response;
use http::{HeaderMap, HeaderValue};
use tandem_engine::CacheSalt;

use super::error::ApiError;
use super::fields::{Common, CommonFields, Prediction};
use super::generation::{Generation, Prompt, Shared};
use super::grammars::GrammarPlan;
use super::lanes::{AUTO, LANE_HEADER, Work, lane_name, resolve};
use super::state::{AppState, ServedModel};

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
}

impl<'a> Intake<'a> {
    /// Finds who answers and checks the common fields. `fills_gap`: the answer ends where another
    /// gap or file begins, too.
    ///
    /// # Errors
    /// If the model is not served, or a field is outside its range.
    pub(super) fn new(
        state: &'a Arc<AppState>,
        headers: &HeaderMap,
        mut fields: CommonFields,
        work: Work,
        fills_gap: bool,
    ) -> Result<Self, ApiError> {
        let served = resolve(state, fields.model.as_deref(), work)?;
        let stops = if fills_gap { served.fim_stop_token_ids.as_slice() } else { &[] };
        let common = fields.resolve(served, &state.limits, stops)?;
        let cache_salt = state.cache_salt(headers, fields.cache_salt()?);
        let prediction = fields.take_prediction();
        Ok(Intake { state, served, common, model: fields.model, prediction, cache_salt })
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

    /// Starts a sequence for every choice of every prompt.
    ///
    /// # Errors
    /// If the prediction or the form is refused, or what the engine refuses.
    pub(super) async fn start(mut self, prompts: Vec<Prompt>) -> Result<(Generation, Reply), ApiError> {
        if let Some(prediction) = self.prediction.take() {
            self.common.speculation.prediction = prediction.encode(self.state, self.served).await?;
        }
        let mut reply = Reply {
            model: self.model.unwrap_or_else(|| AUTO.to_owned()),
            lane: lane_name(self.served.lane),
            seed: self.common.seed,
            shared: None,
            stream: self.common.stream,
            include_usage: self.common.include_usage,
            continuous_usage: self.common.continuous_usage,
        };
        let plan = match (self.common.grammar.take(), &self.common.format) {
            (None, Some(asked)) => Some(GrammarPlan::plain(asked)?),
            (plan, _) => plan,
        };
        let grammar = match plan {
            Some(plan) => Some(plan.compile(self.served).await?),
            None => None,
        };
        let request = self.common.into_request(prompts, self.cache_salt, grammar);
        let generation = Generation::start(self.state, self.served, &request)?;
        // A joined sequence has its own seed.
        reply.seed = generation.joined_seed().map_or(reply.seed, i128::from);
        reply.shared = generation.shared();
        Ok((generation, reply))
    }
}

/// How a request is answered.
pub(super) struct Reply {
    /// The name that the client used; nobody named is `auto`.
    pub(super) model: String,
    pub(super) lane: &'static str,
    /// The seed that the answer can be repeated with.
    pub(super) seed: i128,
    pub(super) shared: Option<Shared>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
}

impl Reply {
    /// Adds lane, seed and sharing to a response's headers.
    pub(super) fn add_headers(&self, response: &mut Response) {
        let headers = response.headers_mut();
        headers.insert(LANE_HEADER, HeaderValue::from_static(self.lane));
        let seed =
            HeaderValue::from_str(&self.seed.to_string()).expect("digits are a header value: this is a bug");
        headers.insert(SEED_HEADER, seed);
        if let Some(shared) = self.shared {
            headers.insert(SHARED_HEADER, HeaderValue::from_static(shared.name()));
        }
    }
}

/// The tokens that an answer may have.
///
/// `strict`: a bound that the client set and that does not fit beside the prompt is an error, as with
/// OpenAI's chat; otherwise it is lowered to what fits.
pub(super) fn answer_tokens(
    param: &str,
    asked: Option<i128>,
    default: Option<u32>,
    num_prompt_tokens: usize,
    max_model_len: usize,
    strict: bool,
) -> Result<u32, ApiError> {
    let room = max_model_len.saturating_sub(num_prompt_tokens);
    let only_scores = asked == Some(0) && num_prompt_tokens <= max_model_len;
    if room == 0 && !only_scores {
        let error = tandem_engine::EngineError::PromptTooLong { num_prompt_tokens, max_model_len };
        return Err(error.into());
    }
    if let Some(asked) = asked
        && strict
        && asked > room as i128
    {
        let message = format!(
            "the prompt has {num_prompt_tokens} tokens and {param} is {asked}, together {}; \
             the context holds {max_model_len}",
            asked.saturating_add(num_prompt_tokens as i128)
        );
        return Err(ApiError::invalid(param, message).with_code("context_length_exceeded"));
    }
    let wanted = asked.or(default.map(i128::from)).unwrap_or(room as i128);
    Ok(wanted.min(room as i128) as u32)
}

#[cfg(test)]
mod tests {
    use super::answer_tokens;

    #[test]
    fn an_answer_is_bounded_by_what_the_prompt_leaves() {
        let tokens = |asked, default, prompt, strict| {
            answer_tokens("max_tokens", asked, default, prompt, 100, strict).map_err(|error| error.message)
        };
        assert_eq!(tokens(None, Some(16), 10, false), Ok(16));
        assert_eq!(tokens(None, Some(16), 95, false), Ok(5));
        assert_eq!(tokens(None, None, 60, true), Ok(40));
        assert_eq!(tokens(Some(40), None, 60, true), Ok(40));
        assert_eq!(tokens(Some(41), None, 60, false), Ok(40));
        let error = tokens(Some(41), None, 60, true).unwrap_err();
        assert!(error.contains("60") && error.contains("41") && error.contains("100"), "{error}");
        let error = tokens(Some(1), None, 100, false).unwrap_err();
        assert!(error.contains("100"), "{error}");
    }
}
