//! Grammars by themselves, over the demo's vocabulary: what they take and refuse, going back, hostile texts,
//! the cache, and what all that costs.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use serde_json::{Map, Value, json};
use tandem_engine::{Constraint, Ending, TokenMask};
use tandem_models::Tokenizer;

use tandem::text::grammar::{Format, Grammars, Lead, Token, answer_text, grammar_text};

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/target");
    Arc::new(Tokenizer::from_dir(&folder).expect("the demo's tokenizer loads"))
});

pub(crate) static GRAMMARS: LazyLock<Arc<Grammars>> =
    LazyLock::new(|| Arc::new(Grammars::new(TOKENIZER.clone(), &[])));

fn mask_of(constraint: &mut dyn Constraint) -> TokenMask {
    let mut mask = TokenMask::new(TOKENIZER.vocab_size());
    constraint.mask(&mut mask).expect("a mask");
    mask
}

/// Follows a text by the longest tokens allowed; what is left of it, and whether it may end there.
fn follow(text: &str, answer: &str) -> (String, Ending) {
    let grammar = GRAMMARS.compile(text).unwrap_or_else(|error| panic!("{error} in {text}"));
    let mut constraint = grammar.start();
    let mut rest = answer.as_bytes();
    while !rest.is_empty() && constraint.ending().expect("it can be followed") != Ending::Forced {
        let mask = mask_of(&mut *constraint);
        let fits = |id: &u32| {
            let bytes = TOKENIZER.token_bytes(*id);
            !bytes.is_empty() && rest.starts_with(&bytes)
        };
        let Some(best) = mask.iter().filter(fits).max_by_key(|&id| TOKENIZER.token_bytes(id).len()) else {
            break;
        };
        constraint.advance(best).expect("the mask allowed it");
        rest = &rest[TOKENIZER.token_bytes(best).len()..];
    }
    let rest = String::from_utf8_lossy(rest).into_owned();
    (rest, constraint.ending().expect("it can be followed"))
}

#[track_caller]
pub(crate) fn takes(text: &str, answer: &str) {
    let (rest, ending) = follow(text, answer);
    assert!(
        rest.is_empty() && ending != Ending::Forbidden,
        "{rest:?} of {answer:?} is left, {ending:?}\n{text}"
    );
}

#[track_caller]
pub(crate) fn refuses(text: &str, answer: &str) {
    let (rest, ending) = follow(text, answer);
    assert!(!rest.is_empty() || ending == Ending::Forbidden, "{answer:?} is taken by {text}");
}

