//! From the model name of a request to the lane that answers it.

use tandem_engine::Lane;

use super::error::{ApiError, ErrorKind};
use super::state::{AppState, ServedModel};

/// Names the lane that answered, whatever name the client used.
pub const LANE_HEADER: &str = "x-tandem-lane";

/// The name of the policy that picks a lane.
pub const AUTO: &str = "auto";

/// Completions up to this many tokens are interactive: the length of ghost text.
const INTERACTIVE_TOKENS: u64 = 64;

/// What the automatic policy looks at.
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

/// The policy behind `auto`: short completions and editors' gaps are interactive and go to `fast`, all
/// else to `deep`.
pub fn choose_lane(work: Work) -> Lane {
    match work {
        Work::Completion { max_tokens } if max_tokens <= INTERACTIVE_TOKENS => Lane::Fast,
        Work::Gap => Lane::Fast,
        Work::Completion { .. } | Work::Chat => Lane::Deep,
    }
}

/// Finds who answers `name`; no name is `auto`. If `auto` picks a lane that is not served, the other
/// one answers.
///
/// # Errors
/// 404 with the names there are.
pub fn resolve<'a>(state: &'a AppState, name: Option<&str>, work: Work) -> Result<&'a ServedModel, ApiError> {
    let name = name.unwrap_or(AUTO);
    let served = match name {
        AUTO => state.served(choose_lane(work)).or(state.target.as_ref()).or(state.draft.as_ref()),
        "fast" => state.draft.as_ref(),
        "deep" => state.target.as_ref(),
        _ => [&state.target, &state.draft].into_iter().flatten().find(|served| served.model.name == name),
    };
    served.ok_or_else(|| unknown_model(state, name))
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
    ApiError {
        param: Some("model".to_owned()),
        code: Some("model_not_found"),
        ..ApiError::new(
            ErrorKind::NotFound,
            format!("the model {name:?} is not served here; there are: {}", names.join(", ")),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::{Work, choose_lane};
    use tandem_engine::Lane;

    #[test]
    fn auto_sends_short_completions_to_the_draft_and_all_else_to_the_target() {
        assert_eq!(choose_lane(Work::Completion { max_tokens: 64 }), Lane::Fast);
        assert_eq!(choose_lane(Work::Completion { max_tokens: 65 }), Lane::Deep);
        assert_eq!(choose_lane(Work::Gap), Lane::Fast);
        assert_eq!(choose_lane(Work::Chat), Lane::Deep);
    }
}
