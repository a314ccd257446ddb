//! Text on one side, token ids on the other: tokenizer, incremental detokenizer, chat template,
//! fill-in-the-middle prompts. Nothing here touches weights or the engine.

mod bytecode;
mod chat_template;
mod detokenizer;
mod environment;
mod fim;
mod gguf_export;
mod gguf_pre;
mod gguf_tokenizer;
mod meter;
mod python;
mod strftime;
mod tokenizer;
mod tokenizer_check;

pub(crate) use chat_template::CHAT_TEMPLATE_FILES;
pub use chat_template::{ChatTemplate, TemplateError};
pub use detokenizer::Detokenizer;
pub use fim::{FimContext, FimFile, FimFrame, FimOrder, FimTokens};
pub(crate) use gguf_export::{add_json, add_tokenizer};
pub use tokenizer::Tokenizer;
pub(crate) use tokenizer::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};
