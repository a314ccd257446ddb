//! The server: HTTP in front of the engine. Text, templates and JSON live here; the engine sees
//! token ids only.

pub mod http;
pub mod keys;
pub mod kv_events;
pub mod text;
