//! What a model name means: a local folder or GGUF file, a hub id whose files are in the local hub cache,
//! or a hub id to download. Local first: a folder or a complete snapshot is used without any network.
//!
//! The cache is the one that Python's `huggingface_hub` keeps, found by the same environment
//! variables: `models--org--name/{blobs,refs/<revision>,snapshots/<commit>/<file>}`. A ref is written
//! only after all files of its snapshot are there.

mod download;

use std::path::{Path, PathBuf};

use crate::family::CONFIG_FILE;
use crate::text::TOKENIZER_FILE;
use crate::weights::gguf::{is_gguf, is_later_part};
use crate::weights::{INDEX_FILE, SINGLE_FILE, read_index};
use crate::{Head, ModelError};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";

/// Where the hub and its local cache are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubOptions {
    /// The cache folder, which holds the `models--org--name` folders.
    pub cache_dir: PathBuf,
    /// The hub, or a mirror of it.
    pub endpoint: String,
    /// Sent with every request, for private and gated models.
    pub token: Option<String>,
    /// Never use the network.
    pub offline: bool,
    /// Show a progress bar on stderr if that is a terminal.
    pub progress: bool,
}

impl HubOptions {
    /// Reads the variables that Python's `huggingface_hub` reads: `HF_HUB_CACHE` (or
    /// `HUGGINGFACE_HUB_CACHE`), `HF_HOME`, `XDG_CACHE_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`,
    /// `HF_TOKEN`, `HF_TOKEN_PATH`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok(), std::env::home_dir())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>, user_home: Option<PathBuf>) -> Self {
        let user_home = user_home.unwrap_or_else(|| PathBuf::from("."));
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| {
            set(name).map(|value| match value.strip_prefix("~/") {
                Some(rest) => user_home.join(rest),
                None => PathBuf::from(value),
            })
        };
        let cache_home = path("XDG_CACHE_HOME").unwrap_or_else(|| user_home.join(".cache"));
        let hf_home = path("HF_HOME").unwrap_or_else(|| cache_home.join("huggingface"));
        let token_path = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
        let token = set("HF_TOKEN")
            .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| std::fs::read_to_string(token_path).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let is_true = |value: String| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        HubOptions {
            cache_dir: path("HF_HUB_CACHE")
                .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
                .unwrap_or_else(|| hf_home.join("hub")),
            endpoint: set("HF_ENDPOINT")
                .unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned())
                .trim_end_matches('/')
                .to_owned(),
            token,
            offline: set("HF_HUB_OFFLINE").or_else(|| set("TRANSFORMERS_OFFLINE")).is_some_and(is_true),
            progress: true,
        }
    }
}

/// The local folder of the model that `spec` names: a folder, or `org/name[@revision]` on the hub. Of a
/// GGUF file it is the file itself; a folder without a `config.json` may stand for the one GGUF model in it.
///
/// # Errors
/// If there is no such model, or it cannot be had; the message says what was looked for, where, and
/// what to do.
pub fn resolve(spec: &str, options: &HubOptions) -> Result<PathBuf, ModelError> {
    let error = |reason: String| ModelError::Source { spec: spec.to_owned(), reason };
    let path = Path::new(spec);
    if path.is_dir() {
        return if path.join(CONFIG_FILE).exists() {
            Ok(path.to_owned())
        } else {
            only_gguf(path).map_err(error)
        };
    }
    if path.exists() {
        return if is_gguf(path) {
            Ok(path.to_owned())
        } else {
            Err(error(format!("is a file; wanted a .gguf file, or the folder that holds its {CONFIG_FILE}")))
        };
    }
    let Some(id) = HubId::parse(spec) else {
        return Err(error(
            "there is no such folder, and it is no hub id, which is org/name[@revision]".into(),
        ));
    };
    let cached = CachedModel { dir: options.cache_dir.join(id.folder_name()) };
    let missing = match cached.snapshot(&id.revision) {
        Some(snapshot) => match missing_files(&snapshot)?.as_slice() {
            [] => return Ok(snapshot),
            missing => format!("{} lacks {}", snapshot.display(), missing.join(", ")),
        },
        None => format!("{} has no revision {}", cached.dir.display(), id.revision),
    };
    if options.offline {
        return Err(error(format!(
            "there is no such folder here, the hub cache does not hold it ({missing}), and HF_HUB_OFFLINE \
             forbids a download. Copy the model to this machine and give its folder, or fill the cache on a \
             machine with network"
        )));
    }
    download::download(&id, options, &cached).map_err(|reason| {
        error(format!(
            "there is no such folder here, the hub cache does not hold it ({missing}), and the download from \
             {} failed: {reason}",
            options.endpoint
        ))
    })
}

/// The one GGUF model in `folder`, or the folder itself if there is none, so that the error is about what
/// the folder lacks.
fn only_gguf(folder: &Path) -> Result<PathBuf, String> {
    let entries = std::fs::read_dir(folder).map_err(|error| error.to_string())?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    // Of a model in several parts the first stands for all.
    files.retain(|file| is_gguf(file) && !is_later_part(file));
    files.sort_unstable();
    match files.as_slice() {
        [] => Ok(folder.to_owned()),
        [only] => Ok(only.clone()),
        several => {
            let names =
                several.iter().filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned()));
            let names: Vec<String> = names.collect();
            Err(format!("is a folder of {} GGUF models; name one of them: {}", names.len(), names.join(", ")))
        }
    }
}

