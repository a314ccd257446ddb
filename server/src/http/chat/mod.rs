//! Conversations, for every protocol that has them: messages and tools in the form that chat
//! templates know in, events of reading the answer out.
//!
//! A protocol translates its own messages to a [`Conversation`] and writes a [`ChatWire`]; rendering,
//! forcing a tool call, reading the model's format and the reasons of an end are done here.

mod answers;
mod conversation;
mod format;
mod messages;
mod tools;

pub(super) use answers::{ChatAnswer, ChatStream, ChatWire, Finish, Reading};
pub(super) use conversation::{Conversation, ReadingPlan, ToolChoice, function_tool};
pub(super) use format::only_text;
pub(super) use messages::{invalid_part, text_of_agents_parts};
pub(super) use tools::{MAX_TOOL_NAME_BYTES, ToolFields, reasoning_variables};
