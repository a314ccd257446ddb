//! W3C Trace Context: `traceparent` and `tracestate` (<https://www.w3.org/TR/trace-context/>).

use http::HeaderMap;

/// Longest `tracestate` that is passed on: what the recommendation asks for.
const MAX_STATE_BYTES: usize = 512;

/// Where a span belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TraceContext {
    pub(super) trace_id: u128,
    pub(super) span_id: u64,
    /// The span that asked for this one.
    pub(super) parent_span_id: Option<u64>,
    /// Other tracing systems' own.
    pub(super) state: Option<String>,
}

impl TraceContext {
    /// That of a request with these headers; `None` if its trace is not recorded. Without a valid
    /// `traceparent` a trace begins here.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        // Neither number may be 0.
        let span_id = rand::random::<u64>().max(1);
        let Some(parent) = text("traceparent").and_then(Parent::read) else {
            let trace_id = rand::random::<u128>().max(1);
            return Some(TraceContext { trace_id, span_id, parent_span_id: None, state: None });
        };
        let state = text("tracestate").filter(|state| state.len() <= MAX_STATE_BYTES).map(str::to_owned);
        parent.is_recorded.then_some(TraceContext {
            trace_id: parent.trace_id,
            span_id,
            parent_span_id: Some(parent.span_id),
            state,
        })
    }
}

struct Parent {
    trace_id: u128,
    span_id: u64,
    is_recorded: bool,
}

impl Parent {
    fn read(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let mut part = |length: usize| {
            let part = parts.next()?;
            let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            (part.len() == length && part.bytes().all(is_hex)).then_some(part)
        };
        let (version, trace_id, span_id, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        // Later versions may have more parts; the first has not.
        if version == "ff" || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let trace_id = u128::from_str_radix(trace_id, 16).ok().filter(|id| *id != 0)?;
        let span_id = u64::from_str_radix(span_id, 16).ok().filter(|id| *id != 0)?;
        let flags = u8::from_str_radix(flags, 16).ok()?;
        Some(Parent { trace_id, span_id, is_recorded: flags & 1 == 1 })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn context(traceparent: &'static str) -> Option<TraceContext> {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", HeaderValue::from_static(traceparent));
        headers.insert("tracestate", HeaderValue::from_static("a=1"));
        TraceContext::of(&headers)
    }

    #[test]
    fn a_trace_that_is_recorded_goes_on() {
        let context = context("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").expect("recorded");
        assert_eq!(context.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
        assert_eq!(context.parent_span_id, Some(0xb7ad_6b71_6920_3331));
        assert_eq!(context.state.as_deref(), Some("a=1"));
        assert_ne!(context.span_id, 0);
    }

    #[test]
    fn one_that_is_not_does_not() {
        assert_eq!(context("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"), None);
    }

    #[test]
    fn what_is_no_trace_begins_one() {
        for wrong in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            let context = context(wrong).expect("a new trace");
            assert_eq!((context.parent_span_id, context.state), (None, None), "{wrong}");
        }
        let later = context("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more");
        assert!(later.expect("recorded").parent_span_id.is_some());
    }
}