/// `org/name` at a branch, tag or commit.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HubId {
    repo: String,
    revision: String,
}

impl HubId {
    fn parse(spec: &str) -> Option<Self> {
        let (repo, revision) = spec.split_once('@').unwrap_or((spec, DEFAULT_REVISION));
        let (org, name) = repo.split_once('/')?;
        // Both become parts of paths and addresses, so nothing else passes.
        let plain = |part: &str| {
            let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            !part.is_empty() && !part.starts_with(['.', '-']) && part.bytes().all(legal)
        };
        (plain(org) && plain(name) && revision.split('/').all(plain))
            .then(|| HubId { repo: repo.to_owned(), revision: revision.to_owned() })
    }

    fn folder_name(&self) -> String {
        format!("models--{}", self.repo.replace('/', "--"))
    }
}

/// One model's folder in the hub cache.
struct CachedModel {
    dir: PathBuf,
}

impl CachedModel {
    /// The snapshot folder of a branch, tag or full commit hash, if there is one.
    fn snapshot(&self, revision: &str) -> Option<PathBuf> {
        let commit = std::fs::read_to_string(self.dir.join("refs").join(revision));
        let commit = commit.as_deref().map_or(revision, str::trim);
        let is_plain = !commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let snapshot = self.dir.join("snapshots").join(commit);
        (is_plain && snapshot.is_dir()).then_some(snapshot)
    }
}

/// The files without which a model cannot be served and that `snapshot` lacks.
fn missing_files(snapshot: &Path) -> Result<Vec<String>, ModelError> {
    // A drafting head has the tokens of its target.
    let is_needed = |file: &str| file != TOKENIZER_FILE || !Head::is_in(snapshot);
    let mut missing: Vec<String> = [CONFIG_FILE, TOKENIZER_FILE]
        .into_iter()
        .filter(|file| !snapshot.join(file).exists() && is_needed(file))
        .map(str::to_owned)
        .collect();
    let index = snapshot.join(INDEX_FILE);
    if !snapshot.join(SINGLE_FILE).exists() {
        if index.exists() {
            let mut shards: Vec<String> = read_index(&index)?.into_values().collect();
            shards.sort_unstable();
            shards.dedup();
            missing.extend(shards.into_iter().filter(|shard| !snapshot.join(shard).exists()));
        } else {
            missing.push(SINGLE_FILE.to_owned());
        }
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(variables: &[(&str, &str)]) -> HubOptions {
        let lookup =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        HubOptions::from_variables(lookup, Some(PathBuf::from("/home/nobody-at-all")))
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_keeps_it() {
        let dir = |variables: &[(&str, &str)]| options(variables).cache_dir;
        assert_eq!(dir(&[]), Path::new("/home/nobody-at-all/.cache/huggingface/hub"));
        assert_eq!(dir(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(dir(&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/h/hub"));
        assert_eq!(dir(&[("HF_HOME", "~/h")]), Path::new("/home/nobody-at-all/h/hub"));
        assert_eq!(dir(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HOME", "/h")]), Path::new("/old"));
        assert_eq!(dir(&[("HF_HUB_CACHE", "/new"), ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/new"));
        assert_eq!(dir(&[("HF_HUB_CACHE", ""), ("HF_HOME", "/h")]), Path::new("/h/hub"));
    }

    #[test]
    fn endpoint_token_and_offline_come_from_the_environment() {
        let plain = options(&[]);
        assert_eq!((plain.endpoint.as_str(), plain.token, plain.offline), (DEFAULT_ENDPOINT, None, false));
        let set = options(&[
            ("HF_ENDPOINT", "http://mirror:8080/"),
            ("HF_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "yes"),
        ]);
        assert_eq!(set.endpoint, "http://mirror:8080");
        assert_eq!((set.token.as_deref(), set.offline), (Some("secret"), true));
        assert!(!options(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn the_token_file_is_read() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "from-file\n").unwrap();
        let set = options(&[("HF_HOME", home.path().to_str().unwrap())]);
        assert_eq!(set.token.as_deref(), Some("from-file"));
    }

    #[test]
    fn hub_ids_cannot_leave_the_cache() {
        let id = HubId::parse("Qwen/Qwen2.5-Coder-7B@refs/pr/3").unwrap();
        assert_eq!((id.repo.as_str(), id.revision.as_str()), ("Qwen/Qwen2.5-Coder-7B", "refs/pr/3"));
        assert_eq!(id.folder_name(), "models--Qwen--Qwen2.5-Coder-7B");
        assert_eq!(HubId::parse("a/b").unwrap().revision, "main");
        for bad in
            ["a", "", "../b", "a/..", "a/b/c", "a/b@", "a/b@../../x", "a/b@/etc", "a b/c", "./a/b", "/a/b"]
        {
            assert_eq!(HubId::parse(bad), None, "{bad}");
        }
    }
}
