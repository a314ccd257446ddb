//! Keeps web pages of other origins out while CORS is off.
//!
//! The browser's own rule only keeps a page from *reading* an answer: a page may still send a POST
//! without a content type, and the work would be done. Programs that are no browsers send neither of
//! the headers that are looked at.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::{HOST, ORIGIN};

use super::error::{ApiError, ErrorKind};
use super::state::AppState;

/// Stands before the whole router.
pub(super) async fn refuse_others(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Response {
    if state.cors || !is_foreign(request.headers()) {
        return next.run(request).await;
    }
    let message = "web pages of other origins are refused; start the server with --cors to let them in";
    ApiError::new(ErrorKind::Forbidden, message).with_code("origin_not_allowed").into_response()
}

/// True for a request that a browser sent for a page that is not this server's.
fn is_foreign(headers: &HeaderMap) -> bool {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or(""));
    match text("sec-fetch-site") {
        // The browser's word, which a page cannot forge; true also behind a proxy that changes `Host`.
        Some("same-origin") => return false,
        // "none" is a person who typed the address.
        None | Some("none") => {}
        Some(_) => return true,
    }
    let Some(origin) = text(ORIGIN.as_str()) else { return false };
    // "null", of sandboxed pages and local files, has no host and is foreign, too.
    let host = text(HOST.as_str()).unwrap_or("");
    match origin.split_once("://") {
        Some((scheme, origin)) => {
            let default_port = if scheme == "https" { ":443" } else { ":80" };
            let bare = |host: &str| host.strip_suffix(default_port).unwrap_or(host).to_ascii_lowercase();
            bare(origin) != bare(host)
        }
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::is_foreign;
    use http::{HeaderMap, HeaderName, HeaderValue};

    #[test]
    fn a_page_is_foreign_unless_it_came_from_here() {
        let cases: &[(&[(&str, &str)], bool)] = &[
            (&[], false),
            (&[("origin", "http://here:8080")], false),
            (&[("origin", "http://HERE:8080")], false),
            (&[("origin", "http://here:3000")], true),
            (&[("origin", "http://here")], true),
            (&[("origin", "http://elsewhere:8080")], true),
            (&[("origin", "null")], true),
            (&[("origin", "")], true),
            (&[("sec-fetch-site", "cross-site")], true),
            (&[("sec-fetch-site", "same-site")], true),
            (&[("sec-fetch-site", "same-origin")], false),
            (&[("sec-fetch-site", "none")], false),
            (&[("sec-fetch-site", "same-origin"), ("origin", "https://proxy")], false),
            (&[("sec-fetch-site", "cross-site"), ("origin", "http://here:8080")], true),
        ];
        for (given, foreign) in cases {
            let mut headers = HeaderMap::new();
            headers.insert("host", HeaderValue::from_static("here:8080"));
            for &(name, value) in *given {
                headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
            }
            assert_eq!(is_foreign(&headers), *foreign, "{given:?}");
        }
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_static("here:80"));
        headers.insert("origin", HeaderValue::from_static("http://here"));
        assert!(!is_foreign(&headers), "80 is http's own port");
    }
}
