//! The rules by which `auto` picks a lane. A team writes its own; the first that matches counts.
//!
//! A rule holds conditions, all of which must be met, and a lane. A request that no rule matches goes to
//! `deep`: whoever asks for nothing gets the better answer.

use std::fmt;
use std::sync::Arc;

use tandem_engine::Lane;

use super::Work;

/// What the rules look at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traits<'a> {
    /// The request's path.
    pub endpoint: &'a str,
    /// What it asks for.
    pub work: Work,
    /// Bytes of the text that the prompt is made of.
    pub prompt_bytes: u64,
    /// The client's bound on the answer, or the endpoint's; `u64::MAX`: none.
    pub max_tokens: u64,
    /// It brings tools.
    pub tools: bool,
    /// `reasoning_effort`, or `effort` in `reasoning`.
    pub reasoning_effort: Option<&'a str>,
    /// What the client wrote into the header `x-tandem-lane`.
    pub header: Option<&'a str>,
    /// The name of its key.
    pub key: Option<&'a str>,
}

/// Bounds of a number, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The least that is in it.
    pub least: u64,
    /// The most that is in it.
    pub most: u64,
}

impl Span {
    fn holds(self, value: u64) -> bool {
        (self.least..=self.most).contains(&value)
    }
}

impl std::str::FromStr for Span {
    type Err = String;

    /// `..64`, `65..`, `10..20`.
    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is no span; it must be like \"..64\", \"65..\" or \"10..20\"");
        let (least, most) = text.split_once("..").ok_or_else(fault)?;
        let bound = |text: &str, open: u64| match text.trim() {
            "" => Ok(open),
            digits => digits.parse::<u64>().map_err(|_| fault()),
        };
        let span = Span { least: bound(least, 0)?, most: bound(most, u64::MAX)? };
        if span.least > span.most || text.trim() == ".." { Err(fault()) } else { Ok(span) }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.least, self.most) {
            (0, most) => write!(f, "..{most}"),
            (least, u64::MAX) => write!(f, "{least}.."),
            (least, most) => write!(f, "{least}..{most}"),
        }
    }
}

/// What a rule asks of a request; what is empty or `None` asks nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conditions {
    /// One of these paths; one that ends in `*` stands for all that begin so.
    pub endpoints: Vec<String>,
    /// One of these kinds of work.
    pub work: Vec<WorkKind>,
    /// How much text the prompt has.
    pub prompt_bytes: Option<Span>,
    /// How long the answer may be.
    pub max_tokens: Option<Span>,
    /// Whether there are tools.
    pub tools: Option<bool>,
    /// One of these efforts.
    pub reasoning_effort: Vec<String>,
    /// One of these in the header.
    pub header: Vec<String>,
    /// One of these keys.
    pub keys: Vec<String>,
}

/// [`Work`] without its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkKind {
    /// Text is continued.
    Completion,
    /// A gap in a file is filled.
    Gap,
    /// A conversation goes on.
    Chat,
}

impl WorkKind {
    /// All of them, by the names that rules use.
    pub const NAMES: [(&'static str, WorkKind); 3] =
        [("completion", WorkKind::Completion), ("gap", WorkKind::Gap), ("chat", WorkKind::Chat)];

    /// The kind of this work.
    pub fn of(work: Work) -> WorkKind {
        match work {
            Work::Completion { .. } => WorkKind::Completion,
            Work::Gap => WorkKind::Gap,
            Work::Chat => WorkKind::Chat,
        }
    }
}

impl Conditions {
    fn hold(&self, traits: &Traits<'_>) -> bool {
        fn listed(list: &[String], value: Option<&str>) -> bool {
            list.is_empty()
                || value.is_some_and(|value| list.iter().any(|one| one.eq_ignore_ascii_case(value)))
        }
        let is_endpoint = |pattern: &String| match pattern.strip_suffix('*') {
            Some(start) => traits.endpoint.starts_with(start),
            None => traits.endpoint == pattern,
        };
        (self.endpoints.is_empty() || self.endpoints.iter().any(is_endpoint))
            && (self.work.is_empty() || self.work.contains(&WorkKind::of(traits.work)))
            && self.prompt_bytes.is_none_or(|span| span.holds(traits.prompt_bytes))
            && self.max_tokens.is_none_or(|span| span.holds(traits.max_tokens))
            && self.tools.is_none_or(|tools| tools == traits.tools)
            && listed(&self.reasoning_effort, traits.reasoning_effort)
            && listed(&self.header, traits.header)
            && listed(&self.keys, traits.key)
    }
}

impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = Vec::new();
        let mut list = |name: &str, values: Vec<&str>| {
            if !values.is_empty() {
                parts.push(format!("{name} is {}", values.join(" or ")));
            }
        };
        let kinds =
            |kind: &WorkKind| WorkKind::NAMES.iter().find(|(_, known)| known == kind).map(|(name, _)| *name);
        list("endpoint", self.endpoints.iter().map(String::as_str).collect());
        list("work", self.work.iter().filter_map(kinds).collect());
        list("header", self.header.iter().map(String::as_str).collect());
        list("key", self.keys.iter().map(String::as_str).collect());
        list("reasoning-effort", self.reasoning_effort.iter().map(String::as_str).collect());
        parts.extend(self.prompt_bytes.map(|span| format!("prompt-bytes in {span}")));
        parts.extend(self.max_tokens.map(|span| format!("max-tokens in {span}")));
        parts.extend(self.tools.map(|tools| format!("tools {}", if tools { "given" } else { "absent" })));
        f.write_str(&if parts.is_empty() { "always".to_owned() } else { parts.join(", ") })
    }
}

