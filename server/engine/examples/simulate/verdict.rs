//! Was a client served right? Equality has no tolerance here: floats are compared by their bits.

use tandem_engine::{
    DraftSource, DraftTokens, EngineConfig, FinishReason, Finished, Lane, SamplingParams, TokenId,
    TokenLogprobs, Usage,
};

use super::client::Client;
use super::oracle::{Oracle, same_failure};
use super::scenario::Scenario;
use crate::common::Answer;

/// Says what is wrong with what `client` saw.
pub(crate) fn judge(client: &Client<'_>, scenario: &Scenario, oracle: &mut Oracle) -> Result<(), String> {
    let plan = client.plan;
    let saw = &client.answer;
    let config = &scenario.config;
    if plan.is_embedding {
        return judge_embedding(client, &oracle.embedding(plan.lane, &plan.prompt));
    }
    let raised = raised_limit(client, config);
    let params = SamplingParams { max_tokens: raised, ..plan.params.clone() };
    let truth = oracle.answer(plan.lane, &plan.prompt, &params, plan.grammar.as_ref());
    is_prefix(saw, &truth)?;
    check_form(saw, &plan.params)?;
    if let Some(finished) = &saw.finished {
        check_usage(client, config, &finished.usage)?;
        if scenario.pair.drafts_perfectly(config) {
            check_perfection(&finished.usage)?;
        }
        check_reason(client, finished.reason, raised, &truth)?;
    }
    check_end(client, &truth)
}

/// The same of a text to embed.
fn judge_embedding(client: &Client<'_>, truth: &Answer) -> Result<(), String> {
    let saw = &client.answer;
    let bits = |answer: &Answer| {
        let values = answer.embedding.as_ref()?;
        Some(values.iter().map(|value| value.to_bits()).collect::<Vec<_>>())
    };
    if saw.embedding.is_some() && bits(saw) != bits(truth) {
        return Err(format!("its embedding is {:?}; the oracle says {:?}", saw.embedding, truth.embedding));
    }
    if !saw.tokens.is_empty() || saw.prompt_logprobs.is_some() {
        return Err("it asked for an embedding alone".into());
    }
    if let Some(Finished { reason, usage }) = &saw.finished {
        let is_right = match reason {
            FinishReason::Length => saw.embedding.is_some(),
            FinishReason::Aborted => client.aborted,
            _ => false,
        };
        if !is_right {
            return Err(format!("it ended with {reason:?}"));
        }
        let counts = (usage.num_prompt_tokens as usize, usage.num_output_tokens, usage.num_cached_tokens);
        if counts != (client.plan.prompt.len(), 0, 0) || usage.total_draft_tokens() > 0 {
            return Err(format!("its tokens are miscounted: {usage:?}"));
        }
    }
    check_end(client, truth)
}

/// The channel ended as it should.
fn check_end(client: &Client<'_>, truth: &Answer) -> Result<(), String> {
    let saw = &client.answer;
    if !client.closed && !client.hung_up {
        return Err("its channel was left open".into());
    }
    if client.closed || saw.finished.is_some() {
        return Ok(());
    }
    match (&saw.failed, &truth.failed) {
        (Some(error), Some(wanted)) if same_failure(error, wanted) => Ok(()),
        (Some(error), _) => Err(format!("it failed and should not have: {error}")),
        // The channel was full, so the engine closed it instead.
        (None, wanted) if !client.is_prompt_reader() && wanted.is_some() => Ok(()),
        (None, _) => Err("its channel closed without a last event".into()),
    }
}

/// `max_tokens` after the client raised it, at most what fits.
fn raised_limit(client: &Client<'_>, config: &EngineConfig) -> u32 {
    let max_tokens = client.plan.params.max_tokens;
    let capacity = config.max_model_len.min(config.num_blocks * config.block_size);
    let room = (capacity - client.plan.prompt.len()) as u32;
    client.extended.map_or(max_tokens, |(to, _)| max_tokens.max(to.min(room)))
}

fn is_prefix(saw: &Answer, truth: &Answer) -> Result<(), String> {
    for (i, &token) in saw.tokens.iter().enumerate() {
        match truth.tokens.get(i) {
            Some(&right) if right == token => {}
            right => return Err(format!("output token {i} is {token}; the oracle says {right:?}")),
        }
    }
    for (i, entry) in saw.logprobs.iter().enumerate() {
        match truth.logprobs.get(i) {
            Some(right) if same_bits(entry, right) => {}
            right => return Err(format!("log-probability {i} is {entry:?}; the oracle says {right:?}")),
        }
    }
    for (i, margin) in saw.margins.iter().enumerate() {
        match truth.margins.get(i) {
            Some(right) if right.to_bits() == margin.to_bits() => {}
            right => return Err(format!("margin {i} is {margin}; the oracle says {right:?}")),
        }
    }
    let Some(scored) = &saw.prompt_logprobs else { return Ok(()) };
    let right = truth.prompt_logprobs.as_deref().unwrap_or_default();
    let differs = |i: &usize| match (&scored[*i], right.get(*i)) {
        (None, Some(None)) => false,
        (Some(entry), Some(Some(right))) => !same_bits(entry, right),
        _ => true,
    };
    match (0..scored.len()).find(differs) {
        Some(i) => {
            Err(format!("prompt log-probability {i} is {:?}; the oracle says {:?}", scored[i], right.get(i)))
        }
        None if scored.len() != right.len() => Err(format!("{} prompt log-probabilities", scored.len())),
        None => Ok(()),
    }
}

