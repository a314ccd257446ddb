//! What is done with a folder of which one file is hostile: all that a server does at its start.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, json};
use tandem_kernels::ThreadPool;
use tandem_models::weights::gguf::GgufFile;
use tandem_models::{BackendKind, ChatTemplate, Checkpoint, FimTokens, Tokenizer, load};

pub(crate) fn gguf(folder: &Path) -> bool {
    let path = folder.join("model.gguf");
    let Ok(file) = GgufFile::open(&path) else { return false };
    for key in file.keys() {
        let _ = format!("{:?}", file.get(key)).len();
    }
    for name in file.tensor_names() {
        if let Ok(Some(view)) = file.tensor(name) {
            assert_eq!(view.to_f32().len(), view.num_elements());
        }
    }
    drop(file);
    let texts = text(&path);
    checkpoint_at(&path) && texts
}

pub(crate) fn checkpoint(folder: &Path) -> bool {
    checkpoint_at(folder)
}

pub(crate) fn tokenizer(folder: &Path) -> bool {
    text(folder)
}

pub(crate) fn template(folder: &Path) -> bool {
    let Ok(source) = std::fs::read(folder.join("chat_template.jinja")) else { return false };
    let Ok(template) =
        ChatTemplate::from_source(&String::from_utf8_lossy(&source), Some("<s>"), Some("</s>"))
    else {
        return false;
    };
    let messages = json!([{"role": "system", "content": "S"}, {"role": "user", "content": "Über {{ x }} <|im_end|>"},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "1", "type": "function",
            "function": {"name": "f", "arguments": {"x": [1, null, 2.5]}}}]},
        {"role": "tool", "content": "r", "tool_call_id": "1"}, {"role": "user", "content": "b"}]);
    let tools = json!([{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
        "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}]);
    let plain = template.render(&messages, None, true, &Map::new()).is_ok();
    template.render(&messages, Some(&tools), false, &Map::new()).is_ok() || plain
}

/// Opens a model and loads its weights.
fn checkpoint_at(path: &Path) -> bool {
    let Ok(checkpoint) = Checkpoint::open(path) else { return false };
    // A pool of one has no workers, so that everything is counted on this thread.
    load(&checkpoint, BackendKind::Cpu, Arc::new(ThreadPool::new(1))).is_ok()
}

/// Reads a model's tokenizer and what hangs on it.
fn text(path: &Path) -> bool {
    let Ok(tokenizer) = Tokenizer::from_dir(path) else { return false };
    let _ = ChatTemplate::from_dir(path, &tokenizer).is_ok();
    let _ = FimTokens::from_dir(path, &tokenizer).is_ok();
    let Ok(ids) = tokenizer.encode("ab <|bos|> äb\n", true) else { return false };
    let _ = tokenizer.encode_text("ab a", false).is_ok();
    let _ = (tokenizer.decode(&ids, true), tokenizer.token_bytes(u32::MAX));
    true
}
