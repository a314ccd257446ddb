//! OpenAI's Responses: items in, items out, and earlier responses to go on from. Over HTTP, and over
//! WebSocket on the same path.

mod compact;
mod handlers;
mod record;
mod request;
mod socket;
mod store;
mod turn;
mod wire;

use super::api::{Api, Operation};
use super::fields::CommonFields;
use super::wire::EVENT_STREAM;
use request::ResponseFields;
pub(super) use store::ResponseStore;

/// The protocol's paths.
pub(super) fn routes() -> Api {
    Api::new("OpenAI")
        .post("/v1/responses", handlers::create, {
            Operation::new("Answers a turn").reads::<CommonFields, ResponseFields>().streams(EVENT_STREAM)
        })
        .get("/v1/responses", socket::connect, Operation::new("Opens a WebSocket, with a turn a message"))
        .post("/v1/responses/compact", compact::compact, {
            Operation::new("Says a conversation shorter").reads::<CommonFields, ResponseFields>()
        })
        .get("/v1/responses/{id}", handlers::retrieve, Operation::new("A response that was stored"))
        .delete("/v1/responses/{id}", handlers::delete, Operation::new("Forgets it"))
        .post("/v1/responses/{id}/cancel", handlers::cancel, Operation::new("Refused: it has ended"))
        .get(
            "/v1/responses/{id}/input_items",
            handlers::input_items,
            Operation::new("What was said in its turn"),
        )
}
