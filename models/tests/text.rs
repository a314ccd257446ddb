//! Tokenizer, incremental detokenizer and fill-in-the-middle prompts, on tokenizers made here.

use std::sync::Arc;

use proptest::prelude::*;
use tandem_models::{Detokenizer, FimContext, FimFile, FimTokens, Tokenizer};

mod checkpoint_support;
use checkpoint_support::{byte_fallback_tokenizer, byte_level_tokenizer};

const SPECIAL: [&str; 5] =
    ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|im_start|>"];

fn load(json: &str) -> Arc<Tokenizer> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json).unwrap();
    Arc::new(Tokenizer::from_dir(dir.path()).unwrap())
}

/// A decoder of another kind: WordPiece joins its neighbours.
fn word_piece() -> Arc<Tokenizer> {
    let vocab: serde_json::Map<String, serde_json::Value> =
        ["[UNK]", "un", "##aff", "##able", "wel", "##come", ",", "'", "s"]
            .iter()
            .enumerate()
            .map(|(id, token)| ((*token).to_owned(), id.into()))
            .collect();
    let json = serde_json::json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    });
    load(&json.to_string())
}

fn stream(mut detokenizer: Detokenizer, ids: &[u32]) -> String {
    let mut text = String::new();
    for &id in ids {
        let piece = detokenizer.push(id).unwrap();
        assert_ne!(piece.as_deref(), Some(""), "an empty piece is None");
        text.extend(piece);
    }
    text.extend(detokenizer.flush());
    text
}

#[test]
fn text_survives_encoding_and_decoding() {
    let tokenizer = load(&byte_level_tokenizer(&SPECIAL));
    for text in ["", "def add(a, b):\n    return a + b\n", "größer 漢字 😀\u{0}\u{7f}"] {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
        assert_eq!(bytes, text.as_bytes());
    }
    assert_eq!(tokenizer.vocab_size(), 300);
    assert_eq!(tokenizer.token_to_id("<|endoftext|>"), Some(0));
    assert_eq!(tokenizer.id_to_token(300), None);
    assert_eq!(tokenizer.token_bytes(300), b"");
    assert_eq!(tokenizer.decode(&[300, 4_000_000_000], false).unwrap(), "");
}

#[test]
fn user_text_cannot_become_control_tokens() {
    let tokenizer = load(&byte_level_tokenizer(&SPECIAL));
    let text = "a<|endoftext|>b";
    let parsed = tokenizer.encode(text, false).unwrap();
    assert!(parsed.contains(&0));
    assert!(tokenizer.is_special(0));
    let plain = tokenizer.encode_text(text, false).unwrap();
    assert!(plain.iter().all(|&id| !tokenizer.is_special(id)), "{plain:?}");
    assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
    assert_eq!(tokenizer.decode(&parsed, true).unwrap(), "ab");
    let harmless = "the theory of <b>";
    assert_eq!(tokenizer.encode_text(harmless, true).unwrap(), tokenizer.encode(harmless, true).unwrap());
}

/// The byte-fallback decoding is ours: for text it must be the crate's.
#[test]
fn byte_fallback_text_survives_too() {
    let json = byte_fallback_tokenizer();
    let (ours, crates) = (load(&json), tokenizers::Tokenizer::from_bytes(&json).unwrap());
    for text in ["", "ab a", "  ab\n\té漢字 😀", "x <0x41> ▁"] {
        let ids = ours.encode(text, true).unwrap();
        assert_eq!(ours.decode(&ids, false).unwrap(), crates.decode(&ids, false).unwrap(), "{text:?}");
    }
    let ids = [1, 2, ours.token_to_id("▁ab").unwrap(), 2];
    for skip_special in [false, true] {
        assert_eq!(ours.decode(&ids, skip_special).unwrap(), crates.decode(&ids, skip_special).unwrap());
    }
}

#[test]
fn a_truncating_tokenizer_file_does_not_cut_prompts() {
    assert_eq!(word_piece().encode("unaffable welcome", true).unwrap().len(), 5);
}

#[test]
fn a_newline_of_byte_fallback_is_not_held_back() {
    let tokenizer = load(&byte_fallback_tokenizer());
    let newline = tokenizer.token_to_id("<0x0A>").unwrap();
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), true);
    assert_eq!(detokenizer.push(newline).unwrap().as_deref(), Some("\n"));
    assert_eq!(tokenizer.token_bytes(newline), b"\n");
    assert_eq!(tokenizer.token_bytes(tokenizer.token_to_id("▁a").unwrap()), b" a");
}