/// When a request that a rule sent to `fast` is answered by `deep` after all: the draft's first tokens are
/// looked at before anything is sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Escalation {
    /// The mean margin of the first tokens below which the draft is unsure. A margin is the logarithm of how
    /// many times likelier the best token was than the next.
    pub margin: f32,
    /// How many tokens are looked at.
    pub tokens: u32,
}

/// Tokens that are looked at where a rule does not say.
pub const DEFAULT_WATCHED_TOKENS: u32 = 4;

/// The most tokens that can be looked at: the client waits for them.
pub const MAX_WATCHED_TOKENS: u32 = 64;

/// One rule.
#[derive(Clone, Debug, PartialEq)]
pub struct LaneRule {
    /// For headers and messages: ASCII that is seen.
    pub name: Arc<str>,
    /// What it asks for.
    pub when: Conditions,
    /// Who answers then.
    pub lane: Lane,
    /// Only with `fast`.
    pub escalation: Option<Escalation>,
}

/// The rules, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct LanePolicy {
    /// The first that matches counts.
    pub rules: Vec<LaneRule>,
    /// Tokens of prompt and answer together beyond which `deep` answers for `fast`; `None`: the context.
    pub fast_context: Option<usize>,
}

impl LanePolicy {
    /// True if a request may be answered by `deep` although a rule sent it to `fast`.
    pub fn escalates(&self) -> bool {
        self.fast_context.is_some() || self.rules.iter().any(|rule| rule.escalation.is_some())
    }

    /// The first rule that matches.
    pub fn find(&self, traits: &Traits<'_>) -> Option<&LaneRule> {
        self.rules.iter().find(|rule| rule.when.hold(traits))
    }
}

/// Completions up to this many tokens are interactive: the length of ghost text.
const INTERACTIVE_TOKENS: u64 = 64;

impl Default for LanePolicy {
    /// The client's word first; then what somebody waits for while typing goes to `fast`.
    fn default() -> Self {
        let rule = |name: &str, when: Conditions, lane: Lane| LaneRule {
            name: name.into(),
            when,
            lane,
            escalation: None,
        };
        let header = |lane: &str| Conditions { header: vec![lane.to_owned()], ..Conditions::default() };
        let rules = vec![
            rule("header-fast", header("fast"), Lane::Fast),
            rule("header-deep", header("deep"), Lane::Deep),
            rule("gap", Conditions { work: vec![WorkKind::Gap], ..Conditions::default() }, Lane::Fast),
            rule(
                "short-completion",
                Conditions {
                    work: vec![WorkKind::Completion],
                    max_tokens: Some(Span { least: 0, most: INTERACTIVE_TOKENS }),
                    ..Conditions::default()
                },
                Lane::Fast,
            ),
            rule("all-else", Conditions::default(), Lane::Deep),
        ];
        LanePolicy { rules, fast_context: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Traits<'_> = Traits {
        endpoint: "/v1/completions",
        work: Work::Completion { max_tokens: 16 },
        prompt_bytes: 100,
        max_tokens: 16,
        tools: false,
        reasoning_effort: None,
        header: None,
        key: None,
    };

    fn chosen(policy: &LanePolicy, traits: Traits<'_>) -> (String, Lane) {
        let rule = policy.find(&traits).expect("a rule");
        (rule.name.to_string(), rule.lane)
    }

    #[test]
    fn by_default_short_completions_and_gaps_go_to_the_draft_and_all_else_to_the_target() {
        let policy = LanePolicy::default();
        let named = |traits| chosen(&policy, traits);
        assert_eq!(named(PLAIN), ("short-completion".to_owned(), Lane::Fast));
        assert_eq!(named(Traits { max_tokens: 65, ..PLAIN }).1, Lane::Deep);
        assert_eq!(named(Traits { work: Work::Gap, max_tokens: u64::MAX, ..PLAIN }).0, "gap");
        assert_eq!(named(Traits { work: Work::Chat, ..PLAIN }), ("all-else".to_owned(), Lane::Deep));
        assert_eq!(named(Traits { header: Some("Deep"), ..PLAIN }).0, "header-deep");
        assert_eq!(named(Traits { header: Some("?"), ..PLAIN }).0, "short-completion");
    }

    #[test]
    fn every_condition_must_hold() {
        let when = Conditions {
            endpoints: vec!["/v1/*".to_owned()],
            prompt_bytes: Some("50..200".parse().expect("a span")),
            tools: Some(false),
            reasoning_effort: vec!["low".to_owned(), "minimal".to_owned()],
            keys: vec!["team".to_owned()],
            ..Conditions::default()
        };
        let good = Traits { reasoning_effort: Some("low"), key: Some("team"), ..PLAIN };
        assert!(when.hold(&good));
        for wrong in [
            Traits { endpoint: "/infill", ..good },
            Traits { prompt_bytes: 201, ..good },
            Traits { tools: true, ..good },
            Traits { reasoning_effort: None, ..good },
            Traits { key: Some("other"), ..good },
        ] {
            assert!(!when.hold(&wrong), "{wrong:?}");
        }
    }

    #[test]
    fn spans_read_as_they_are_shown() {
        for text in ["..64", "65..", "10..20"] {
            assert_eq!(text.parse::<Span>().expect("a span").to_string(), text);
        }
        for wrong in ["", "..", "64", "20..10", "a..b", "-1..3"] {
            assert!(wrong.parse::<Span>().is_err(), "{wrong}");
        }
    }
}
