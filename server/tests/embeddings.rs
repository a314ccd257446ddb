//! Embeddings from outside: OpenAI's, Ollama's and llama.cpp's form of one and the same vectors.

mod support;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use support::{TestOptions, TestServer};

fn vector(value: &Value) -> Vec<f32> {
    let values = value.as_array().unwrap_or_else(|| panic!("{value} is no vector"));
    values.iter().map(|value| value.as_f64().expect("a number") as f32).collect()
}

fn length(vector: &[f32]) -> f64 {
    vector.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt()
}

fn is_one(length: f64) -> bool {
    (length - 1.0).abs() < 1e-6
}

async fn embed(server: &TestServer, body: Value) -> Vec<Vec<f32>> {
    let answer = server.post("/v1/embeddings", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.json());
    let data = answer.json()["data"].clone();
    data.as_array().expect("a list").iter().map(|item| vector(&item["embedding"])).collect()
}

#[tokio::test]
async fn a_texts_vector_is_the_same_alone_in_company_and_as_tokens() {
    let server = TestServer::plain().await;
    let texts: Vec<String> =
        (0..20).map(|i| format!("def f{i}(x):\n    return x{}", " + 1".repeat(i * 3))).collect();
    let together = embed(&server, json!({ "input": texts })).await;
    assert_eq!(together.len(), texts.len());
    for (text, vector) in texts.iter().zip(&together) {
        assert!(is_one(length(vector)));
        assert_eq!(&embed(&server, json!({ "input": text })).await[0], vector, "{text}");
        let tokens = server.tokenizer.encode(text, true).expect("it encodes");
        assert_eq!(&embed(&server, json!({ "input": tokens })).await[0], vector, "{text}");
        assert_eq!(&embed(&server, json!({ "input": [tokens] })).await[0], vector, "{text}");
    }
    assert_ne!(together[0], together[1]);
    let answer = server.post("/v1/embeddings", &json!({ "input": "a b", "model": "auto" })).await;
    assert_eq!(answer.headers["x-tandem-lane"], "fast");
    let answer = answer.json();
    let num_tokens = server.tokenizer.encode("a b", true).expect("it encodes").len();
    assert_eq!(answer["usage"], json!({ "prompt_tokens": num_tokens, "total_tokens": num_tokens }));
    assert_eq!((&answer["object"], &answer["data"][0]["object"]), (&json!("list"), &json!("embedding")));
    assert_eq!(answer["model"], "small-model");
    let metrics = server.get("/metrics").await;
    let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
    assert!(metrics.contains("tandem_embeddings_total "), "{metrics}");
    server.stop().await;
}

#[tokio::test]
async fn formats_and_dimensions_are_openais() {
    let server = TestServer::plain().await;
    let whole = embed(&server, json!({ "input": "def add(a, b):" })).await.remove(0);
    let body = json!({ "input": "def add(a, b):", "encoding_format": "base64" });
    let answer = server.post("/v1/embeddings", &body).await.json();
    let bytes = STANDARD.decode(answer["data"][0]["embedding"].as_str().expect("text")).expect("base64");
    let values: Vec<f32> =
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(values, whole);
    let short = embed(&server, json!({ "input": "def add(a, b):", "dimensions": 4 })).await.remove(0);
    assert!(short.len() == 4 && is_one(length(&short)));
    let factor = f64::from(short[0]) / f64::from(whole[0]);
    for (short, whole) in short.iter().zip(&whole) {
        assert!((f64::from(*short) - factor * f64::from(*whole)).abs() < 1e-6, "the same direction");
    }
    server.stop().await;
}

#[tokio::test]
async fn faults_name_their_field() {
    let server = TestServer::plain().await;
    let long = vec!["word "; 300].concat();
    let too_many: Vec<&str> = vec!["a"; 2049];
    for (body, param, wanted) in [
        (json!({}), "input", "missing"),
        (json!({ "input": [] }), "input", "empty"),
        (json!({ "input": ["a", ""] }), "input", "input 1: the prompt is empty"),
        (json!({ "input": [[1], [4_000_000]] }), "input", "input 1: prompt token 4000000"),
        (json!({ "input": {} }), "input", "an array"),
        (json!({ "input": long }), "input", "256"),
        (json!({ "input": too_many }), "input", "2048"),
        (json!({ "input": "a", "dimensions": 0 }), "dimensions", "from 1 to"),
        (json!({ "input": "a", "dimensions": 1_000_000 }), "dimensions", "from 1 to"),
        (json!({ "input": "a", "encoding_format": "int8" }), "encoding_format", "\"float\" or \"base64\""),
    ] {
        let answer = server.post("/v1/embeddings", &body).await;
        assert_eq!(answer.status, 400, "{}", answer.json());
        let error = answer.error();
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().expect("text").contains(wanted), "{error}");
    }
    let unknown = server.post("/v1/embeddings", &json!({ "model": "ada", "input": "a" })).await;
    assert_eq!((unknown.status.as_u16(), &unknown.error()["code"]), (404, &json!("model_not_found")));
    server.stop().await;
}