pub(crate) fn schema(value: Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

fn plain(format: &Format) -> String {
    answer_text(format).expect("it can be written")
}

#[test]
fn each_kind_of_format_takes_what_it_should() {
    let json = plain(&Format::Json(schema(json!({
        "type": "object", "properties": { "a": { "type": "integer" }, "b": { "enum": ["x", "y\n"] } },
        "required": ["a"], "additionalProperties": false,
    }))));
    takes(&json, "{\"a\": 12, \"b\": \"x\"}");
    takes(&json, "{\n  \"a\":1\n}");
    refuses(&json, "{\"b\": \"x\"}");
    refuses(&json, "{\"a\": \"1\"}");
    refuses(&json, "{\"a\":  1}");
    refuses(&json, " {\"a\": 1}");
    takes(&plain(&Format::any_object()), "{\"k\": [1, {\"z\": null}], \"ü\": \"\\u001f\"}");
    refuses(&plain(&Format::any_object()), "[]");
    // Recursion has no bound of its own, so it is here and not among the schemas whose answers must end.
    let tree = json!({ "type": "object", "properties": { "of": { "type": "array", "items": { "$ref": "#" } } },
        "additionalProperties": false });
    let tree = plain(&Format::Json(schema(tree)));
    takes(&tree, "{\"of\": [{}, {\"of\": [{\"of\": []}]}]}");
    refuses(&tree, "{\"of\": [1]}");
    let regex = plain(&Format::Regex("^a/b[0-9]+\\$$".to_owned()));
    takes(&regex, "a/b07$");
    refuses(&regex, "a/b");
    let choice = plain(&Format::Choice(vec!["yes".to_owned(), "no \"\\ \u{7f}".to_owned()]));
    takes(&choice, "yes");
    takes(&choice, "no \"\\ \u{7f}");
    refuses(&choice, "yesno");
    let lark = plain(&Format::grammar("start: \"(\" start \")\" | \"x\"").expect("Lark"));
    takes(&lark, "((x))");
    refuses(&lark, "((x)");
    assert!(answer_text(&Format::Regex("a\\".to_owned())).is_err());
}

#[test]
fn gbnf_is_translated() {
    let of = |text: &str| plain(&Format::grammar(text).unwrap_or_else(|error| panic!("{error}")));
    let sums = of("root ::= sum # an expression\nsum ::= term ([-+] term)*\n\
        term ::= number | \"(\" space sum space \")\"\nnumber ::= [0-9]{1,3} (\".\" [0-9]+)?\nspace ::= \" \"?\n");
    takes(&sums, "12+(3.25-( 4 ))");
    refuses(&sums, "1234");
    refuses(&sums, "(1");
    let data = of("root ::=\n  list\nvalue ::= list | word | (\"true\" | \"false\") ws\n\
        list ::= \"[\" ws (value (\",\" ws value)*)? \"]\" ws\n\
        word ::= \"\\\"\" ([^\"\\\\\\n] | \"\\\\\" [\"\\\\nu])* \"\\\"\" ws\nws ::= | \" \" | \"\\n\" [ \\t]{0,20}\n");
    takes(&data, "[\"a b\", [true,\n  \"\\n\"], []]");
    refuses(&data, "[true,]");
    refuses(&data, "{}");
    let letters = of("root ::= [a-cx\\x41\\u00e4-\\u00f6^\\]]+ .");
    takes(&letters, "abcxAäö^]/");
    refuses(&letters, "dd");
    for (text, word) in [
        ("rule ::= \"x\"", "root"),
        ("root ::= missing", "missing"),
        ("root ::= \"x", "line 1"),
        ("root ::= \"a\"\nroot ::= \"b\"", "twice"),
        ("root ::= [z-a]", "range"),
        ("root ::= (\"a\"", "\")\""),
        ("root ::= \"a\"{3,1}", "{m,n}"),
        ("root ::= \"a\" ::=", "line 1"),
    ] {
        let error = Format::grammar(text).expect_err(text).to_string();
        assert!(error.contains(word), "{error}");
    }
    // Neither groups in groups nor repetitions of repetitions go deeper than a stack.
    for text in ["(", "\"a\"**", "\"a\"{1}"] {
        let (first, again) = text.split_at(text.len() - if text.ends_with('}') { 3 } else { 1 });
        let text = format!("root ::= {first}{}", again.repeat(100_000));
        assert!(Format::grammar(&text).is_err());
    }
    takes(&of("root ::= \"a\"{2}? \"b\""), "b");
}

#[test]
fn text_never_holds_a_control_token() {
    let grammar = GRAMMARS.compile("start: /(?s:.*)/").expect("it compiles");
    let mut constraint = grammar.start();
    let mask = mask_of(&mut *constraint);
    let all = 0..TOKENIZER.vocab_size() as u32;
    let control: Vec<u32> = all.filter(|&id| TOKENIZER.is_special(id)).collect();
    assert!(!control.is_empty() && control.iter().all(|&id| !mask.allows(id)));
    assert!(mask.iter().count() > TOKENIZER.vocab_size() / 2);
    assert_eq!(constraint.ending(), Ok(Ending::Allowed));
}

fn lead(has_begun: bool) -> Lead {
    let token = |text: &str| Token { id: None, text: text.to_owned() };
    Lead::Reasoning { open: token("<think>"), close: token("</think>"), has_begun }
}

#[test]
fn a_format_begins_after_the_reasoning() {
    let yes = Format::Choice(vec!["yes".to_owned()]);
    let text = grammar_text(Some(&lead(true)), Some(&yes), None).expect("it can be written");
    takes(&text, "Is it < 3? {\"no\"}\n</think>\n\nyes");
    takes(&text, "</think>yes");
    refuses(&text, "yes");
    refuses(&text, "a</think>no");
    refuses(&text, "a</think></think>yes");
    let text = grammar_text(Some(&lead(false)), Some(&yes), None).expect("it can be written");
    takes(&text, "<think>\nhm\n</think>\n\nyes");
    takes(&text, "yes");
    refuses(&text, "hm</think>yes");
    // A control token of its own: here another of the demo's.
    let id = TOKENIZER.token_to_id("<|fim_pad|>").expect("a control token");
    let close = Token { id: Some(id), text: "<|fim_pad|>".to_owned() };
    let Lead::Reasoning { open, .. } = lead(true) else { unreachable!() };
    let lead = Lead::Reasoning { open, close, has_begun: true };
    let text = grammar_text(Some(&lead), Some(&yes), None).expect("it can be written");
    let mut constraint = GRAMMARS.compile(&text).expect("it compiles").start();
    let word = TOKENIZER.encode_text("hm", false).expect("text")[0];
    constraint.advance(word).expect("reasoning");
    assert!(mask_of(&mut *constraint).allows(id));
    constraint.advance(id).expect("the end of it");
    assert_eq!(constraint.ending(), Ok(Ending::Forbidden));
    assert!(!mask_of(&mut *constraint).allows(word));
}

#[test]
fn going_back_leaves_what_was() {
    let text = plain(&Format::Json(schema(json!({
        "type": "object", "properties": { "name": { "type": "string" }, "size": { "type": "number" } },
        "required": ["name", "size"],
    }))));
    let grammar = GRAMMARS.compile(&text).expect("it compiles");
    let mut walker = grammar.start();
    let mut tokens = Vec::new();
    let mut masks = vec![mask_of(&mut *walker)];
    let mut random = 12345u64;
    for _ in 0..60 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if walker.ending().expect("it can be followed") == Ending::Forced {
            break;
        }
        let allowed: Vec<u32> = masks[tokens.len()].iter().collect();
        let token = allowed[(random >> 33) as usize % allowed.len()];
        walker.advance(token).expect("allowed");
        tokens.push(token);
        if walker.ending().expect("it can be followed") == Ending::Forced {
            masks.push(TokenMask::new(TOKENIZER.vocab_size()));
            continue;
        }
        masks.push(mask_of(&mut *walker));
        let back = (random >> 20) as usize % 5;
        if back < tokens.len() {
            walker.rollback(back).expect("it can go back");
            tokens.truncate(tokens.len() - back);
            masks.truncate(tokens.len() + 1);
            assert_eq!(mask_of(&mut *walker), masks[tokens.len()], "{back} tokens back");
        }
    }
    walker.reset();
    for (token, mask) in tokens.iter().zip(&masks) {
        assert_eq!(mask_of(&mut *walker), *mask);
        walker.advance(*token).expect("allowed");
    }
}

