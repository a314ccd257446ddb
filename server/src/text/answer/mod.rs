//! The answer of a chat, read as what it means: reasoning, text, tool calls.
//!
//! One short file a format, each a state machine over text that arrives in pieces. What a client gets
//! never depends on where the pieces end, and output that breaks off, or that only looks like a call,
//! is given as what is there. `dialect` finds out which format a model was trained on.
//!
//! Costs: a few comparisons a byte of text; without reasoning, tools or channels none.

mod deepseek;
mod dialect;
mod events;
mod format;
mod harmony;
mod input;
mod json;
mod llama;
mod pythonic;
mod reader;
mod tagged;
mod tools;
mod xml;

#[cfg(test)]
mod tests;

pub use dialect::{DeepSeekCalls, Dialect, MistralCalls, ToolFormat};
pub use events::{AnswerEvent, AnswerMessage, ToolCall};
pub use reader::AnswerReader;
pub use tools::ToolSet;
