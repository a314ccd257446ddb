//! OpenAI's protocol: models, completions, chat completions, embeddings; and Mistral's fill-in-the-middle, which
//! answers as they do.

mod chat;
mod completions;
mod embeddings;
mod fim;
mod logprobs;
mod models;
mod render;
mod types;
mod write;

use super::api::{Api, Operation};
use super::fields::{CommonFields, ModelField};
use super::wire::EVENT_STREAM;
use chat::ChatFields;
use completions::CompletionFields;
use embeddings::EmbeddingFields;
use fim::FimFields;

/// The protocol's paths.
pub(super) fn routes() -> Api {
    Api::new("OpenAI")
        .get("/v1/models", models::list, Operation::new("The names that can be asked for"))
        .get("/v1/models/{*id}", models::one, Operation::new("One of them"))
        .post("/v1/completions", completions::completions, {
            let operation = Operation::new("Continues a text, or fills a gap in it; with segments, Tabby's");
            operation.reads::<CommonFields, CompletionFields>().streams(EVENT_STREAM)
        })
        .post("/v1/completions/render", render::completions, {
            Operation::new("Token ids of prompts").reads::<CommonFields, CompletionFields>()
        })
        .post("/v1/chat/completions", chat::chat_completions, {
            Operation::new("Goes on with a conversation")
                .reads::<CommonFields, ChatFields>()
                .streams(EVENT_STREAM)
        })
        .post("/v1/chat/completions/render", render::chat_completions, {
            Operation::new("Token ids of a conversation").reads::<CommonFields, ChatFields>()
        })
        .post("/v1/embeddings", embeddings::embeddings, {
            Operation::new("Vectors of texts").reads::<ModelField, EmbeddingFields>()
        })
        .post("/v1/fim/completions", fim::fim_completions, {
            Operation::new("Fills a gap, as Mistral has it")
                .reads::<CommonFields, FimFields>()
                .streams(EVENT_STREAM)
        })
}
