//! Model names that are hub ids, against a small hub that the test itself runs on loopback.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::json;
use tandem_models::{Checkpoint, HubOptions, Tokenizer, resolve};

mod checkpoint_support;
use checkpoint_support::{byte_level_tokenizer, llama_config, safetensors_bytes};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One repository, `org/tiny`, at one commit.
#[derive(Default)]
struct Repository {
    files: BTreeMap<String, Vec<u8>>,
    /// Only requests with this token are served.
    token: Option<String>,
    /// The next so many long answers are cut in the middle.
    cuts: AtomicUsize,
    /// "METHOD path range" of every request for a file.
    requests: Mutex<Vec<String>>,
    stopped: AtomicBool,
}

struct Hub {
    address: String,
    repository: Arc<Repository>,
    thread: Option<JoinHandle<()>>,
}

impl Hub {
    fn start(repository: Repository) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let repository = Arc::new(repository);
        let served = Arc::clone(&repository);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if served.stopped.load(Ordering::Relaxed) {
                    break;
                }
                // A client that hangs up is not the server's trouble.
                let _ = answer(&served, stream.unwrap());
            }
        });
        Hub { address, repository, thread: Some(thread) }
    }

    fn options(&self, cache: &Path) -> HubOptions {
        HubOptions {
            cache_dir: cache.to_owned(),
            endpoint: format!("http://{}", self.address),
            token: None,
            offline: false,
            progress: false,
        }
    }

    fn requests(&self) -> Vec<String> {
        self.repository.requests.lock().unwrap().clone()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.repository.stopped.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Reads one request and answers it; one request a connection.
fn answer(repository: &Repository, mut stream: TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let Some(request) = lines.next().transpose()? else { return Ok(()) };
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let wanted = repository.token.as_ref().map(|token| format!("Bearer {token}"));
    if wanted.is_some() && headers.get("authorization") != wanted.as_ref() {
        return respond(&mut stream, "401 Unauthorized", "", b"no");
    }
    if path.starts_with("/api/models/org/tiny/revision/") {
        if !["main", COMMIT].iter().any(|revision| path.ends_with(&format!("/{revision}"))) {
            return respond(&mut stream, "404 Not Found", "", b"no such revision");
        }
        let siblings: Vec<_> = repository.files.keys().map(|file| json!({"rfilename": file})).collect();
        let body = json!({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).to_string();
        return respond(&mut stream, "200 OK", "", body.as_bytes());
    }
    let file =
        path.strip_prefix("/org/tiny/resolve/").and_then(|rest| rest.split_once('/')).map(|(_, file)| file);
    let Some((file, content)) = file.and_then(|file| Some((file, repository.files.get(file)?))) else {
        return respond(&mut stream, "404 Not Found", "", b"no such file");
    };
    let range = headers.get("range").cloned().unwrap_or_default();
    repository.requests.lock().unwrap().push(format!("{file} {range}"));
    let (start, end) = parse_range(&range, content.len());
    if start >= content.len() {
        return respond(&mut stream, "416 Range Not Satisfiable", "", b"");
    }
    let body = &content[start..end];
    let facts = format!(
        "ETag: \"etag-{file}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{}\r\n",
        end - 1,
        content.len()
    );
    let cut = body.len() > 1000
        && repository
            .cuts
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |cuts| cuts.checked_sub(1))
            .is_ok();
    if cut {
        write!(stream, "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\n{facts}\r\n", body.len())?;
        return stream.write_all(&body[..body.len() / 3]);
    }
    respond(&mut stream, "206 Partial Content", &facts, body)
}

fn respond(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    let length = body.len();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n")?;
    stream.write_all(body)
}

/// "bytes=3-" or "bytes=0-0" to a half-open range.
fn parse_range(range: &str, len: usize) -> (usize, usize) {
    let Some((start, end)) = range.strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
        return (0, len);
    };
    (start.parse().unwrap(), end.parse::<usize>().map_or(len, |end| (end + 1).min(len)))
}

