//! `tandem keys`: makes, lists and revokes API keys in a file that a running server has open too.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use tandem::keys::{Budget, KeyEntry, KeyFile, KeyRules, Lanes, duration_from_text};
use tandem_engine::Priority;

use super::terminal;
use crate::config;

pub(super) const LONG_ABOUT: &str = "\
Make, list and revoke the API keys of a file.

The file is an SQLite database with hashes of keys, never the keys. A server that was started with --keys FILE \
takes changes into use within a second, without a restart, and writes down in it what was used of each key.";

pub(super) const EXAMPLES: &str = "\
Examples:
  tandem keys add editors --keys keys.db
  tandem keys add ci --lanes fast --requests 60/min --tokens 2M/day --priority batch --expires 90days
  tandem keys list
  tandem keys revoke ci
  tandem serve --keys keys.db --host 0.0.0.0";

#[derive(Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key; it is shown once
    Add(AddArgs),
    /// List the keys, what they may do and what was used of them
    List(ListArgs),
    /// Revoke a key; a running server refuses it from then on
    Revoke(RevokeArgs),
}

/// Where the file is.
#[derive(Args)]
struct FileArgs {
    /// The file of keys [env: TANDEM_KEYS, or `keys` in the configuration file]
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,

    /// TOML file that may name the file of keys [env: TANDEM_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct AddArgs {
    /// What to call the key: a person, a team or a program
    name: String,

    /// Lanes that it opens: fast, deep or fast,deep [default: both]
    #[arg(long, value_name = "LANES")]
    lanes: Option<Lanes>,

    /// Requests that it may make in each window of time, such as 60/min or 5000/day [default: no limit]
    #[arg(long, value_name = "N/TIME")]
    requests: Option<Budget>,

    /// Tokens of prompts and answers that it may use in each window of time, such as 2M/day [default: no limit]
    #[arg(long, value_name = "N/TIME")]
    tokens: Option<Budget>,

    /// The highest priority of its requests: interactive or batch [default: interactive]
    #[arg(long, value_name = "PRIORITY", value_parser = priority)]
    priority: Option<Priority>,

    /// How long it is valid, such as 90days [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = duration_from_text)]
    expires: Option<u64>,

    #[command(flatten)]
    file: FileArgs,
}

#[derive(Args)]
pub(crate) struct ListArgs {
    /// Show revoked and expired keys too
    #[arg(long)]
    all: bool,

    #[command(flatten)]
    file: FileArgs,
}

#[derive(Args)]
pub(crate) struct RevokeArgs {
    /// The key's name
    name: String,

    #[command(flatten)]
    file: FileArgs,
}

fn priority(text: &str) -> Result<Priority, String> {
    match text {
        "interactive" => Ok(Priority::Interactive),
        "batch" => Ok(Priority::Batch),
        _ => Err("it must be interactive or batch".to_owned()),
    }
}

pub(super) fn run(command: &KeysCommand) -> anyhow::Result<ExitCode> {
    let mut stdout = std::io::stdout().lock();
    match command {
        KeysCommand::Add(args) => {
            let now = terminal::unix_seconds();
            let rules = KeyRules {
                lanes: args.lanes.unwrap_or(Lanes::ALL),
                requests: args.requests,
                tokens: args.tokens,
                priority: args.priority.unwrap_or_default(),
                expires_at: args.expires.map(|seconds| now.saturating_add(seconds)),
            };
            let new = args.file.open(true)?.add(&args.name, &rules, now)?;
            // The key alone on standard output, so that a script can take it.
            writeln!(stdout, "{}", new.key)?;
            eprintln!("This is the key {:?}. It is not kept and cannot be shown again.", new.name);
        }
        KeysCommand::List(args) => {
            let now = terminal::unix_seconds();
            let mut entries = args.file.open(false)?.entries()?;
            entries.retain(|entry| args.all || state(entry, now) == "valid");
            writeln!(stdout, "{}", table(&entries, now))?;
        }
        KeysCommand::Revoke(args) => {
            args.file.open(false)?.revoke(&args.name, terminal::unix_seconds())?;
            eprintln!("The key {:?} is revoked.", args.name);
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl FileArgs {
    fn open(&self, make: bool) -> anyhow::Result<KeyFile> {
        let path = match &self.keys {
            Some(path) => path.clone(),
            None => {
                let env = super::settings::environment();
                match config::load(&[], self.config.as_deref(), env)?.config.keys {
                    Some(path) => path,
                    None => bail!(
                        "no file of keys is named: use --keys FILE, TANDEM_KEYS, or `keys` in the configuration file"
                    ),
                }
            }
        };
        KeyFile::open(&path, make).context("the keys cannot be used")
    }
}

fn state(entry: &KeyEntry, now: u64) -> &'static str {
    if entry.revoked_at.is_some() {
        "revoked"
    } else if entry.rules.expires_at.is_some_and(|end| end <= now) {
        "expired"
    } else {
        "valid"
    }
}

fn table(entries: &[KeyEntry], now: u64) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "name",
        "key",
        "state",
        "lanes",
        "priority",
        "requests",
        "tokens",
        "expires",
        "last used",
        "total",
    ]);
    for entry in entries {
        let rules = &entry.rules;
        let used = |budget: Option<Budget>, window: u64, used: u64| match budget {
            Some(budget) => {
                let used = if budget.window_at(now).0 == window { used } else { 0 };
                format!("{used} of {budget}")
            }
            None => "no limit".to_owned(),
        };
        let day = |seconds: u64| if seconds == 0 { "never".to_owned() } else { terminal::date(seconds) };
        table.add_row([
            entry.name.clone(),
            format!("{}...", entry.hint),
            state(entry, now).to_owned(),
            rules.lanes.to_string(),
            match rules.priority {
                Priority::Interactive => "interactive".to_owned(),
                Priority::Batch => "batch".to_owned(),
            },
            used(rules.requests, entry.used.requests_window, entry.used.requests),
            used(rules.tokens, entry.used.tokens_window, entry.used.tokens),
            rules.expires_at.map_or_else(|| "never".to_owned(), terminal::date),
            day(entry.used.last_used_at),
            format!(
                "{} requests, {} tokens",
                entry.used.total_requests,
                terminal::count(entry.used.total_tokens)
            ),
        ]);
    }
    table
}