/// Whatever the last text's fault is, no other text is computed, and none is counted.
#[tokio::test]
async fn all_texts_are_checked_before_one_is_computed() {
    let server = TestServer::plain().await;
    let tokens = vec![vec![1_u32]; 100];
    for fault in [vec![], vec![4_000_000], vec![1; 257]] {
        let input = [tokens.clone(), vec![fault]].concat();
        let answer = server.post("/v1/embeddings", &json!({ "input": input })).await;
        assert_eq!(answer.status, 400, "{}", answer.json());
        let error = answer.error();
        assert!(error["message"].as_str().expect("text").starts_with("input 100: "), "{error}");
    }
    // Whatever the engine had been given before would be counted by now: what comes later is computed later.
    embed(&server, json!({ "input": "a" })).await;
    let computed = |page: &str| {
        let line = page.lines().find(|line| line.starts_with("tandem_embeddings_total "));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<u32>().ok()).expect("a count")
    };
    let mut count = 0;
    for _ in 0..600 {
        count = computed(&String::from_utf8_lossy(&server.get("/metrics").await.body));
        if count > 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(count, 1);
    server.stop().await;
}

#[tokio::test]
async fn other_protocols_give_the_same_vectors() {
    let server = TestServer::plain().await;
    let texts = ["let x = 1;", "fn main() {}"];
    let ours = embed(&server, json!({ "input": texts })).await;
    let answer = server.post("/api/embed", &json!({ "model": "fast:latest", "input": texts })).await.json();
    let theirs: Vec<Vec<f32>> = answer["embeddings"].as_array().expect("a list").iter().map(vector).collect();
    assert_eq!(theirs, ours);
    assert!(answer["prompt_eval_count"].as_u64() > Some(2), "{answer}");
    let answer = server.post("/api/embeddings", &json!({ "model": "fast", "prompt": texts[0] })).await.json();
    assert_eq!(vector(&answer["embedding"]), ours[0]);
    // What is too long is cut, unless the client says otherwise.
    let long = vec!["word "; 300].concat();
    let cut = server.post("/api/embed", &json!({ "model": "fast", "input": long })).await.json();
    assert_eq!(cut["prompt_eval_count"], 256);
    let whole = json!({ "model": "fast", "input": long, "truncate": false });
    let refused = server.post("/api/embed", &whole).await;
    assert!(refused.status == 400 && refused.json()["error"].is_string());
    for path in ["/embedding", "/embeddings"] {
        let answer = server.post(path, &json!({ "content": texts })).await.json();
        assert_eq!((&answer[1]["index"], vector(&answer[1]["embedding"][0])), (&json!(1), ours[1].clone()));
    }
    let plain = json!({ "content": texts[0], "embd_normalize": -1 });
    let plain = vector(&server.post("/embedding", &plain).await.json()[0]["embedding"][0]);
    let length = length(&plain);
    for (plain, ours) in plain.iter().zip(&ours[0]) {
        assert!((f64::from(*plain) / length - f64::from(*ours)).abs() < 1e-6);
    }
    let refused = server.post("/embedding", &json!({ "content": "a", "embd_normalize": 0 })).await;
    assert_eq!((refused.status.as_u16(), &refused.json()["error"]["code"]), (400, &json!(400)));
    server.stop().await;
}

/// So many values are written on a thread apart.
#[tokio::test]
async fn large_answers_are_whole_and_have_no_more_digits_than_they_need() {
    let server = TestServer::plain().await;
    let alone = embed(&server, json!({ "input": "a" })).await.remove(0);
    let texts = vec!["a"; 2048];
    assert!(texts.len() * alone.len() > 8 << 10);
    for (path, field) in [("/v1/embeddings", "input"), ("/api/embed", "input"), ("/embedding", "content")] {
        let answer = server.post(path, &json!({ "model": "fast", field: texts })).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.headers["x-tandem-lane"]),
            (200, &"fast".parse().unwrap())
        );
        let json = answer.json();
        let vectors: Vec<Vec<f32>> = match path {
            "/api/embed" => json["embeddings"].as_array().expect("a list").iter().map(vector).collect(),
            "/embedding" => {
                let items = json.as_array().expect("a list").iter();
                items.map(|item| vector(&item["embedding"][0])).collect()
            }
            _ => {
                let items = json["data"].as_array().expect("a list").iter();
                items.map(|item| vector(&item["embedding"])).collect()
            }
        };
        assert_eq!(vectors, vec![alone.clone(); texts.len()], "{path}");
        let body = String::from_utf8_lossy(&answer.body);
        let numbers = body.split(['[', ']', ',']).filter(|text| text.parse::<f32>().is_ok());
        let digits = numbers.map(|text| {
            let mantissa = text.split('e').next().unwrap_or(text).trim_start_matches(['-', '0', '.']);
            mantissa.bytes().filter(u8::is_ascii_digit).count()
        });
        assert!(digits.max() <= Some(9), "{path}: {}", &body[..200]);
    }
    server.stop().await;
}

#[tokio::test]
async fn without_a_draft_the_target_embeds() {
    let server = TestServer::start(TestOptions { with_draft: false, ..TestOptions::default() }).await;
    let answer = server.post("/v1/embeddings", &json!({ "input": "a" })).await;
    assert_eq!(answer.headers["x-tandem-lane"], "deep");
    assert_eq!(answer.json()["model"], "big-model");
    server.stop().await;
}