fn tiny_files() -> BTreeMap<String, Vec<u8>> {
    let weights = safetensors_bytes(&[("model.embed_tokens.weight", &[300, 8])]);
    BTreeMap::from([
        ("config.json".to_owned(), llama_config(300).to_string().into_bytes()),
        ("tokenizer.json".to_owned(), byte_level_tokenizer(&["<eos>"]).into_bytes()),
        ("tokenizer_config.json".to_owned(), br#"{"eos_token": "<eos>"}"#.to_vec()),
        ("model.safetensors".to_owned(), weights),
        ("pytorch_model.bin".to_owned(), b"not wanted".to_vec()),
        ("README.md".to_owned(), b"not wanted".to_vec()),
    ])
}

fn tiny() -> Repository {
    Repository { files: tiny_files(), ..Repository::default() }
}

#[test]
fn a_model_is_downloaded_once_and_then_used_without_the_hub() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(tiny());
    let options = hub.options(cache.path());
    let dir = resolve("org/tiny", &options).unwrap();
    assert_eq!(dir, cache.path().join("models--org--tiny/snapshots").join(COMMIT));
    for (file, content) in tiny_files() {
        let wanted = !content.starts_with(b"not wanted");
        assert_eq!(std::fs::read(dir.join(&file)).ok(), wanted.then_some(content), "{file}");
    }
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!((checkpoint.name.as_str(), checkpoint.config.vocab_size), ("org/tiny", 300));
    assert_eq!(Tokenizer::from_dir(&dir).unwrap().eos_token(), Some("<eos>"));

    drop(hub);
    assert_eq!(resolve("org/tiny", &options).unwrap(), dir);
    assert_eq!(resolve("org/tiny@main", &HubOptions { offline: true, ..options.clone() }).unwrap(), dir);
    assert_eq!(resolve(&format!("org/tiny@{COMMIT}"), &options).unwrap(), dir);
}

#[test]
fn shards_named_by_the_index_are_downloaded() {
    let mut files = tiny_files();
    files.remove("model.safetensors");
    let index = json!({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}});
    files.insert("model.safetensors.index.json".to_owned(), index.to_string().into_bytes());
    files.insert("model-1.safetensors".to_owned(), safetensors_bytes(&[("a", &[2])]));
    files.insert("model-2.safetensors".to_owned(), safetensors_bytes(&[("b", &[2])]));
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(Repository { files, ..Repository::default() });
    let dir = resolve("org/tiny", &hub.options(cache.path())).unwrap();
    assert_eq!(Checkpoint::open(&dir).unwrap().weights.names(), ["a", "b"]);
}

/// The weights' requests after the one-byte probes for their size.
fn weight_ranges(hub: &Hub) -> Vec<String> {
    let requests = hub.requests();
    let ranges = requests.iter().filter_map(|request| request.strip_prefix("model.safetensors "));
    ranges.filter(|range| *range != "bytes=0-0").map(str::to_owned).collect()
}

#[test]
fn a_cut_download_goes_on_where_it_stopped() {
    // One cut within one call, then more cuts than one call bears and a second call.
    for (cuts, calls) in [(1, 1), (4, 2)] {
        let cache = tempfile::tempdir().unwrap();
        let mut repository = tiny();
        // Only the weights are long enough to be cut.
        repository.files.insert("tokenizer.json".to_owned(), b"{}".to_vec());
        repository.cuts = cuts.into();
        let hub = Hub::start(repository);
        let options = hub.options(cache.path());
        for _ in 1..calls {
            let error = resolve("org/tiny", &options).unwrap_err().to_string();
            assert!(error.contains("model.safetensors") && error.contains("goes on from there"), "{error}");
            let offline = resolve("org/tiny", &HubOptions { offline: true, ..options.clone() });
            assert!(offline.is_err(), "half a model was taken for a whole one");
        }
        let dir = resolve("org/tiny", &options).unwrap();
        let content = &tiny_files()["model.safetensors"];
        assert_eq!(&std::fs::read(dir.join("model.safetensors")).unwrap(), content);

        let starts: Vec<usize> = weight_ranges(&hub).iter().map(|range| parse_range(range, 0).0).collect();
        assert_eq!(starts.len(), cuts + 1, "{starts:?}");
        assert!(starts[0] == 0 && starts.is_sorted_by(|a, b| a < b), "{starts:?}");
    }
}

