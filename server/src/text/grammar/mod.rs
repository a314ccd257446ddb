//! Structured output: what an answer must be, as a grammar over the model's own tokens.
//!
//! Everything a client can ask for, a JSON schema, a regular expression, a few choices, a grammar, the
//! arguments of a tool, is written as one text in llguidance's dialect of Lark ([`Format`], `calls`). The text
//! is compiled away from the engine's thread and kept ([`Grammars`]); each sequence then follows it with a
//! state of its own ([`Grammar::start`]), which is the engine's [`tandem_engine::Constraint`].
//!
//! Everything here is a client's: texts are bounded in bytes and nesting, compiling by llguidance's own fuel
//! and by a stack of its own, a mask by fuel and lexer states, the cache by the bytes that it keeps.

mod alternatives;
mod cache;
mod calls;
mod compile;
mod follow;
mod format;
mod gbnf;
mod tags;
mod vocabulary;
mod xml_calls;

pub use calls::{CallFormat, Calling, ToolShape};
pub use compile::{Grammar, GrammarError, Grammars};
pub use format::{Format, Lead, Token, answer_text, grammar_text};
pub use tags::{Piece, Tag, Tags};
