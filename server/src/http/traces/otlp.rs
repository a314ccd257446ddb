//! Spans as OTLP's JSON: the proto3 mapping of `ExportTraceServiceRequest`, in which identifiers are
//! hexadecimal and 64-bit integers text (<https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding>).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{ModelWork, Span};
use crate::http::generation::EndReason;

/// `SPAN_KIND_SERVER`
const SERVER: u32 = 2;

/// `STATUS_CODE_ERROR`
const ERROR: u32 = 2;

/// The request that hands over these spans.
pub(super) fn request(service: &str, spans: &[Span]) -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let resource = [text("service.name", service), text("service.version", version)];
    let spans: Vec<Value> = spans.iter().map(span).collect();
    let request = json!({ "resourceSpans": [{
        "resource": { "attributes": resource },
        "scopeSpans": [{ "scope": { "name": "tandem", "version": version }, "spans": spans }],
    }] });
    request.to_string().into_bytes()
}

fn span(span: &Span) -> Value {
    let operation = operation(&span.route);
    let name = match (&span.work, operation) {
        (Some(work), Some(operation)) => format!("{operation} {}", work.request_model),
        _ => format!("{} {}", span.method, span.route),
    };
    let mut attributes = vec![
        text("http.request.method", span.method.as_str()),
        text("http.route", &span.route),
        integer("http.response.status_code", span.status.into()),
    ];
    attributes.extend(operation.map(|operation| text("gen_ai.operation.name", operation)));
    attributes.extend(span.error.map(|error| text("error.type", error)));
    if let Some(work) = &span.work {
        describe(work, &mut attributes);
    }
    let mut value = json!({
        "traceId": format!("{:032x}", span.context.trace_id),
        "spanId": format!("{:016x}", span.context.span_id),
        "name": name, "kind": SERVER,
        "startTimeUnixNano": nanoseconds(span.start), "endTimeUnixNano": nanoseconds(span.end),
        "attributes": attributes,
        // A client's fault is none of the server's.
        "status": if span.status >= 500 { json!({ "code": ERROR }) } else { json!({}) },
    });
    if let Some(parent) = span.context.parent_span_id {
        value["parentSpanId"] = json!(format!("{parent:016x}"));
    }
    if let Some(state) = &span.context.state {
        value["traceState"] = json!(state);
    }
    value
}

/// What a route does, in the conventions' words.
fn operation(route: &str) -> Option<&'static str> {
    Some(match route {
        "/v1/chat/completions" | "/v1/messages" | "/v1/responses" | "/api/chat" => "chat",
        "/v1/completions"
        | "/v1/fim/completions"
        | "/completion"
        | "/completions"
        | "/infill"
        | "/api/generate" => "text_completion",
        "/v1/embeddings" | "/embedding" | "/embeddings" | "/api/embed" | "/api/embeddings" => "embeddings",
        _ => return None,
    })
}

fn describe(work: &ModelWork, attributes: &mut Vec<Value>) {
    let account = &work.account;
    let reasons = work.finish_reasons.iter().map(|reason| match reason {
        EndReason::Stop | EndReason::StopString | EndReason::GapFilled => "stop",
        EndReason::Length => "length",
    });
    let reasons: Vec<Value> = reasons.map(|reason| json!({ "stringValue": reason })).collect();
    attributes.extend([
        text("gen_ai.provider.name", "tandem"),
        text("gen_ai.request.model", &work.request_model),
        text("gen_ai.response.model", &work.model),
        text("tandem.lane", work.lane),
        text("tandem.lane_reason", &work.lane_reason),
        integer("gen_ai.usage.input_tokens", account.num_prompt_tokens),
        integer("gen_ai.usage.cache_read.input_tokens", account.num_cached_tokens),
        seconds("gen_ai.latency.time_in_queue", account.queue_time),
    ]);
    // An embedding has no answer.
    if work.num_choices == 0 {
        return;
    }
    attributes.extend([
        integer("gen_ai.request.max_tokens", work.max_tokens.into()),
        integer("gen_ai.request.choice.count", work.num_choices as u64),
        number("gen_ai.request.temperature", work.temperature.into()),
        number("gen_ai.request.top_p", work.top_p.into()),
        integer("gen_ai.usage.output_tokens", account.num_output_tokens),
        seconds("gen_ai.latency.time_to_first_token", account.queue_time + account.prefill_time),
        seconds("gen_ai.latency.time_in_model_decode", account.decode_time),
        json!({ "key": "gen_ai.response.finish_reasons", "value": { "arrayValue": { "values": reasons } } }),
        integer("tandem.draft_tokens", account.num_draft_tokens),
        integer("tandem.draft_tokens_accepted", account.num_accepted_tokens),
    ]);
}

fn text(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

fn integer(key: &str, value: u64) -> Value {
    json!({ "key": key, "value": { "intValue": value.to_string() } })
}

fn number(key: &str, value: f64) -> Value {
    json!({ "key": key, "value": { "doubleValue": value } })
}

fn seconds(key: &str, value: Duration) -> Value {
    number(key, value.as_secs_f64())
}

fn nanoseconds(time: SystemTime) -> String {
    time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos()).to_string()
}