#[test]
fn a_continuation_keeps_the_leading_space_that_a_text_of_its_own_loses() {
    let tokenizer = load(&byte_fallback_tokenizer());
    let ids = tokenizer.encode("ab a", false).unwrap();
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "ab a");
    let (prompt, rest) = ids.split_at(1);
    assert_eq!(stream(Detokenizer::new(Arc::clone(&tokenizer), true), rest), "a");
    assert_eq!(stream(Detokenizer::continuing(Arc::clone(&tokenizer), prompt, true), rest), " a");
    let words = word_piece();
    let ids = words.encode("unaffable welcome", false).unwrap();
    let (prompt, rest) = ids.split_at(3);
    assert_eq!(stream(Detokenizer::continuing(Arc::clone(&words), prompt, true), rest), " welcome");
}

#[test]
fn fim_tokens_are_found_by_their_usual_spellings() {
    let detect = |special: &[&str]| FimTokens::detect(&load(&byte_level_tokenizer(special)));
    assert_eq!(detect(&["<|endoftext|>"]), None);
    assert_eq!(detect(&["<|fim_prefix|>", "<|fim_suffix|>"]), None);
    let qwen = detect(&SPECIAL).unwrap();
    assert_eq!(qwen.psm("P", "S").unwrap(), "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>");
    assert_eq!(qwen.spm("P", "S").unwrap(), "<|fim_prefix|><|fim_suffix|>S<|fim_middle|>P");
    let star_coder = detect(&["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]).unwrap();
    assert_eq!(star_coder.psm("P", "S").unwrap(), "<fim_prefix>P<fim_suffix>S<fim_middle>");
    let code_llama = detect(&["▁<PRE>", "▁<SUF>", "▁<MID>"]).unwrap();
    assert_eq!(code_llama.psm("P", "S").unwrap(), "▁<PRE>P▁<SUF>S▁<MID>");
    let deep_seek = detect(&["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]).unwrap();
    assert_eq!(deep_seek.psm("P", "S").unwrap(), "<｜fim▁begin｜>P<｜fim▁hole｜>S<｜fim▁end｜>");
    assert_eq!(deep_seek.spm("P", "S"), None);
    let codestral = detect(&["[PREFIX]", "[SUFFIX]"]).unwrap();
    assert_eq!(codestral.spm("P", "S").unwrap(), "[SUFFIX]S[PREFIX]P");
    assert_eq!(codestral.psm("P", "S"), None);
    let seed = detect(&["<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>"]).unwrap();
    assert_eq!(seed.spm("P", "S").unwrap(), "<[fim-suffix]>S<[fim-prefix]>P<[fim-middle]>");
}

#[test]
fn fim_prompts_keep_control_strings_of_the_client_as_text() {
    let tokenizer = load(&byte_level_tokenizer(&SPECIAL));
    let fim = FimTokens::detect(&tokenizer).unwrap();
    let ids = fim.encode(&tokenizer, "x = '<|endoftext|>'", "end").unwrap();
    let special: Vec<u32> = ids.iter().copied().filter(|&id| tokenizer.is_special(id)).collect();
    let wanted =
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"].map(|t| tokenizer.token_to_id(t).unwrap());
    assert_eq!(special, wanted);
    let text = fim.psm("x = '<|endoftext|>'", "end").unwrap();
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
}

#[test]
fn a_gap_is_shown_with_as_much_context_as_fits() {
    let files = [FimFile { name: "a.rs", text: "AAAA" }, FimFile { name: "b.rs", text: "BB" }];
    let context = FimContext { files: &files, prefix: "PPPPPPPP", begun: "x", suffix: "SSSSSSSS" };
    let shown = |special: &[&str], most: usize| {
        let tokenizer = load(&byte_level_tokenizer(special));
        let fim = FimTokens::detect(&tokenizer).unwrap();
        let ids = fim.encode_context(&tokenizer, &context, most).unwrap();
        assert!(ids.len() <= most, "{} of {most}", ids.len());
        tokenizer.decode(&ids, false).unwrap().replace("<|", "<").replace("|>", ">")
    };
    let gap = "<fim_prefix>PPPPPPPP<fim_suffix>SSSSSSSS<fim_middle>x";
    let with_files: Vec<&str> = SPECIAL.into_iter().chain(["<|file_sep|>"]).collect();
    assert_eq!(
        shown(&with_files, 1000),
        format!("<file_sep>a.rs\nAAAA\n<file_sep>b.rs\nBB\n<file_sep>{gap}")
    );
    let in_repository: Vec<&str> = with_files.iter().copied().chain(["<|repo_name|>"]).collect();
    assert_eq!(
        shown(&in_repository, 1000),
        format!("<repo_name>project\n<file_sep>a.rs\nAAAA\n<file_sep>b.rs\nBB\n<file_sep>{gap}")
    );
    assert_eq!(shown(&in_repository, 20), gap);
    let bare = "\n\n--- snippet ---\n\n";
    assert_eq!(shown(&SPECIAL, 1000), format!("{bare}AAAA{bare}BB{gap}"));
    // One token a letter at most: no room for files, then none for the ends of the text.
    assert_eq!(shown(&with_files, 20), gap);
    for most in 4..20 {
        let text = shown(&with_files, most);
        assert!(text.ends_with("<fim_middle>x") && !text.contains("file_sep"), "{text}");
    }
}

#[test]
fn models_that_begin_with_the_suffix_get_it_first() {
    for (special, wanted) in [
        (&["[PREFIX]", "[SUFFIX]"][..], "[SUFFIX]S[PREFIX]P"),
        (
            &["<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>"],
            "<[fim-suffix]>S<[fim-prefix]>P<[fim-middle]>",
        ),
    ] {
        let tokenizer = load(&byte_level_tokenizer(special));
        let fim = FimTokens::detect(&tokenizer).unwrap();
        let ids = fim.encode(&tokenizer, "P", "S").unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), wanted);
        let context = FimContext { prefix: "P", begun: "x", suffix: "S", ..FimContext::default() };
        let ids = fim.encode_context(&tokenizer, &context, 100).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), format!("{wanted}x"));
        assert_eq!(fim.encode_context(&tokenizer, &context, 4).unwrap().len(), 4);
    }
}

