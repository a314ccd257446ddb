//! Keys from a file: made and revoked while the server runs, their lanes, budgets and account.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Answer, TestOptions, TestServer};
use tandem::keys::{Budget, Keeper, KeyFile, KeyFileError, KeyRules, Keyring, Lanes};
use tandem_engine::Priority;

/// A window that does not end while a test runs, but for once in ten years.
const LONG: u64 = 10 * 366 * 86_400;

struct Office {
    folder: tempfile::TempDir,
    server: TestServer,
    keeper: Option<Keeper>,
}

impl Office {
    async fn open(options: TestOptions) -> Office {
        let folder = tempfile::tempdir().expect("a folder");
        Office::reopen(folder, options).await
    }

    async fn reopen(folder: tempfile::TempDir, options: TestOptions) -> Office {
        let ring = Arc::new(Keyring::new(&options.api_keys, true));
        let keeper = Keeper::start(&folder.path().join("keys.db"), ring.clone()).expect("the file is made");
        let server = TestServer::start(TestOptions { keys: Some(ring), ..options }).await;
        Office { folder, server, keeper: Some(keeper) }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("keys.db")
    }

    /// As another process would.
    fn file(&self) -> KeyFile {
        KeyFile::open(&self.path(), false).expect("the file opens beside the server")
    }

    async fn post(&self, key: &str, path: &str, body: &Value) -> Answer {
        let bearer = format!("Bearer {key}");
        let headers = [("authorization", bearer.as_str())];
        self.server.request(http::Method::POST, path, &headers, &body.to_string()).await
    }

    async fn complete(&self, key: &str) -> Answer {
        let body = json!({ "model": "fast", "prompt": "a", "max_tokens": 4, "ignore_eos": true });
        self.post(key, "/v1/completions", &body).await
    }

    /// A key is in use, or out of it, a moment after the file was changed.
    async fn until_status(&self, key: &str, status: u16) {
        for _ in 0..600 {
            let bearer = format!("Bearer {key}");
            let headers = [("authorization", bearer.as_str())];
            let answer = self.server.request(http::Method::GET, "/v1/models", &headers, "").await;
            if answer.status == status {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the status never was {status}");
    }

    async fn close(mut self) -> tempfile::TempDir {
        self.server.stop().await;
        drop(self.keeper.take());
        self.folder
    }
}

fn rules() -> KeyRules {
    KeyRules::default()
}

#[tokio::test]
async fn keys_are_made_and_revoked_under_a_running_server() {
    let options = TestOptions { api_keys: vec!["from-the-settings".to_owned()], ..TestOptions::default() };
    let office = Office::open(options).await;
    office.until_status("tdm_unknown", 401).await;
    office.until_status("from-the-settings", 200).await;
    let new = office.file().add("team", &rules(), 1).expect("made");
    assert!(new.key.starts_with("tdm_") && new.key.len() == 68, "{}", new.key.len());
    office.until_status(&new.key, 200).await;
    assert_eq!(office.complete(&new.key).await.status, 200);
    office.file().revoke("team", 2).expect("revoked");
    office.until_status(&new.key, 401).await;
    office.until_status("from-the-settings", 200).await;
    assert!(matches!(office.file().revoke("team", 3), Err(KeyFileError::Unknown(_))));
    let again = office.file().add("team", &rules(), 4).expect("the name is free again");
    assert_ne!(again.key, new.key);
    office.close().await;
}

#[tokio::test]
async fn a_file_without_keys_lets_nobody_in() {
    let office = Office::open(TestOptions::default()).await;
    let answer = office.server.get("/v1/models").await;
    assert_eq!(answer.status, 401);
    assert_eq!(office.server.get("/health").await.status, 200);
    office.close().await;
}

#[tokio::test]
async fn the_file_holds_no_key_and_is_the_owners_alone() {
    let office = Office::open(TestOptions::default()).await;
    let new = office.file().add("team", &rules(), 1).expect("made");
    office.until_status(&new.key, 200).await;
    let secret = &new.key.as_bytes()["tdm_".len() + 6..];
    for entry in std::fs::read_dir(office.folder.path()).expect("a folder") {
        let path = entry.expect("an entry").path();
        let bytes = std::fs::read(&path).expect("read");
        assert!(!bytes.windows(secret.len()).any(|window| window == secret), "the key is in {path:?}");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = std::fs::metadata(&path).expect("metadata").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{path:?}");
        }
    }
    office.close().await;
}

#[cfg(unix)]
#[test]
fn a_file_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys.db");
    drop(KeyFile::open(&path, true).expect("made"));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("permissions");
    let error = KeyFile::open(&path, true).err().expect("refused").to_string();
    assert!(error.contains("0644") && error.contains("chmod 600"), "{error}");
}

