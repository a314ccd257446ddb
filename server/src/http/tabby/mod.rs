//! Tabby's protocol, as its editor plug-ins speak it: completions of a gap, health, events and settings.
//!
//! Its completions have the path of OpenAI's, whose handler knows them by their `segments`.

mod completion;
mod info;

use super::api::{Api, Operation};
pub(super) use completion::{Segments, complete};
use info::EventFields;

/// The protocol's paths, but for the completions'.
pub(super) fn routes() -> Api {
    Api::new("Tabby")
        .get("/v1/health", info::health, Operation::new("What the server is"))
        .post("/v1/health", info::health, Operation::new("What the server is"))
        .post(
            "/v1/events",
            info::event,
            Operation::new("Told, and not kept").reads::<EventFields, EventFields>(),
        )
        .get("/v1beta/server_setting", info::server_setting, Operation::new("What plug-ins are to do"))
}