/// What could take time or memory without bound is refused, or compiled within llguidance's fuel; a
/// process that overflows its stack or never comes back fails this test.
#[test]
fn hostile_texts_are_bounded() {
    let chain: String = (0..12_000).map(|i| format!("a{i}: a{} \"x\"\n", i + 1)).collect();
    let text_of = |value: Value| plain(&Format::Json(schema(value)));
    let wide: Vec<Value> =
        (0..2_000).map(|i| json!({ "properties": { format!("p{i}"): { "const": i } } })).collect();
    let cross: Vec<Value> =
        (0..14).map(|i| json!({ "anyOf": [{ "multipleOf": i + 2 }, { "minimum": i }] })).collect();
    let mut nested = json!({ "type": "integer" });
    for _ in 0..60 {
        nested = json!({ "type": "array", "items": nested });
    }
    let refused = [
        ("brackets", format!("start: {}\"x\"{}", "(".repeat(100_000), ")".repeat(100_000))),
        ("size", format!("start: \"{}\"", "x".repeat(1 << 20))),
        ("a reference out", text_of(json!({ "$ref": "http://127.0.0.1:1/schema.json" }))),
        ("a missing reference", text_of(json!({ "$ref": "#/$defs/none" }))),
        ("an unknown keyword", text_of(json!({ "type": "object", "unevaluatedProperties": false }))),
        ("a look-ahead", plain(&Format::Regex("(?=a)b".to_owned()))),
        ("no start", "rule: \"x\"".to_owned()),
        ("nothing fits", text_of(json!({ "allOf": [{ "type": "string" }, { "type": "integer" }] }))),
    ];
    for (what, text) in refused {
        let error = GRAMMARS.compile(&text).expect_err(what);
        assert!(error.to_string().len() < 3_000, "{what}: {error}");
    }
    // Whether these are within the limits is llguidance's affair; that they end is ours.
    for text in [
        format!("start: a0\n{chain}a12000: \"y\"\n"),
        format!("start: T\nT: {}/a/\n", "~".repeat(50_000)),
        text_of(json!({ "anyOf": wide })),
        text_of(json!({ "allOf": cross })),
        text_of(nested),
        plain(&Format::Regex("((a{1,1000}){1,1000}){1,1000}b".to_owned())),
        plain(&Format::Regex("(x+x+)+y".repeat(50))),
        plain(&Format::Regex(format!("a{}", "*".repeat(100_000)))),
        format!("start: \"a\"{}", "?".repeat(100_000)),
        format!("start: {}\"a\"", "-".repeat(100_000)),
        format!("start: T\nT: \"a\"{}", " & /a/".repeat(20_000)),
        format!("start: \"a\"{}", " \"a\"".repeat(40_000)),
        format!("start: \"a\"{}", " | \"a\"".repeat(40_000)),
        plain(&Format::Regex("[a-z]{0,5000}[0-9]{0,5000}".to_owned())),
        plain(&Format::Regex("(.*a.{30}){4}".to_owned())),
        plain(&Format::Choice((0..4_000).map(|i| format!("choice number {i}")).collect())),
        "start: start start | \"a\" | \"\"".to_owned(),
    ] {
        if let Ok(grammar) = GRAMMARS.compile(&text) {
            let mut constraint = grammar.start();
            for _ in 0..20 {
                let mut mask = TokenMask::new(TOKENIZER.vocab_size());
                if constraint.mask(&mut mask).is_err() || constraint.ending() == Ok(Ending::Forced) {
                    break;
                }
                let Some(token) = mask.iter().next() else { break };
                if constraint.advance(token).is_err() {
                    break;
                }
            }
        }
    }
}