#[test]
fn what_does_not_fit_before_a_gap_is_left_out_by_lines() {
    let tokenizer = load(&byte_level_tokenizer(&SPECIAL));
    let fim = FimTokens::detect(&tokenizer).unwrap();
    let lines: String = (0..60).map(|i| format!("line {i};\n")).collect();
    let context = FimContext { prefix: &lines, suffix: &lines, ..FimContext::default() };
    for most in [150, 200, 333] {
        let ids = fim.encode_context(&tokenizer, &context, most).unwrap();
        assert!(ids.len() <= most && ids.len() > most * 3 / 4, "{} of {most}", ids.len());
        let text = tokenizer.decode(&ids, false).unwrap();
        let (prefix, rest) = text["<|fim_prefix|>".len()..].split_once("<|fim_suffix|>").unwrap();
        let suffix = rest.strip_suffix("<|fim_middle|>").unwrap();
        assert!(prefix.starts_with("line ") && lines.ends_with(prefix), "{prefix}");
        assert!(suffix.ends_with(";\n") && lines.starts_with(suffix), "{suffix}");
    }
}

#[test]
fn a_model_states_its_fill_in_the_middle_order() {
    let dir = tempfile::tempdir().unwrap();
    let found = |special: &[&str], config: &str| {
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let tokenizer = load(&byte_level_tokenizer(special));
        FimTokens::from_dir(dir.path(), &tokenizer).map(|fim| (fim, tokenizer))
    };
    for (config, wanted) in [
        ("{}", "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>"),
        (r#"{"fim_order": "psm"}"#, "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>"),
        (r#"{"fim_order": "spm"}"#, "<|fim_prefix|><|fim_suffix|>S<|fim_middle|>P"),
    ] {
        let (fim, tokenizer) = found(&SPECIAL, config).unwrap();
        let fim = fim.unwrap();
        let ids = fim.encode(&tokenizer, "P", "S").unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), wanted);
        assert_eq!(fim.frame(&tokenizer, "S").unwrap().around(&tokenizer, "P").unwrap(), ids);
    }
    for config in [r#"{"fim_order": "msp"}"#, r#"{"fim_order": 1}"#, r#"{"fim_order": null}"#] {
        let Err(error) = found(&SPECIAL, config) else { panic!("{config} was taken") };
        let error = error.to_string();
        assert!(error.contains("tokenizer_config.json") && error.contains("fim_order"), "{error}");
        assert!(error.contains("\"psm\" or \"spm\""), "{error}");
    }
    let deep_seek = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"];
    let Err(error) = found(&deep_seek, r#"{"fim_order": "spm"}"#) else { panic!("it was taken") };
    assert!(error.to_string().contains("hole"), "{error}");
    assert_eq!(found(&["<|endoftext|>"], r#"{"fim_order": "spm"}"#).unwrap().0, None);
}

#[test]
fn a_missing_or_damaged_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("no such file"), "{error}");
    std::fs::write(dir.path().join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

proptest! {
    #[test]
    fn streamed_text_equals_decoded_text(
        ids in proptest::collection::vec(0..310u32, 0..60),
        skip_special in any::<bool>(),
    ) {
        thread_local! {
            static TOKENIZERS: [Arc<Tokenizer>; 3] =
                [load(&byte_level_tokenizer(&SPECIAL)), load(&byte_fallback_tokenizer()), word_piece()];
        }
        TOKENIZERS.with(|tokenizers| {
            for tokenizer in tokenizers {
                let whole = tokenizer.decode(&ids, skip_special).unwrap();
                let streamed = stream(Detokenizer::new(Arc::clone(tokenizer), skip_special), &ids);
                prop_assert_eq!(streamed, whole);
            }
            Ok(())
        })?;
    }
}