fn same_bits(a: &TokenLogprobs, b: &TokenLogprobs) -> bool {
    a.logprob.to_bits() == b.logprob.to_bits()
        && a.top.len() == b.top.len()
        && a.top.iter().zip(&b.top).all(|(a, b)| a.0 == b.0 && a.1.to_bits() == b.1.to_bits())
}

/// What every stream of events has in common, whatever became of the sequence.
fn check_form(saw: &Answer, params: &SamplingParams) -> Result<(), String> {
    let wanted_logprobs = if params.logprobs.is_some() { saw.tokens.len() } else { 0 };
    if saw.logprobs.len() != wanted_logprobs {
        return Err(format!("{} log-probabilities, {wanted_logprobs} wanted", saw.logprobs.len()));
    }
    let scores = params.prompt_logprobs.is_some();
    let ends_by_itself =
        |reason| matches!(reason, FinishReason::Stop(_) | FinishReason::Complete | FinishReason::Length);
    let is_complete = saw.finished.is_some_and(|f| ends_by_itself(f.reason));
    if saw.prompt_logprobs.is_some() && !scores {
        return Err("nobody asked for prompt log-probabilities".into());
    }
    if scores && saw.prompt_logprobs.is_none() && (is_complete || !saw.tokens.is_empty()) {
        return Err("the prompt's log-probabilities are missing".into());
    }
    Ok(())
}

fn check_reason(
    client: &Client<'_>,
    reason: FinishReason,
    raised: u32,
    truth: &Answer,
) -> Result<(), String> {
    let saw = &client.answer;
    let right = truth.finished.map(|f| f.reason);
    let wrong = |why: &str| {
        Err(format!(
            "it ended with {reason:?} after {} tokens: {why}; the oracle says {right:?} after {}",
            saw.tokens.len(),
            truth.tokens.len()
        ))
    };
    match reason {
        FinishReason::Stop(_) | FinishReason::Complete if right != Some(reason) => {
            wrong("an end nobody else sees")
        }
        FinishReason::Stop(_) | FinishReason::Complete if saw.tokens.len() != truth.tokens.len() => {
            wrong("too early")
        }
        FinishReason::Length => {
            let surely_raised = client.extended.is_some_and(|(_, surely)| surely);
            let at_first = client.plan.params.max_tokens as usize;
            match saw.tokens.len() {
                n if n == raised as usize => Ok(()),
                n if n == at_first && !surely_raised => Ok(()),
                _ => wrong("not its limit"),
            }
        }
        FinishReason::Deadline => match (client.plan.max_predict_time, client.ended) {
            (None, _) => wrong("it has no deadline"),
            _ if saw.tokens.is_empty() => wrong("its time starts with the first token"),
            (Some(limit), Some(ended)) if ended - client.submitted < limit => wrong("its time was not up"),
            _ => Ok(()),
        },
        FinishReason::Aborted if !client.aborted => wrong("nobody aborted it"),
        _ => Ok(()),
    }
}

fn check_usage(client: &Client<'_>, config: &EngineConfig, usage: &Usage) -> Result<(), String> {
    let plan = client.plan;
    let wrong = |what: &str| Err(format!("{what}: {usage:?}"));
    if usage.num_prompt_tokens as usize != plan.prompt.len() {
        return wrong("prompt tokens are miscounted");
    }
    if usage.num_output_tokens as usize != client.answer.tokens.len() {
        return wrong("output tokens are miscounted");
    }
    if usage.num_cached_tokens >= usage.num_prompt_tokens
        || (usage.num_cached_tokens > 0 && !config.prefix_cache)
    {
        return wrong("cached tokens are miscounted");
    }
    let accepted = usage.total_accepted_tokens() as usize;
    // A draft token that foresaw a stop token was right, and is not output.
    if client.answer.drafted > accepted || accepted > client.answer.drafted + 1 {
        return wrong("accepted tokens are miscounted");
    }
    for source in DraftSource::ALL {
        let offered = usage.num_draft_tokens[source as usize];
        if usage.num_accepted_tokens[source as usize] > offered {
            return wrong("more was accepted than offered");
        }
        if offered > 0 && (!plan.speculation.sources.contains(source) || !speculates(client, config)) {
            return wrong("this source was not to be used");
        }
    }
    Ok(())
}

/// What drafts as the target draws is never wrong.
fn check_perfection(usage: &Usage) -> Result<(), String> {
    let source = DraftSource::Draft as usize;
    if usage.num_accepted_tokens[source] != usage.num_draft_tokens[source] {
        return Err(format!("tokens of a perfect draft fell: {usage:?}"));
    }
    Ok(())
}

fn speculates(client: &Client<'_>, config: &EngineConfig) -> bool {
    client.plan.lane == Lane::Deep
        && match client.plan.speculation.max_draft_tokens {
            Some(length) => length > 0,
            None => config.draft_tokens != DraftTokens::Fixed(0),
        }
}

/// The most prompt tokens that `client` can have found in the cache: what somebody with its salt
/// had in common with it, in whole blocks.
pub(crate) fn most_cached_tokens(
    client: &Client<'_>,
    others: &[(Vec<TokenId>, &Client<'_>)],
    block_size: usize,
) -> usize {
    let shared = |text: &[TokenId]| {
        client.plan.prompt.iter().zip(text).take_while(|(a, b)| a == b).count() / block_size * block_size
    };
    others
        .iter()
        .filter(|(_, other)| other.id != client.id && other.plan.salt == client.plan.salt)
        .map(|(text, _)| shared(text))
        .max()
        .unwrap_or(0)
}
