//! From the model name of a request to the lane that answers it.

mod hints;
mod policy;

use std::fmt;
use std::sync::Arc;

use tandem_engine::Lane;

use super::error::{ApiError, ErrorKind};
use super::state::{AppState, ServedModel};
use crate::keys::Lanes;
pub(super) use hints::Hints;
pub use policy::{
    Conditions, DEFAULT_WATCHED_TOKENS, Escalation, LanePolicy, LaneRule, MAX_WATCHED_TOKENS, Span, Traits,
    WorkKind,
};

/// In a response: the lane that answered, whatever name the client used. In a request: the lane that the client
/// would like, for rules to look at.
pub const LANE_HEADER: &str = "x-tandem-lane";

/// Says why that lane answered.
pub const REASON_HEADER: &str = "x-tandem-lane-reason";

/// The path of a request, among its headers: handlers pass those on and know no path. What a client writes
/// there is replaced.
pub(super) const ENDPOINT_HEADER: &str = "x-tandem-endpoint";

/// The name of the policy that picks a lane.
pub const AUTO: &str = "auto";

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A completion, or a gap to fill, of at most so many tokens.
    Completion {
        /// The request's own bound or the endpoint's default.
        max_tokens: u64,
    },
    /// A gap that an editor wants filled.
    Gap,
    /// A conversation.
    Chat,
}

/// The name of a lane, as in requests and headers.
pub fn lane_name(lane: Lane) -> &'static str {
    match lane {
        Lane::Fast => "fast",
        Lane::Deep => "deep",
    }
}

/// Finds who is called `name`; no name is `auto`, for which whoever is there will do, the target first. Of
/// requests that generate, [`route`] says who answers.
///
/// # Errors
/// 404 with the names there are.
pub fn resolve<'a>(state: &'a AppState, name: Option<&str>) -> Result<&'a ServedModel, ApiError> {
    let name = name.unwrap_or(AUTO);
    if name == AUTO {
        return Ok(state
            .target
            .as_ref()
            .or(state.draft.as_ref())
            .expect("a state has a model: this is a bug"));
    }
    find(state, name).ok_or_else(|| unknown_model(state, name))
}

fn find<'a>(state: &'a AppState, name: &str) -> Option<&'a ServedModel> {
    match name {
        "fast" => state.draft.as_ref(),
        "deep" => state.target.as_ref(),
        _ => [&state.target, &state.draft].into_iter().flatten().find(|served| served.model.name == name),
    }
}

/// Who answers a request, and why.
pub struct Route<'a> {
    /// Who answers.
    pub served: &'a ServedModel,
    /// Why.
    pub reason: Reason,
    /// Who answers if the draft is unsure, or the request outgrows it.
    pub(super) next: Option<&'a ServedModel>,
    /// When the draft is unsure.
    pub(super) escalation: Option<Escalation>,
}

/// Why a lane answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The client named it.
    Named,
    /// A rule's doing.
    Rule(Arc<str>),
    /// No rule matched.
    NoRule,
    /// The lane that the rule wanted is not served, or the key does not open it.
    OnlyLane,
    /// The draft was unsure.
    Unsure(Arc<str>),
    /// Prompt and answer are more than the fast lane takes.
    Outgrown(Arc<str>),
}

impl Reason {
    /// Its kind in a word, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Reason::Named => "named",
            Reason::Rule(_) => "rule",
            Reason::NoRule => "no_rule",
            Reason::OnlyLane => "only_lane",
            Reason::Unsure(_) => "unsure",
            Reason::Outgrown(_) => "outgrown",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Named => f.write_str("named"),
            Reason::Rule(name) => write!(f, "rule {name}"),
            Reason::NoRule => f.write_str("no rule"),
            Reason::OnlyLane => f.write_str("only lane"),
            Reason::Unsure(name) => write!(f, "escalated: unsure; rule {name}"),
            Reason::Outgrown(name) => write!(f, "escalated: outgrown; rule {name}"),
        }
    }
}

/// Finds who answers a request to `name`; no name is `auto`, which the rules decide. A lane that is not served,
/// or that the client's key does not open, is the other lane then.
///
/// # Errors
/// 404 with the names there are; 403 for a lane that the key does not open.
pub fn route<'a>(
    state: &'a AppState,
    name: Option<&str>,
    traits: &Traits<'_>,
    lanes: Lanes,
) -> Result<Route<'a>, ApiError> {
    let name = name.unwrap_or(AUTO);
    let opened = |lane| state.served(lane).filter(|_| lanes.allows(lane));
    if name != AUTO {
        let served = find(state, name).ok_or_else(|| unknown_model(state, name))?;
        if !lanes.allows(served.lane) {
            return Err(closed_lane(served.lane, lanes));
        }
        return Ok(Route { served, reason: Reason::Named, next: None, escalation: None });
    }
    let rule = state.policy.find(traits);
    let wanted = rule.map_or(Lane::Deep, |rule| rule.lane);
    let Some(served) = opened(wanted) else {
        let other = if wanted == Lane::Fast { Lane::Deep } else { Lane::Fast };
        let served = opened(other).ok_or_else(|| closed_lane(wanted, lanes))?;
        return Ok(Route { served, reason: Reason::OnlyLane, next: None, escalation: None });
    };
    let reason = rule.map_or(Reason::NoRule, |rule| Reason::Rule(rule.name.clone()));
    // The answer to an escalated request is the deep lane's own only if that would read the request alike.
    let next = opened(Lane::Deep).filter(|_| wanted == Lane::Fast && state.lanes_read_alike);
    let escalation = rule.and_then(|rule| rule.escalation).filter(|_| next.is_some());
    Ok(Route { served, reason, next, escalation })
}

/// The 403 for a lane that a key does not open.
pub(super) fn closed_lane(lane: Lane, lanes: Lanes) -> ApiError {
    let message = format!("this key does not open the lane {}; it opens: {lanes}", lane_name(lane));
    ApiError {
        param: Some("model".to_owned()),
        code: Some("lane_not_allowed"),
        ..ApiError::new(ErrorKind::Forbidden, message)
    }
}

/// Every name that [`resolve`] knows here, with the model behind it (`None`: the policy decides).
pub fn available(state: &AppState) -> Vec<(&str, Option<&ServedModel>)> {
    let mut names: Vec<(&str, Option<&ServedModel>)> = Vec::with_capacity(5);
    let lanes = [&state.draft, &state.target].into_iter().flatten();
    names.extend(lanes.map(|served| (lane_name(served.lane), Some(served))));
    names.push((AUTO, None));
    // Target first: it answers a name that both carry.
    for served in [&state.target, &state.draft].into_iter().flatten() {
        let name = served.model.name.as_str();
        if names.iter().all(|(known, _)| *known != name) {
            names.push((name, Some(served)));
        }
    }
    names
}

/// The 404 for a model name.
pub fn unknown_model(state: &AppState, name: &str) -> ApiError {
    let names: Vec<&str> = available(state).iter().map(|(name, _)| *name).collect();
    let why = match name {
        "fast" => " (the fast lane takes a draft model; a drafting head answers nobody by itself)",
        _ => "",
    };
    ApiError {
        param: Some("model".to_owned()),
        code: Some("model_not_found"),
        ..ApiError::new(
            ErrorKind::NotFound,
            format!("the model {name:?} is not served here{why}; there are: {}", names.join(", ")),
        )
    }
}