#[test]
fn a_partial_file_that_is_complete_already_is_no_obstacle() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(tiny());
    let blobs = cache.path().join("models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = Path::new("etag-model.safetensors").with_extension("part");
    std::fs::write(blobs.join(part), vec![7; tiny_files()["model.safetensors"].len()]).unwrap();
    let dir = resolve("org/tiny", &hub.options(cache.path())).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), tiny_files()["model.safetensors"]);
}

#[test]
fn refusals_of_the_hub_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(Repository { token: Some("secret".to_owned()), ..tiny() });
    let options = hub.options(cache.path());
    let message = |spec: &str, options: &HubOptions| resolve(spec, options).unwrap_err().to_string();
    let error = message("org/tiny", &options);
    assert!(error.contains("(401)") && error.contains("HF_TOKEN"), "{error}");
    let with_token = HubOptions { token: Some("secret".to_owned()), ..options };
    let error = message("org/absent", &with_token);
    assert!(error.contains("no org/absent at revision main (404)"), "{error}");
    let error = message("org/tiny@v9", &with_token);
    assert!(error.contains("no org/tiny at revision v9 (404)"), "{error}");
    resolve("org/tiny", &with_token).unwrap();
}

#[test]
fn a_model_without_safetensors_is_refused_before_its_weights_are_fetched() {
    let mut repository = tiny();
    repository.files.remove("model.safetensors");
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(repository);
    let error = resolve("org/tiny", &hub.options(cache.path())).unwrap_err().to_string();
    assert!(error.contains("neither model.safetensors nor model.safetensors.index.json"), "{error}");
    assert!(hub.requests().iter().all(|request| !request.starts_with("pytorch_model.bin")));
}

#[test]
fn offline_says_what_was_looked_for_and_where() {
    let cache = tempfile::tempdir().unwrap();
    let options = HubOptions {
        cache_dir: cache.path().to_owned(),
        // Nothing may be asked of it.
        endpoint: "http://127.0.0.1:1".to_owned(),
        token: None,
        offline: true,
        progress: false,
    };
    let error = resolve("org/tiny", &options).unwrap_err().to_string();
    for wanted in ["`org/tiny`", cache.path().to_str().unwrap(), "HF_HUB_OFFLINE", "give its folder"] {
        assert!(error.contains(wanted), "wanted {wanted:?} in {error}");
    }
    let snapshot = cache.path().join("models--org--tiny/snapshots/abc");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(cache.path().join("models--org--tiny/refs")).unwrap();
    std::fs::write(cache.path().join("models--org--tiny/refs/main"), "abc").unwrap();
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    let error = resolve("org/tiny", &options).unwrap_err().to_string();
    assert!(error.contains("lacks tokenizer.json, model.safetensors"), "{error}");
}

#[test]
fn an_unreachable_hub_is_an_error_and_not_a_panic() {
    let cache = tempfile::tempdir().unwrap();
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let options = HubOptions {
        cache_dir: cache.path().to_owned(),
        endpoint: endpoint.clone(),
        token: None,
        offline: false,
        progress: false,
    };
    let error = resolve("org/tiny", &options).unwrap_err().to_string();
    assert!(error.contains(&endpoint) && error.contains("is the network reachable?"), "{error}");
}

#[test]
fn local_folders_come_first() {
    let dir = tempfile::tempdir().unwrap();
    let options = HubOptions {
        cache_dir: PathBuf::from("/no/such/cache"),
        endpoint: "http://127.0.0.1:1".to_owned(),
        token: None,
        offline: true,
        progress: false,
    };
    assert_eq!(resolve(dir.path().to_str().unwrap(), &options).unwrap(), dir.path());
    let file = dir.path().join("model.safetensors");
    std::fs::write(&file, "x").unwrap();
    let error = resolve(file.to_str().unwrap(), &options).unwrap_err().to_string();
    assert!(error.contains("is a file; wanted a .gguf file, or the folder"), "{error}");
    for spec in ["./no-such-folder", "no-such-folder", "/no/such/folder", "../../etc"] {
        let error = resolve(spec, &options).unwrap_err().to_string();
        assert!(error.contains("no such folder, and it is no hub id"), "{spec}: {error}");
    }
}
