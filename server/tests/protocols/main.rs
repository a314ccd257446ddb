//! Every client protocol over the real server and engine. A scripted model writes reasoning and tool
//! calls in its family's format; clients get them in their own.

#[path = "../support/mod.rs"]
mod support;

mod anthropic;
mod llamacpp;
mod ollama;
mod render;
mod responses;
mod socket;
mod tabby;
mod tools;

pub(crate) use support::scripted::{HERMES, HERMES_TOKENS as TOKENS};

/// Reasoning, text and two calls.
pub(crate) const CALL: &str = "<think>\nWhich city?\n</think>\n\nLet me look.\n<tool_call>\n\
    {\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\"}\n</tool_call>";
