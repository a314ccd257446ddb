//! What the `tokenizers` crate takes for granted of a `tokenizer.json`: it indexes by these, and panics later.
//! Found by `examples/fuzz`.

use serde_json::Value;

/// Fails if `json` breaks what the crate trusts: merges that are longer than any token or lack the prefix that
/// is cut off them, and templates that name tokens or texts which are not there.
pub(super) fn check(json: &Value) -> Result<(), String> {
    check_merges(&json["model"])?;
    check_template(&json["post_processor"])
}

fn check_merges(model: &Value) -> Result<(), String> {
    let Some(merges) = model["merges"].as_array() else { return Ok(()) };
    let longest = model["vocab"].as_object().into_iter().flatten().map(|(token, _)| token.len()).max();
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    for merge in merges {
        let (left, right) = match merge {
            Value::String(text) => text.split_once(' ').unwrap_or((text, "")),
            pair => (pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default()),
        };
        let Some(rest) = right.strip_prefix(prefix) else {
            return Err(format!("the merge of {left:?} and {right:?} lacks the prefix {prefix:?}"));
        };
        // The crate copies both before it looks the whole up.
        if left.len() + rest.len() > longest.unwrap_or(0) {
            return Err(format!("the merge of {left:?} and {right:?} is longer than any token"));
        }
    }
    Ok(())
}

fn check_template(processor: &Value) -> Result<(), String> {
    for step in processor["processors"].as_array().into_iter().flatten() {
        check_template(step)?;
    }
    for (part, texts) in [("single", &["A"][..]), ("pair", &["A", "B"])] {
        for piece in processor[part].as_array().into_iter().flatten() {
            let token = piece["SpecialToken"]["id"].as_str();
            if let Some(token) = token.filter(|token| processor["special_tokens"].get(token).is_none()) {
                return Err(format!(
                    "the template of `{part}` names the token {token:?}, which is not there"
                ));
            }
            let text = piece["Sequence"]["id"].as_str();
            if let Some(text) = text.filter(|text| !texts.contains(text)) {
                return Err(format!("the template of `{part}` names the text {text:?}; wanted {texts:?}"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_crate_would_panic_at_is_an_error() {
        let good = json!({
            "model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"], "a b"]},
            "post_processor": {"processors": [{"single": [{"SpecialToken": {"id": "a"}}, {"Sequence": {"id": "A"}}],
                "pair": [{"Sequence": {"id": "B"}}], "special_tokens": {"a": {}}}]},
        });
        assert_eq!(check(&good), Ok(()));
        for (pointer, value, wanted) in [
            ("/model/merges/0", json!(["ab", "b"]), "longer than any token"),
            ("/model/continuing_subword_prefix", json!("##"), "lacks the prefix"),
            ("/post_processor/processors/0/special_tokens", json!({"b": {}}), "which is not there"),
            ("/post_processor/processors/0/single/1/Sequence/id", json!("B"), "wanted [\"A\"]"),
        ] {
            let mut bad = good.clone();
            if pointer.ends_with("prefix") {
                bad["model"]["continuing_subword_prefix"] = value;
            } else {
                *bad.pointer_mut(pointer).unwrap() = value;
            }
            let error = check(&bad).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