#[test]
fn files_that_are_no_files_of_keys_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = |path: &Path, make| KeyFile::open(path, make).err().expect("refused").to_string();
    let missing = open(&folder.path().join("none.db"), false);
    assert!(missing.contains("none.db") && missing.contains("tandem keys add"), "{missing}");
    let text = folder.path().join("text.db");
    drop(KeyFile::open(&text, true).expect("made, with the right mode"));
    std::fs::write(&text, "this is no database, however long it may be, and it is long enough")
        .expect("written");
    let error = open(&text, true);
    assert!(error.contains("text.db") && error.contains("not a database"), "{error}");
}

#[test]
fn names_are_checked_and_unique() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut file = KeyFile::open(&folder.path().join("keys.db"), true).expect("made");
    file.add("a.b-c_d@e", &rules(), 0).expect("a name");
    assert!(matches!(file.add("a.b-c_d@e", &rules(), 0), Err(KeyFileError::NameTaken(_))));
    for wrong in ["", "a b", "ä", "a\n", &"x".repeat(65)] {
        assert!(matches!(file.add(wrong, &rules(), 0), Err(KeyFileError::Name(_))), "{wrong:?}");
    }
}

#[tokio::test]
async fn a_key_opens_only_its_lanes() {
    let office = Office::open(TestOptions::default()).await;
    let fast = KeyRules { lanes: Lanes { fast: true, deep: false }, ..rules() };
    let key = office.file().add("fast-only", &fast, 1).expect("made").key;
    office.until_status(&key, 200).await;
    for model in ["deep", "big-model"] {
        let refused = office.post(&key, "/v1/completions", &json!({ "model": model, "prompt": "a" })).await;
        assert_eq!(refused.status, 403, "{model}");
        assert_eq!(refused.error()["code"], "lane_not_allowed");
    }
    // `auto` would take the deep lane for a chat.
    let body = json!({ "messages": [{ "role": "user", "content": "a" }], "max_tokens": 2 });
    let answer = office.post(&key, "/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["x-tandem-lane"], "fast");
    assert_eq!(answer.headers["x-tandem-lane-reason"], "only lane");
    office.close().await;
}

#[tokio::test]
async fn a_budget_of_requests_is_enforced_and_shown() {
    let office = Office::open(TestOptions::default()).await;
    let limited = KeyRules { requests: Some(Budget { amount: 2, window: LONG }), ..rules() };
    let key = office.file().add("limited", &limited, 1).expect("made").key;
    office.until_status(&key, 200).await;
    for remaining in ["1", "0"] {
        let answer = office.complete(&key).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["x-ratelimit-limit-requests"], "2");
        assert_eq!(answer.headers["x-ratelimit-remaining-requests"], remaining);
        assert!(answer.headers["x-ratelimit-reset-requests"].to_str().expect("text").ends_with('s'));
        assert!(!answer.headers.contains_key("x-ratelimit-limit-tokens"));
    }
    let refused = office.complete(&key).await;
    assert_eq!(refused.status, 429);
    let error = refused.error();
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("rate_limit_exceeded")));
    let wait: u64 = refused.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert!((1..=LONG).contains(&wait));
    let refused = office.post(&key, "/v1/messages", &json!({ "max_tokens": 1 })).await;
    assert_eq!(
        (refused.status.as_u16(), &refused.json()["type"]),
        (429, &json!("error")),
        "in its own shape"
    );
    // Looking costs nothing.
    office.until_status(&key, 200).await;
    office.close().await;
}

#[tokio::test]
async fn a_budget_of_tokens_counts_prompts_and_answers_and_outlives_a_restart() {
    let office = Office::open(TestOptions::default()).await;
    let limited = KeyRules { tokens: Some(Budget { amount: 12, window: LONG }), ..rules() };
    let key = office.file().add("limited", &limited, 1).expect("made").key;
    office.until_status(&key, 200).await;
    // One token of prompt and four of answer.
    assert_eq!(office.complete(&key).await.status, 200);
    assert_eq!(office.complete(&key).await.headers["x-ratelimit-remaining-tokens"], "2");
    let folder = office.close().await;

    let office = Office::reopen(folder, TestOptions::default()).await;
    let long = json!({ "model": "fast", "prompt": [1, 2, 3], "max_tokens": 1 });
    let refused = office.post(&key, "/v1/completions", &long).await;
    assert_eq!(refused.status, 429, "two are left, after a restart too");
    assert!(refused.error()["message"].as_str().expect("text").contains("has 3"));
    let hopeless = json!({ "model": "fast", "prompt": vec![1; 13], "max_tokens": 1 });
    assert_eq!(office.post(&key, "/v1/completions", &hopeless).await.status, 400);
    assert_eq!(office.complete(&key).await.status, 200, "a running answer may overdraw");
    assert_eq!(office.complete(&key).await.status, 429);
    let folder = office.close().await;
    let mut file = KeyFile::open(&folder.path().join("keys.db"), false).expect("opens");
    let used = file.find("limited").expect("read").expect("there").used;
    assert_eq!((used.total_tokens, used.total_requests), (15, 5));
}