#[test]
fn a_text_is_compiled_once_and_the_oldest_make_room() {
    let text = "start: \"compiled once\"";
    let first = GRAMMARS.compile(text).expect("it compiles");
    assert!(Arc::ptr_eq(&first, &GRAMMARS.compile(text).expect("it compiles")));
    assert!(GRAMMARS.known(text).is_some_and(|known| Arc::ptr_eq(&first, &known)));
    let room = 3 * first.size_bytes() + first.size_bytes() / 2;
    let grammars = Arc::new(Grammars::with_cache_bytes(TOKENIZER.clone(), &[], room));
    let text = |name: &str| format!("start: \"compiled {name}\"");
    for name in ["aaaa", "bbbb", "cccc"] {
        grammars.compile(&text(name)).expect("it compiles");
    }
    assert!(grammars.known(&text("aaaa")).is_some());
    grammars.compile(&text("dddd")).expect("it compiles");
    assert!(grammars.known(&text("bbbb")).is_none() && grammars.known(&text("aaaa")).is_some());
    let tiny = Arc::new(Grammars::with_cache_bytes(TOKENIZER.clone(), &[], 1));
    tiny.compile(text("aaaa").as_str()).expect("it compiles");
    assert!(tiny.known(&text("aaaa")).is_none());
}

/// Prints what trie, compiling, starting and masks cost with a large vocabulary: `TANDEM_VOCABULARY` names a
/// folder or a GGUF file with a tokenizer.
#[test]
#[ignore = "measures, and needs a vocabulary"]
fn costs() {
    let path = std::env::var("TANDEM_VOCABULARY").expect("TANDEM_VOCABULARY is set");
    let tokenizer = Arc::new(Tokenizer::from_dir(Path::new(&path)).expect("the tokenizer loads"));
    let grammars = Arc::new(Grammars::new(tokenizer.clone(), &[]));
    let start = std::time::Instant::now();
    grammars.compile("start: \"a\"").expect("it compiles");
    println!("{} tokens: trie and first grammar {:?}", tokenizer.vocab_size(), start.elapsed());
    let text = include_str!("schemas.json");
    let schemas: Value = serde_json::from_str(text).expect("the schemas are JSON");
    let (mut compiling, mut starting, mut masks) = (Vec::new(), Vec::new(), Vec::new());
    for entry in schemas.as_array().expect("a list") {
        let text = plain(&Format::Json(schema(entry["schema"].clone())));
        let start = std::time::Instant::now();
        let grammar = grammars.compile(&text).expect("it compiles");
        compiling.push(start.elapsed());
        let start = std::time::Instant::now();
        let mut constraint = grammar.start();
        starting.push(start.elapsed());
        let mut random = 1u64;
        for _ in 0..200 {
            let mut mask = TokenMask::new(tokenizer.vocab_size());
            let start = std::time::Instant::now();
            if constraint.ending().expect("it can be followed") == Ending::Forced {
                break;
            }
            constraint.mask(&mut mask).expect("a mask");
            masks.push(start.elapsed());
            let allowed: Vec<u32> = mask.iter().collect();
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            constraint.advance(allowed[(random >> 33) as usize % allowed.len()]).expect("allowed");
        }
    }
    for (what, mut times) in [("compiling", compiling), ("starting", starting), ("a mask", masks)] {
        times.sort_unstable();
        let at = |share: usize| times[(times.len() - 1) * share / 100];
        let mean = times.iter().sum::<std::time::Duration>() / times.len() as u32;
        println!(
            "{what}: {} times, mean {mean:?}, median {:?}, 99 % {:?}, most {:?}",
            times.len(),
            at(50),
            at(99),
            at(100)
        );
    }
}
