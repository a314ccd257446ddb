//! Downloading a model into the hub cache with the `hf-hub` crate.
//!
//! That crate appends to a `.part` file beside the blob, so a download that was cut goes on where it
//! stopped. What it leaves open is closed here: one commit for all files (it asks for the branch anew
//! with each file), the length of what arrived, a finished `.part` file (the hub answers 416 to a
//! range past the end), names from the server that would lead out of the cache, and readable errors.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;

use super::{CachedModel, HubId, HubOptions};
use crate::Head;
use crate::family::CONFIG_FILE;
use crate::generation::GENERATION_FILE;
use crate::text::{CHAT_TEMPLATE_FILES, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};
use crate::weights::{INDEX_FILE, SINGLE_FILE, read_index};

/// A connection that drops is taken up again this many times, later each time.
const MAX_ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// Downloads the files of `id` that serving needs; their folder.
pub(super) fn download(id: &HubId, options: &HubOptions, cached: &CachedModel) -> Result<PathBuf, String> {
    let api = ApiBuilder::from_cache(Cache::new(options.cache_dir.clone()))
        .with_endpoint(options.endpoint.clone())
        .with_token(options.token.clone())
        .with_user_agent("tandem", env!("CARGO_PKG_VERSION"))
        .build()
        .map_err(|error| error.to_string())?;
    let named = Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision.clone());
    let info = api.repo(named.clone()).info().map_err(|error| explain(&error, id, None))?;
    if info.sha.is_empty() || !info.sha.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(format!("the server names the commit {:?}, wanted a hash", info.sha));
    }
    let pinned = Repo::with_revision(id.repo.clone(), RepoType::Model, info.sha.clone());
    let download = Download {
        id,
        repo: api.repo(pinned.clone()),
        api: &api,
        commit: &info.sha,
        snapshot: cached.dir.join("snapshots").join(&info.sha),
        progress: options.progress,
        blobs: cached.dir.join("blobs"),
    };
    for file in small_files(&info) {
        // A drafting head, which its configuration tells, has the tokens of its target.
        if file != TOKENIZER_FILE || has(&info, &file) || !Head::is_in(&download.snapshot) {
            download.fetch(&file)?;
        }
    }
    for file in weight_files(&info, &download)? {
        download.fetch(&file)?;
    }
    Cache::new(options.cache_dir.clone())
        .repo(named)
        .create_ref(&info.sha)
        .map_err(|error| format!("{}: {error}", cached.dir.join("refs").display()))?;
    Ok(download.snapshot)
}

fn has(info: &RepoInfo, file: &str) -> bool {
    info.siblings.iter().any(|sibling| sibling.rfilename == file)
}

fn small_files(info: &RepoInfo) -> Vec<String> {
    // The first two are fetched even if the server does not list them: its error is then the message.
    [CONFIG_FILE, TOKENIZER_FILE]
        .into_iter()
        .chain(
            [GENERATION_FILE, TOKENIZER_CONFIG_FILE]
                .into_iter()
                .chain(CHAT_TEMPLATE_FILES)
                .filter(|file| has(info, file)),
        )
        .map(str::to_owned)
        .collect()
}

fn weight_files(info: &RepoInfo, download: &Download<'_>) -> Result<Vec<String>, String> {
    if has(info, SINGLE_FILE) {
        return Ok(vec![SINGLE_FILE.to_owned()]);
    }
    if !has(info, INDEX_FILE) {
        return Err(format!(
            "the model holds neither {SINGLE_FILE} nor {INDEX_FILE}; other formats are not read"
        ));
    }
    download.fetch(INDEX_FILE)?;
    let index = read_index(&download.snapshot.join(INDEX_FILE)).map_err(|error| error.to_string())?;
    let mut shards: Vec<String> = index.into_values().collect();
    shards.sort_unstable();
    shards.dedup();
    Ok(shards)
}

struct Download<'a> {
    id: &'a HubId,
    api: &'a Api,
    repo: ApiRepo,
    commit: &'a str,
    snapshot: PathBuf,
    blobs: PathBuf,
    progress: bool,
}

impl Download<'_> {
    /// Fetches `file` unless the snapshot has it.
    fn fetch(&self, file: &str) -> Result<(), String> {
        let path = self.snapshot.join(file);
        if path.exists() {
            return Ok(());
        }
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            match self.try_fetch(file) {
                Ok(()) => break,
                Err(Failure::Transient(_)) if attempt < MAX_ATTEMPTS => {
                    std::thread::sleep(pause);
                    pause *= 2;
                }
                Err(Failure::Transient(reason)) => {
                    return Err(format!(
                        "{file}: {reason} (tried {MAX_ATTEMPTS} times; what has arrived is kept, and the same \
                         command goes on from there)"
                    ));
                }
                Err(Failure::Final(reason)) => return Err(reason),
            }
        }
        Ok(())
    }

    fn try_fetch(&self, file: &str) -> Result<(), Failure> {
        let fail = |error: ApiError| match is_transient(&error) {
            true => Failure::Transient(error.to_string()),
            false => Failure::Final(explain(&error, self.id, Some(file))),
        };
        let metadata = self.api.metadata(&self.repo.url(file)).map_err(fail)?;
        let etag = metadata.etag();
        if metadata.commit_hash() != self.commit {
            let found = metadata.commit_hash();
            return Err(Failure::Final(format!(
                "{file}: the server sent it from commit {found:?}, asked for {}",
                self.commit
            )));
        }
        if etag.is_empty() || !Path::new(etag).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(Failure::Final(format!("{file}: the server's ETag {etag:?} is no plain name")));
        }
        let size = metadata.size() as u64;
        let part = self.blobs.join(etag).with_extension("part");
        if std::fs::metadata(&part).is_ok_and(|part| part.len() >= size) {
            std::fs::remove_file(&part)
                .map_err(|error| Failure::Final(format!("{}: {error}", part.display())))?;
        }
        let bar = if self.progress { ProgressBar::new(size) } else { ProgressBar::hidden() };
        let path = self.repo.download_with_progress(file, bar).map_err(fail)?;
        let arrived = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        if arrived != size {
            // The wrong blob must not stay in the cache, where everybody would trust it.
            let _ = std::fs::remove_file(self.blobs.join(etag));
            let _ = std::fs::remove_file(&path);
            return Err(Failure::Transient(format!("{arrived} of {size} bytes arrived")));
        }
        Ok(())
    }
}

enum Failure {
    /// Worth another attempt.
    Transient(String),
    /// Another attempt would end the same way.
    Final(String),
}

fn status_of(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

fn is_transient(error: &ApiError) -> bool {
    match error {
        ApiError::RequestError(_) => status_of(error).is_none_or(|status| status == 429 || status >= 500),
        ApiError::IoError(_) => true,
        _ => false,
    }
}

/// What an error of the hub means for the user.
fn explain(error: &ApiError, id: &HubId, file: Option<&str>) -> String {
    let HubId { repo, revision } = id;
    let file = file.map_or(String::new(), |file| format!(", file {file}"));
    match status_of(error) {
        Some(404) => format!(
            "the hub has no {repo} at revision {revision}{file} (404); check the spelling, and that HF_TOKEN is \
             set if the model is private"
        ),
        Some(status @ (401 | 403)) => format!(
            "the hub refuses {repo}{file} ({status}); the model is private, gated or does not exist: accept its \
             terms on its page and set HF_TOKEN"
        ),
        Some(429) => "the hub asks for fewer requests (429); wait a little, or set HF_TOKEN".to_owned(),
        _ => format!("{error}{file}; is the network reachable? HF_ENDPOINT names another hub or mirror"),
    }
}