#[tokio::test]
async fn a_streamed_answer_is_paid_as_it_comes() {
    let office = Office::open(TestOptions::default()).await;
    let limited = KeyRules { tokens: Some(Budget { amount: 1000, window: LONG }), ..rules() };
    let key = office.file().add("limited", &limited, 1).expect("made").key;
    office.until_status(&key, 200).await;
    let body =
        json!({ "model": "deep", "prompt": "a", "max_tokens": 20, "ignore_eos": true, "stream": true });
    assert_eq!(office.post(&key, "/v1/completions", &body).await.status, 200);
    let answer = office.complete(&key).await;
    // 1 + 20 of the stream, 1 of this prompt; this answer may be paid already.
    let remaining: u64 =
        answer.headers["x-ratelimit-remaining-tokens"].to_str().expect("text").parse().expect("a count");
    assert!(remaining <= 1000 - 22, "{remaining}");
    office.close().await;
}

#[tokio::test]
async fn keys_keep_their_priority_and_their_expiry() {
    let office = Office::open(TestOptions::default()).await;
    let batch = KeyRules { priority: Priority::Batch, expires_at: Some(10), ..rules() };
    let key = office.file().add("old", &batch, 1).expect("made").key;
    let other = office.file().add("new", &rules(), 1).expect("made").key;
    office.until_status(&other, 200).await;
    office.until_status(&key, 401).await;
    let entry = office.file().find("old").expect("read").expect("there");
    assert_eq!(entry.rules, batch);
    assert!(key.starts_with(&entry.hint) && entry.hint.len() == "tdm_".len() + 6);
    office.close().await;
}

#[test]
fn many_writers_wait_for_each_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys.db");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let path = &path;
            scope.spawn(move || {
                for i in 0..5 {
                    let mut file = KeyFile::open(path, true).expect("opens");
                    file.add(&format!("{thread}-{i}"), &rules(), 0).expect("made");
                }
            });
        }
    });
    let entries = KeyFile::open(&path, false).expect("opens").entries().expect("read");
    assert_eq!(entries.len(), 20);
}

/// The lines of `/metrics` that are about keys, as this key sees them.
async fn key_metrics(office: &Office, key: &str) -> Vec<String> {
    let bearer = format!("Bearer {key}");
    let headers = [("authorization", bearer.as_str())];
    let answer = office.server.request(http::Method::GET, "/metrics", &headers, "").await;
    let page = String::from_utf8(answer.body.to_vec()).expect("text");
    assert!(page.contains("tandem_sequences_running") && page.contains("vllm:num_requests_running"));
    page.lines().filter(|line| line.starts_with("tandem_key_")).map(str::to_owned).collect()
}

#[tokio::test]
async fn metrics_show_keys_to_the_operator_and_each_to_itself() {
    let options = TestOptions { api_keys: vec!["operators".to_owned()], ..TestOptions::default() };
    let office = Office::open(options).await;
    let budget = Some(Budget { amount: 1, window: LONG });
    let limited = KeyRules { requests: budget, ..rules() };
    let limited = office.file().add("limited", &limited, 1).expect("made").key;
    let other = office.file().add("other", &rules(), 1).expect("made").key;
    office.until_status(&other, 200).await;
    assert_eq!(office.complete(&limited).await.status, 200);
    assert_eq!(office.complete(&limited).await.status, 429);
    assert_eq!(office.complete("operators").await.status, 200);
    let all = key_metrics(&office, "operators").await;
    for line in [
        "tandem_key_requests_total{key=\"limited\",key_id=\"1\"} 1",
        "tandem_key_requests_total{key=\"other\",key_id=\"2\"} 0",
        "tandem_key_requests_total{key=\"\",key_id=\"0\"} 1",
        "tandem_key_refusals_total{key=\"limited\",key_id=\"1\",budget=\"requests\"} 1",
        "tandem_key_budget_left{key=\"limited\",key_id=\"1\",budget=\"requests\"} 0",
    ] {
        assert!(all.iter().any(|shown| shown == line), "{line} is not in {all:#?}");
    }
    assert!(all.iter().all(|line| !line.contains(&limited) && !line.contains("operators")));
    let own = key_metrics(&office, &other).await;
    assert!(!own.is_empty() && own.iter().all(|line| line.contains("key=\"other\"")), "{own:#?}");
    office.close().await;
}

#[tokio::test]
async fn a_damaged_row_does_not_keep_others_from_being_revoked() {
    let office = Office::open(TestOptions::default()).await;
    let leaked = office.file().add("leaked", &rules(), 1).expect("made").key;
    let broken = office.file().add("broken", &rules(), 1).expect("made").key;
    let stays = office.file().add("stays", &rules(), 1).expect("made").key;
    office.until_status(&stays, 200).await;
    let connection = rusqlite::Connection::open(office.path()).expect("it opens");
    connection.execute("UPDATE keys SET lanes = 'all' WHERE name = 'broken'", []).expect("changed");
    office.file().revoke("leaked", 2).expect("revoked");
    office.until_status(&leaked, 401).await;
    assert_eq!(office.complete(&broken).await.status, 401);
    assert_eq!(office.complete(&stays).await.status, 200);
    assert!(matches!(office.file().entries(), Err(KeyFileError::Damaged { .. })));
    office.close().await;
}
