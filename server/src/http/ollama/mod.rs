//! Ollama's protocol: generate, chat, embeddings, and what its clients ask about models. Streams are lines of JSON.

mod chat;
mod embed;
mod fields;
mod generate;
mod models;
mod wire;

use serde_json::{Value, json};

use super::api::{Api, Operation};
use super::error::ApiError;
use super::fields::ModelField;
use chat::OllamaChatFields;
use embed::{EmbedFields, EmbedPrompt};
use fields::OllamaCommon;
use generate::GenerateFields;
use models::{NameFields, NoFields};

/// The protocol's paths.
pub(super) fn routes() -> Api {
    Api::new("Ollama")
        .get("/api/version", models::version, Operation::new("The version of the protocol"))
        .get("/api/tags", models::tags, Operation::new("The names that can be asked for"))
        .get("/api/ps", models::running, Operation::new("The same: all of them are loaded"))
        .post("/api/show", models::show, Operation::new("What a model can").reads::<NameFields, NoFields>())
        .post("/api/generate", generate::generate, {
            let operation = Operation::new("Answers a question, continues a text or fills a gap");
            operation.reads::<OllamaCommon, GenerateFields>().streams(wire::LINES)
        })
        .post("/api/chat", chat::chat, {
            Operation::new("Goes on with a conversation")
                .reads::<OllamaCommon, OllamaChatFields>()
                .streams(wire::LINES)
        })
        .post("/api/embed", embed::embed, {
            Operation::new("Vectors of texts").reads::<ModelField, EmbedFields>()
        })
        .post("/api/embeddings", embed::embed_one, {
            Operation::new("The vector of a text").reads::<ModelField, EmbedPrompt>()
        })
}

/// `{"error": message}`
pub(super) fn error_json(error: &ApiError) -> Value {
    json!({ "error": error.message })
}
