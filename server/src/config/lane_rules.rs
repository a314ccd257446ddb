//! The rules for lanes as the configuration file has them: tables `[[lane-rule]]`, in their order.

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tandem::http::lanes::{
    Conditions, DEFAULT_WATCHED_TOKENS, Escalation, LaneRule, MAX_WATCHED_TOKENS, Span, WorkKind,
};
use tandem_engine::Lane;

use super::ConfigError;

/// What the tables are called.
pub(super) const KEY: &str = "lane-rule";

/// Longest name of a rule: it goes into a header.
const MAX_NAME_BYTES: usize = 64;

/// A rule as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    name: Option<String>,
    lane: Option<String>,
    #[serde(default)]
    endpoint: OneOrMany,
    #[serde(default)]
    work: OneOrMany,
    #[serde(default)]
    reasoning_effort: OneOrMany,
    #[serde(default)]
    header: OneOrMany,
    #[serde(default)]
    key: OneOrMany,
    prompt_bytes: Option<String>,
    max_tokens: Option<String>,
    tools: Option<bool>,
    escalate_below: Option<f64>,
    escalate_tokens: Option<i64>,
}

/// A string or a list of them.
#[derive(Default, Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings")]
enum OneOrMany {
    #[default]
    None,
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn list(self) -> Vec<String> {
        match self {
            OneOrMany::None => vec![],
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(texts) => texts,
        }
    }
}

/// # Errors
/// Names the file, the rule, and what is wrong with it.
pub(super) fn read(path: &Path, value: toml::Value) -> Result<Vec<LaneRule>, ConfigError> {
    let fault = |rule: String, reason: String| ConfigError::LaneRule { path: path.to_owned(), rule, reason };
    let toml::Value::Array(tables) = value else {
        let reason = format!("is no list of tables; write [[{KEY}]] before each");
        return Err(fault(format!("`{KEY}`"), reason));
    };
    let mut rules: Vec<LaneRule> = Vec::with_capacity(tables.len());
    for (i, table) in tables.into_iter().enumerate() {
        let name = table.get("name").and_then(toml::Value::as_str).map(|name| format!(" {name:?}"));
        let place = format!("{KEY} {}{}", i + 1, name.unwrap_or_default());
        let written: Written = dashed(table)
            .try_into()
            .map_err(|error: toml::de::Error| fault(place.clone(), error.message().to_owned()))?;
        let rule = rule(written).map_err(|reason| fault(place.clone(), reason))?;
        if rules.iter().any(|other| other.name == rule.name) {
            return Err(fault(place, "another rule has this name already".to_owned()));
        }
        rules.push(rule);
    }
    Ok(rules)
}

/// Both spellings of keys, here as outside.
fn dashed(value: toml::Value) -> toml::Value {
    match value {
        toml::Value::Table(table) => {
            toml::Value::Table(table.into_iter().map(|(key, value)| (key.replace('_', "-"), value)).collect())
        }
        other => other,
    }
}

fn rule(written: Written) -> Result<LaneRule, String> {
    let name = written.name.ok_or("it has no `name`, which headers and messages need")?;
    let is_seen = |c: char| c.is_ascii_graphic() || c == ' ';
    if name.trim() != name || name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(is_seen) {
        return Err(format!("`name` is {name:?}; it must be 1 to {MAX_NAME_BYTES} ASCII characters"));
    }
    let lane = match written.lane.as_deref() {
        Some("fast") => Lane::Fast,
        Some("deep") => Lane::Deep,
        Some(other) => return Err(format!("`lane` is {other:?}; it must be \"fast\" or \"deep\"")),
        None => return Err("it has no `lane`; it must be \"fast\" or \"deep\"".to_owned()),
    };
    let span = |key: &str, text: Option<String>| {
        text.map(|text| text.parse::<Span>()).transpose().map_err(|reason| format!("`{key}`: {reason}"))
    };
    let endpoints = written.endpoint.list();
    if let Some(wrong) = endpoints.iter().find(|path| !path.starts_with('/')) {
        return Err(format!("`endpoint` holds {wrong:?}; it must be a path such as \"/v1/completions\""));
    }
    let work = |name: String| {
        let known = WorkKind::NAMES.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind);
        known.ok_or_else(|| format!("`work` holds {name:?}; it must be \"completion\", \"gap\" or \"chat\""))
    };
    Ok(LaneRule {
        name: Arc::from(name),
        when: Conditions {
            endpoints,
            work: written.work.list().into_iter().map(work).collect::<Result<_, _>>()?,
            prompt_bytes: span("prompt-bytes", written.prompt_bytes)?,
            max_tokens: span("max-tokens", written.max_tokens)?,
            tools: written.tools,
            reasoning_effort: written.reasoning_effort.list(),
            header: written.header.list(),
            keys: written.key.list(),
        },
        lane,
        escalation: escalation(lane, written.escalate_below, written.escalate_tokens)?,
    })
}

