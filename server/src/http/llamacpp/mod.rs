//! llama.cpp's own protocol: completion, infill, and what its clients ask about the server.

mod completion;
mod embedding;
mod fields;
mod info;
mod tokens;
mod wire;

use super::api::{Api, Operation};
use super::fields::{CommonFields, ModelField};
use super::wire::EVENT_STREAM;
use embedding::EmbeddingContent;
use fields::LlamaFields;
use tokens::{DetokenizeFields, TemplateFields, TokenizeFields};

/// The protocol's paths.
pub(super) fn routes() -> Api {
    Api::new("llama.cpp")
        .post("/completion", completion::completion, completions())
        .post("/completions", completion::completion, completions())
        .post("/infill", completion::infill, {
            let operation = Operation::new("Fills a gap, with other files around it");
            operation.reads::<CommonFields, LlamaFields>().streams(EVENT_STREAM)
        })
        .post("/tokenize", tokens::tokenize, {
            Operation::new("A text's tokens").reads::<ModelField, TokenizeFields>()
        })
        .post("/detokenize", tokens::detokenize, {
            Operation::new("The text of tokens").reads::<ModelField, DetokenizeFields>()
        })
        .post("/apply-template", tokens::apply_template, {
            Operation::new("The prompt that a conversation becomes").reads::<CommonFields, TemplateFields>()
        })
        .post("/embedding", embedding::embedding, embeddings())
        .post("/embeddings", embedding::embedding, embeddings())
        .get("/props", info::props, Operation::new("What the server is"))
        .get("/slots", info::slots, Operation::new("How much of it is at work"))
}

fn embeddings() -> Operation {
    Operation::new("Vectors of texts").reads::<ModelField, EmbeddingContent>()
}

fn completions() -> Operation {
    Operation::new("Continues a prompt").reads::<CommonFields, LlamaFields>().streams(EVENT_STREAM)
}
