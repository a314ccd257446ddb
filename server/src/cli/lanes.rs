//! `tandem lanes`: shows the rules by which `auto` picks a lane, and which of them a request would match.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use tandem::http::lanes::{LanePolicy, LaneRule, Traits, Work, WorkKind, lane_name};

use super::settings::environment;
use crate::config;

pub(super) const LONG_ABOUT: &str = "\
Show the rules by which the model name `auto` picks a lane, and check them.

The rules are the [[lane-rule]] tables of the configuration file, or the built-in ones. With the traits of a \
request, say which rule that request would match.";

pub(super) const EXAMPLES: &str = "\
Examples:
  tandem lanes --config tandem.toml
  tandem lanes --endpoint /v1/completions --max-tokens 48
  tandem lanes --endpoint /v1/chat/completions --tools --reasoning-effort low";

#[derive(Args)]
pub(crate) struct LanesArgs {
    /// Path of the request to look at, such as /v1/chat/completions
    #[arg(long, value_name = "PATH")]
    endpoint: Option<String>,

    /// What it asks for: completion, gap or chat [default: what its path asks for]
    #[arg(long, value_name = "WORK", value_parser = work_kind, requires = "endpoint")]
    work: Option<WorkKind>,

    /// Its bound on the answer [default: 16 for completions, else none]
    #[arg(long, value_name = "N", requires = "endpoint")]
    max_tokens: Option<u64>,

    /// Bytes of its prompt's text
    #[arg(long, value_name = "N", default_value_t = 0, requires = "endpoint")]
    prompt_bytes: u64,

    /// It brings tools
    #[arg(long, requires = "endpoint")]
    tools: bool,

    /// Its reasoning effort
    #[arg(long, value_name = "EFFORT", requires = "endpoint")]
    reasoning_effort: Option<String>,

    /// Its header x-tandem-lane
    #[arg(long, value_name = "TEXT", requires = "endpoint")]
    header: Option<String>,

    /// The name of its key
    #[arg(long, value_name = "NAME", requires = "endpoint")]
    key: Option<String>,

    /// TOML file with the rules [env: TANDEM_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

fn work_kind(text: &str) -> Result<WorkKind, String> {
    let known = WorkKind::NAMES.iter().find(|(name, _)| *name == text);
    known.map(|(_, kind)| *kind).ok_or_else(|| "it must be completion, gap or chat".to_owned())
}

pub(super) fn run(args: &LanesArgs) -> anyhow::Result<ExitCode> {
    let loaded = config::load(&[], args.config.as_deref(), environment())?;
    let policy = loaded.config.lane_policy;
    let Some(endpoint) = &args.endpoint else {
        print!("{}", listed(&policy));
        return Ok(ExitCode::SUCCESS);
    };
    println!("{}", explained(&policy, &args.traits(endpoint)));
    Ok(ExitCode::SUCCESS)
}

impl LanesArgs {
    fn traits<'a>(&'a self, endpoint: &'a str) -> Traits<'a> {
        let kind = self.work.unwrap_or(match endpoint {
            "/infill" | "/v1/fim/completions" => WorkKind::Gap,
            "/v1/completions" | "/completion" | "/completions" => WorkKind::Completion,
            _ => WorkKind::Chat,
        });
        // A completion has a bound in any case.
        let default = if kind == WorkKind::Completion { 16 } else { u64::MAX };
        let max_tokens = self.max_tokens.unwrap_or(default);
        Traits {
            endpoint,
            work: match kind {
                WorkKind::Completion => Work::Completion { max_tokens },
                WorkKind::Gap => Work::Gap,
                WorkKind::Chat => Work::Chat,
            },
            prompt_bytes: self.prompt_bytes,
            max_tokens,
            tools: self.tools,
            reasoning_effort: self.reasoning_effort.as_deref(),
            header: self.header.as_deref(),
            key: self.key.as_deref(),
        }
    }
}

fn listed(policy: &LanePolicy) -> String {
    let mut text = String::new();
    for (i, rule) in policy.rules.iter().enumerate() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:>3}. {:<24} {} if {}", i + 1, rule.name, answer(rule), rule.when);
    }
    text.push_str("     otherwise                deep\n");
    if let Some(most) = policy.fast_context {
        let _ = writeln!(text, "     deep instead of fast if prompt and answer have more than {most} tokens");
    }
    text
}

fn answer(rule: &LaneRule) -> String {
    match rule.escalation {
        Some(escalation) => format!(
            "{} (deep if the margin of the first {} tokens is below {})",
            lane_name(rule.lane),
            escalation.tokens,
            escalation.margin
        ),
        None => lane_name(rule.lane).to_owned(),
    }
}

fn explained(policy: &LanePolicy, traits: &Traits<'_>) -> String {
    match policy.find(traits) {
        Some(rule) => format!("{}, by the rule {:?}: {}", answer(rule), rule.name, rule.when),
        None => "deep, because no rule matches".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_are_listed_and_explained() {
        let policy = LanePolicy::default();
        let text = listed(&policy);
        assert!(text.contains("short-completion") && text.contains("max-tokens in ..64"), "{text}");
        let traits = Traits {
            endpoint: "/v1/completions",
            work: Work::Completion { max_tokens: 48 },
            prompt_bytes: 0,
            max_tokens: 48,
            tools: false,
            reasoning_effort: None,
            header: None,
            key: None,
        };
        let text = explained(&policy, &traits);
        assert!(text.starts_with("fast, by the rule \"short-completion\""), "{text}");
    }
}