fn escalation(lane: Lane, below: Option<f64>, tokens: Option<i64>) -> Result<Option<Escalation>, String> {
    let Some(margin) = below else {
        return match tokens {
            Some(_) => Err("`escalate-tokens` needs `escalate-below`".to_owned()),
            None => Ok(None),
        };
    };
    if lane == Lane::Deep {
        return Err("`escalate-below` is for rules with lane \"fast\"".to_owned());
    }
    if !(margin > 0.0 && margin <= 100.0) {
        return Err(format!("`escalate-below` is {margin}; it must be above 0 and at most 100"));
    }
    let tokens = tokens.unwrap_or(DEFAULT_WATCHED_TOKENS.into());
    match u32::try_from(tokens).ok().filter(|tokens| (1..=MAX_WATCHED_TOKENS).contains(tokens)) {
        Some(tokens) => Ok(Some(Escalation { margin: margin as f32, tokens })),
        None => Err(format!("`escalate-tokens` is {tokens}; it must be 1 to {MAX_WATCHED_TOKENS}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<LaneRule>, String> {
        let mut table: toml::Table = text.parse().expect("TOML");
        let rules = table.remove(KEY).expect("rules");
        read(Path::new("t.toml"), rules).map_err(|error| error.to_string())
    }

    #[test]
    fn a_rule_may_have_every_condition() {
        let rules = read_text(
            "[[lane-rule]]\nname = \"short\"\nlane = \"fast\"\nendpoint = [\"/v1/completions\", \"/infill*\"]\n\
             work = \"gap\"\nprompt_bytes = \"..8000\"\nmax-tokens = \"..64\"\ntools = false\n\
             reasoning-effort = [\"low\", \"none\"]\nheader = \"fast\"\nkey = \"editors\"\n\
             escalate-below = 0.5\nescalate-tokens = 8\n\
             [[lane-rule]]\nname = \"rest\"\nlane = \"deep\"\n",
        )
        .expect("rules");
        assert_eq!(rules.len(), 2);
        assert_eq!(rules[0].escalation, Some(Escalation { margin: 0.5, tokens: 8 }));
        assert_eq!(
            rules[0].when.to_string(),
            "endpoint is /v1/completions or /infill*, work is gap, header is fast, key is editors, \
             reasoning-effort is low or none, prompt-bytes in ..8000, max-tokens in ..64, tools absent"
        );
        assert_eq!((rules[1].lane, rules[1].when.to_string().as_str()), (Lane::Deep, "always"));
    }

    #[test]
    fn what_is_wrong_is_said_with_the_rules_name() {
        let two = "[[lane-rule]]\nname = \"a\"\nlane = \"deep\"\n";
        let twice = format!("{two}{two}");
        for (text, wanted) in [
            ("lane-rule = 1", "write [[lane-rule]]"),
            ("[[lane-rule]]\nlane = \"fast\"", "lane-rule 1: it has no `name`"),
            ("[[lane-rule]]\nname = \"x\"", "lane-rule 1 \"x\": it has no `lane`"),
            ("[[lane-rule]]\nname = \"x\"\nlane = \"slow\"", "`lane` is \"slow\""),
            ("[[lane-rule]]\nname = \"x\"\nlane = \"fast\"\nlines = 3", "unknown field `lines`"),
            (
                "[[lane-rule]]\nname = \"x\"\nlane = \"fast\"\nmax-tokens = \"64\"",
                "`max-tokens`: \"64\" is no span",
            ),
            ("[[lane-rule]]\nname = \"x\"\nlane = \"fast\"\ntools = \"no\"", "\"x\": invalid type"),
            ("[[lane-rule]]\nname = \"x\"\nlane = \"fast\"\nwork = [\"talk\"]", "`work` holds \"talk\""),
            (
                "[[lane-rule]]\nname = \"x\"\nlane = \"fast\"\nendpoint = \"chat\"",
                "`endpoint` holds \"chat\"",
            ),
            (
                "[[lane-rule]]\nname = \"x\"\nlane = \"deep\"\nescalate-below = 1.0",
                "for rules with lane \"fast\"",
            ),
            ("[[lane-rule]]\nname = \"x\"\nlane = \"fast\"\nescalate-below = -1.0", "above 0"),
            ("[[lane-rule]]\nname = \"x\"\nlane = \"fast\"\nescalate-tokens = 1", "needs `escalate-below`"),
            (twice.as_str(), "lane-rule 2 \"a\": another rule"),
        ] {
            let error = read_text(text).expect_err(text);
            assert!(error.contains(wanted) && error.starts_with("t.toml: "), "{text}\n{error}");
        }
    }
}
