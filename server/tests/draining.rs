//! A server that is stopping, and one whose engine does not get on.

mod support;

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use support::{TestOptions, TestServer};
use tandem::http::ServeOptions;

fn endless() -> Value {
    json!({ "model": "deep", "prompt": "a", "max_tokens": 4000, "ignore_eos": true, "stream": true })
}

#[tokio::test]
async fn while_answers_finish_health_fails_and_new_work_is_sent_away() {
    let gate = Arc::new(Mutex::new(()));
    let options = TestOptions { max_model_len: 8192, gate: Some(gate.clone()), ..TestOptions::default() };
    let mut server = TestServer::start(options).await;
    let request = Request::post("/v1/completions")
        .header("host", "test")
        .body(Full::new(Bytes::from(endless().to_string())))
        .expect("a request");
    let running = server.send(request).await;
    server.until("the sequence runs", |stats| stats.num_running == 1).await;
    let held = hold(gate);
    server.begin_shutdown();
    while !server.state.is_draining() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // On connections that are made now.
    let health = server.get("/health").await;
    assert_eq!((health.status.as_u16(), &health.json()["status"]), (503, &json!("draining")));
    let refused = server.post("/v1/completions", &json!({ "prompt": "a" })).await;
    assert_eq!(refused.status, 503);
    assert_eq!(refused.error()["code"], "shutting_down");
    assert!(refused.headers.contains_key("retry-after"));
    held.send(()).expect("it waits");
    let whole = running.into_body().collect().await.expect("the answer is finished").to_bytes();
    assert!(whole.ends_with(b"data: [DONE]\n\n"));
    server.stop().await;
}

/// Holds the gate, on a thread of its own, until the sender speaks.
fn hold(gate: Arc<Mutex<()>>) -> mpsc::Sender<()> {
    let (release, released) = mpsc::channel();
    let (held, is_held) = mpsc::channel();
    std::thread::spawn(move || {
        let _held = gate.lock().expect("no holder panics");
        held.send(()).expect("the test waits");
        let _ = released.recv();
    });
    is_held.recv().expect("the thread holds it");
    release
}

#[tokio::test]
async fn health_fails_while_the_engine_has_work_and_does_not_get_on() {
    let serve = ServeOptions { stall_timeout: Duration::from_millis(100), ..ServeOptions::default() };
    let gate = Arc::new(Mutex::new(()));
    let options = TestOptions { serve, gate: Some(gate.clone()), ..TestOptions::default() };
    let server = TestServer::start(options).await;
    let status = async |wanted: &str| {
        for _ in 0..1000 {
            let health = server.get("/health").await;
            let is_ok = health.status == 200;
            assert_eq!(is_ok, health.json()["status"] == "ok");
            if health.json()["status"] == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the status never was {wanted}");
    };
    status("ok").await;
    // Nothing to do is no stall.
    tokio::time::sleep(Duration::from_millis(300)).await;
    status("ok").await;
    let held = hold(gate);
    let body = json!({ "model": "deep", "prompt": "a", "max_tokens": 4, "ignore_eos": true, "stream": true });
    let answer = server.post_open("/v1/completions", &[], &body).await;
    status("stalled").await;
    held.send(()).expect("it waits");
    let whole = answer.into_body().collect().await.expect("the answer comes after all").to_bytes();
    assert!(whole.ends_with(b"data: [DONE]\n\n"));
    status("ok").await;
    assert_eq!(server.request(Method::GET, "/health", &[], "").await.status, 200);
    server.stop().await;
}
