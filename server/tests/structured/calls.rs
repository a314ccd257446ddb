//! Tool calls as grammars: each family's own way to write them, with arguments that their schemas allow.

use std::path::Path;

use serde_json::{Map, Value, json};
use tandem::text::answer::{DeepSeekCalls, Dialect, MistralCalls, ToolFormat};
use tandem::text::grammar::{
    CallFormat, Calling, Format, GrammarError, Lead, Piece, Tag, Tags, Token, ToolShape, answer_text,
    grammar_text,
};
use tandem_models::{ChatTemplate, Tokenizer};

use crate::grammar::{GRAMMARS, refuses, schema, takes};

fn calling(begun: Option<Option<usize>>, is_parallel: bool) -> Calling {
    let token = |text: &str| Token { id: None, text: text.to_owned() };
    let tool = |name: &str, parameters: Value, is_exact| ToolShape {
        name: name.to_owned(),
        parameters: schema(parameters),
        is_exact,
    };
    let format = CallFormat::Hermes { open: token("<tool_call>"), close: token("</tool_call>") };
    let point = json!({ "type": "object", "properties": { "x": { "type": "integer" } }, "required": ["x"],
        "additionalProperties": false });
    let tools = vec![
        tool("move", point, true),
        tool("stop", json!({ "type": "object", "properties": {} }), true),
        tool("say", json!({ "type": "object", "properties": { "text": { "type": "string" } } }), false),
    ];
    Calling { format, tools, begun, is_parallel }
}

const MOVE: &str = "<tool_call>\n{\"name\": \"move\", \"arguments\": {\"x\": 1}}\n</tool_call>";
const STOP: &str = "<tool_call>\n{\"name\": \"stop\", \"arguments\": {}}\n</tool_call>";

#[test]
fn tool_calls_have_arguments_that_their_schemas_allow() {
    let text = |calls: &Calling| grammar_text(None, None, Some(calls)).expect("it can be written");
    let free = text(&calling(None, true));
    takes(&free, "I would <not> call.");
    takes(&free, MOVE);
    takes(&free, &format!("First:\n{MOVE}\n{STOP}"));
    takes(&free, "<tool_call>\n{\"name\": \"say\", \"arguments\": {\"any\": [1]}}\n</tool_call>");
    refuses(&free, "<tool_call>\n{\"name\": \"move\", \"arguments\": {\"x\": \"1\"}}\n</tool_call>");
    refuses(&free, "<tool_call>\n{\"name\": \"go\", \"arguments\": {}}\n</tool_call>");
    refuses(&free, "<tool_call>\n{\"name\": \"stop\", \"arguments\": {\"x\": 1}}\n</tool_call>");
    refuses(&text(&calling(None, false)), &format!("{MOVE}\n{STOP}"));

    let any = text(&calling(Some(None), true));
    takes(&any, &MOVE["<tool_call>\n{\"name\": \"".len()..]);
    takes(&any, &format!("{}\n{STOP}", &MOVE["<tool_call>\n{\"name\": \"".len()..]));
    refuses(&any, "I would not");
    let named = text(&calling(Some(Some(0)), true));
    takes(&named, " {\"x\": 5}}\n</tool_call>");
    refuses(&named, " {\"y\": 5}}\n</tool_call>");

    let format = Format::Json(schema(json!({ "type": "integer" })));
    let both = grammar_text(None, Some(&format), Some(&calling(None, true))).expect("it can be written");
    takes(&both, "42");
    takes(&both, MOVE);
    refuses(&both, "hm");
}

#[test]
fn the_other_ways_to_call() {
    let token = |text: &str| Token { id: None, text: text.to_owned() };
    let text = |format: CallFormat, begun| {
        let calls = Calling { format, ..calling(begun, true) };
        grammar_text(None, None, Some(&calls)).expect("it can be written")
    };
    let granite = || CallFormat::List { open: token("<|tool_call|>") };
    takes(&text(granite(), None), "<|tool_call|>[{\"name\": \"stop\", \"arguments\": {}}]");
    takes(
        &text(granite(), Some(None)),
        "stop\", \"arguments\": {}}, {\"name\": \"stop\", \"arguments\": {}}]",
    );
    takes(&text(granite(), Some(Some(0))), " {\"x\": 5}}]");
    takes(&text(CallFormat::Llama, Some(None)), "move\", \"parameters\": {\"x\": 0}}");
    refuses(&text(CallFormat::Llama, Some(None)), "move\", \"parameters\": {}}");
    takes(&text(CallFormat::Llama, Some(Some(1))), " {}}");
    let harmony = || CallFormat::Harmony { constrain: token("<|constrain|>"), message: token("<|message|>") };
    takes(&text(harmony(), Some(None)), "move <|constrain|>json<|message|>{\"x\": 0}");
    takes(&text(harmony(), Some(Some(0))), "{\"x\": 0}");
    let channels = Lead::Channels {
        channel: token("<|channel|>"),
        message: token("<|message|>"),
        end: token("<|end|>"),
        start: token("<|start|>"),
    };
    let yes = Format::Choice(vec!["yes".to_owned()]);
    let text = grammar_text(Some(&channels), Some(&yes), None).expect("it can be written");
    takes(&text, "<|channel|>final<|message|>yes");
    takes(&text, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes");
    refuses(&text, "yes");
}

fn written(format: CallFormat, begun: Option<Option<usize>>) -> String {
    let calls = Calling { format, ..calling(begun, true) };
    grammar_text(None, None, Some(&calls)).expect("it can be written")
}

fn spelled(text: &str) -> Token {
    Token { id: None, text: text.to_owned() }
}

fn qwen_xml() -> CallFormat {
    CallFormat::QwenXml { open: spelled("<tool_call>"), close: spelled("</tool_call>") }
}

fn xml_call(name: &str, parameters: &[(&str, &str)]) -> String {
    let parameters: String =
        parameters.iter().map(|(key, value)| format!("<parameter={key}>\n{value}\n</parameter>\n")).collect();
    format!("<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
}

#[test]
fn calls_in_xml_are_what_their_schemas_say() {
    let free = written(qwen_xml(), None);
    takes(&free, "I would <not> call.");
    takes(&free, &xml_call("move", &[("x", "-12")]));
    takes(&free, &format!("Both:\n{}\n{}", xml_call("move", &[("x", "1")]), xml_call("stop", &[])));
    takes(&free, &xml_call("say", &[("any", "of\n<these>"), ("more", "[1]")]));
    refuses(&free, &xml_call("move", &[("x", "one")]));
    refuses(&free, &xml_call("move", &[]));
    refuses(&free, &xml_call("move", &[("x", "1"), ("x", "1")]));
    refuses(&free, &xml_call("stop", &[("x", "1")]));
    refuses(&free, &xml_call("go", &[]));
    let begun = |format, begun, call: &str, cut: &str| {
        let rest = call.strip_prefix(cut).expect("the prompt's part");
        takes(&written(format, begun), rest);
    };
    let call = xml_call("move", &[("x", "5")]);
    begun(qwen_xml(), Some(None), &call, "<tool_call>\n<function=");
    begun(qwen_xml(), Some(Some(0)), &call, "<tool_call>\n<function=move>\n");
}

/// What a schema says of strings is kept in bare text, and the text cannot be cut short by what it holds.
#[test]
fn bare_strings_in_xml() {
    let text = |value: Value, required: bool| {
        let parameters = json!({ "type": "object", "properties": { "s": value, "n": { "$ref": "#/$defs/n" } },
            "required": if required { vec!["s"] } else { vec![] }, "additionalProperties": false,
            "$defs": { "n": { "type": "array", "items": { "type": "string" } } } });
        let tool = ToolShape { name: "t".to_owned(), parameters: schema(parameters), is_exact: true };
        let calls = Calling { format: qwen_xml(), tools: vec![tool], begun: None, is_parallel: false };
        grammar_text(None, None, Some(&calls))
    };
    let is = |value: Value| text(value, true).expect("it can be written");
    let call = |value: &str| xml_call("t", &[("s", value)]);
    let any = is(json!({ "type": "string", "description": "whatever" }));
    for value in ["", "\n", "a\nb\n", "\\d \"q\" <parameter=s>", "</parameter", "é世界"] {
        takes(&any, &call(value));
    }
    takes(&any, &xml_call("t", &[("s", "x"), ("n", "[\"a\", \"</parameter>\"]")]));
    refuses(&any, &xml_call("t", &[("n", "[]"), ("s", "x")]));
    for value in ["a</parameter>b", "a\n</function>", "</parameter>"] {
        refuses(&any, &call(value));
    }
    takes(&text(json!({ "type": "string" }), false).expect("it can be written"), &xml_call("t", &[]));
    refuses(&any, &xml_call("t", &[]));
    let choice = is(json!({ "type": "string", "enum": ["a", "ab", "a\nb", 7] }));
    for value in ["a", "ab", "a\nb"] {
        takes(&choice, &call(value));
    }
    refuses(&choice, &call("b"));
    refuses(&choice, &call("7"));
    let short = is(json!({ "type": "string", "minLength": 2, "maxLength": 3 }));
    takes(&short, &call("é世\n"));
    refuses(&short, &call("a"));
    refuses(&short, &call("abcd"));
    let pattern = is(json!({ "type": "string", "pattern": "^[a-z]+\\$$", "maxLength": 5 }));
    takes(&pattern, &call("ab$"));
    refuses(&pattern, &call("ab"));
    refuses(&pattern, &call("abcde$"));
    let found = is(json!({ "type": "string", "pattern": "[0-9]" }));
    takes(&found, &call("a\n7 b"));
    refuses(&found, &call("ab"));
    for (value, word) in [
        (json!({ "type": "string", "format": "date" }), "`format`"),
        (json!({ "type": "string", "enum": ["</parameter>"] }), "</parameter>"),
        (json!({ "type": "string", "enum": [1] }), "`enum`"),
        (json!({ "type": "string", "pattern": "a\\" }), "escape"),
        (json!({ "$ref": "#/properties/n" }), "`$ref`"),
        (json!(false), "no object"),
    ] {
        let error = text(value.clone(), true).expect_err(&value.to_string()).to_string();
        assert!(error.contains(word), "{error}");
    }
    // As everywhere, what is not JSON is found when it is compiled.
    assert!(GRAMMARS.compile(&is(json!({ "type": "nothing" }))).is_err());
}

fn xml_of(parameters: Value) -> Result<String, GrammarError> {
    let tool = ToolShape { name: "t".to_owned(), parameters: schema(parameters), is_exact: true };
    let calls = Calling { format: qwen_xml(), tools: vec![tool], begun: None, is_parallel: false };
    grammar_text(None, None, Some(&calls))
}

/// Each value is a schema of its own, with the definitions that it leads to and no others.
#[test]
fn definitions_are_written_where_they_are_needed() {
    let mut definitions = schema(json!({
        "a": { "type": "array", "items": { "$ref": "#/$defs/b~1c" } },
        "b/c": { "oneOf": [{ "const": 1 }, { "$ref": "#/definitions/d" }] },
        "lost": { "$ref": "#/elsewhere", "description": "unused" },
    }));
    for i in 0..200 {
        definitions.insert(format!("unused {i}"), json!({ "description": "x".repeat(100) }));
    }
    let mut properties: Map<String, Value> =
        (0..15).map(|i| (format!("o{i}"), json!({ "type": "object" }))).collect();
    properties.insert("a".to_owned(), json!({ "$ref": "#/$defs/a" }));
    let text = xml_of(json!({ "type": "object", "properties": properties, "required": ["a"],
        "$defs": definitions, "definitions": { "d": { "const": "</parameter>" } } }));
    let text = text.expect("it can be written");
    assert!(text.len() < 20_000 && !text.contains("unused"), "{} bytes", text.len());
    takes(&text, &xml_call("t", &[("a", "[1, \"</parameter>\"]")]));
    refuses(&text, &xml_call("t", &[("a", "[2]")]));
    // Recursion, and a definition that is not there.
    let of = |value: Value| {
        xml_of(json!({ "type": "object", "properties": { "a": value }, "required": ["a"],
            "$defs": { "x": { "type": "array", "items": { "$ref": "#/$defs/x" } } } }))
        .expect("it can be written")
    };
    takes(&of(json!({ "$ref": "#/$defs/x" })), &xml_call("t", &[("a", "[[], [[]]]")]));
    assert!(GRAMMARS.compile(&of(json!({ "$ref": "#/$defs/z" }))).is_err());
}

/// What a small schema stands for, by copies of definitions above all, is refused before it is all written:
/// these would be gigabytes, or as many comparisons.
#[test]
fn parameters_that_would_be_huge_are_refused_at_once() {
    let big = "x".repeat(1 << 20);
    let refers: Map<String, Value> =
        (0..10_000).map(|i| (format!("p{i}"), json!({ "$ref": "#/$defs/big" }))).collect();
    let many: Map<String, Value> =
        (0..130_000).map(|i| (format!("p{i}"), json!({ "type": "string" }))).collect();
    let lost: Map<String, Value> =
        (0..20_000).map(|i| (format!("p{i}"), json!({ "$ref": format!("#/$defs/lost{i}") }))).collect();
    let all: Vec<&String> = many.keys().collect();
    for parameters in [
        json!({ "properties": refers, "$defs": { "big": { "const": big } } }),
        json!({ "properties": many, "required": all }),
        json!({ "properties": { "lost": { "properties": lost } }, "$defs": lost }),
    ] {
        let error = xml_of(parameters).expect_err("it is too large");
        assert!(matches!(&error, GrammarError::TooLarge(text) if text.len() < 200), "{error}");
    }
    // An alternative may be long, too.
    let alternatives = vec![json!({ "$ref": "#/$defs/big" }); 10_000];
    let long = json!({ "oneOf": alternatives, "$defs": { "big": { "const": "x".repeat(50_000) } } });
    let text = answer_text(&Format::Json(schema(long))).expect("it can be written");
    assert!(text.len() < 1 << 20, "{} bytes", text.len());
}

#[test]
fn names_that_nothing_quotes_are_plain() {
    for name in ["a>b", "a b", "", "a[ARGS]"] {
        let tool = ToolShape { name: name.to_owned(), parameters: schema(json!({})), is_exact: true };
        let calls = Calling { format: qwen_xml(), tools: vec![tool], begun: None, is_parallel: false };
        assert!(grammar_text(None, None, Some(&calls)).is_err(), "{name}");
    }
}

#[test]
fn mistrals_calls() {
    let list = || CallFormat::List { open: spelled("[TOOL_CALLS]") };
    let (a, b) =
        ("{\"name\": \"move\", \"arguments\": {\"x\": 1}}", "{\"name\": \"stop\", \"arguments\": {}}");
    let free = written(list(), None);
    takes(&free, &format!("[TOOL_CALLS][{a}, {b}]"));
    takes(&free, &format!("Look: [TOOL_CALLS] [{b}]"));
    refuses(&free, &format!("[TOOL_CALLS][{a}, {b}"));
    refuses(&free, "[TOOL_CALLS][{\"name\": \"move\", \"arguments\": {}}]");
    let named = |call_id: bool, mark: bool| CallFormat::Named {
        open: spelled("[TOOL_CALLS]"),
        call_id: call_id.then(|| spelled("[CALL_ID]")),
        arguments: mark.then(|| spelled("[ARGS]")),
    };
    let free = written(named(false, true), None);
    takes(&free, "I would not.");
    takes(&free, "[TOOL_CALLS]move[ARGS]{\"x\": 1}[TOOL_CALLS]stop[ARGS]{}");
    refuses(&free, "[TOOL_CALLS]move[ARGS]{\"y\": 1}");
    refuses(&free, "[TOOL_CALLS]go[ARGS]{}");
    takes(&written(named(false, true), Some(None)), "stop[ARGS]{}");
    takes(&written(named(false, true), Some(Some(0))), "{\"x\": 1}");
    takes(&written(named(false, false), None), "[TOOL_CALLS]move{\"x\": 1}");
    let with_id = written(named(true, true), None);
    takes(&with_id, "[TOOL_CALLS]stop[CALL_ID]abcDEF123[ARGS]{}");
    refuses(&with_id, "[TOOL_CALLS]stop[CALL_ID]abc[ARGS]{}");
    takes(&written(named(true, true), Some(Some(1))), "abcDEF123[ARGS]{}");
}

#[test]
fn deepseeks_calls() {
    let section = |is_fenced| CallFormat::Section {
        open: spelled("<calls>"),
        close: spelled("</calls>"),
        call: spelled("<call>"),
        call_end: spelled("</call>"),
        separator: spelled("<sep>"),
        is_fenced,
    };
    let bare = written(section(false), None);
    takes(&bare, "hm");
    takes(&bare, "First:<calls><call>move<sep>{\"x\": 1}</call><call>stop<sep>{}</call></calls>");
    refuses(&bare, "<calls><call>move<sep>{\"x\": 1}</call>");
    refuses(&bare, "<calls><call>move<sep>{}</call></calls>");
    takes(&written(section(false), Some(None)), "stop<sep>{}</call></calls>");
    takes(&written(section(false), Some(Some(0))), "{\"x\": 1}</call></calls>");
    let call =
        |name: &str, arguments: &str| format!("<call>function<sep>{name}\n```json\n{arguments}\n```</call>");
    let fenced = written(section(true), None);
    takes(&fenced, &format!("<calls>{}\n{}</calls>", call("move", "{\"x\": 1}"), call("stop", "{}")));
    refuses(&fenced, &format!("<calls>{}</calls>", call("stop", "{\"x\": 1}")));
    takes(&written(section(true), Some(None)), "stop\n```json\n{}\n```</call></calls>");
    takes(&written(section(true), Some(Some(0))), "{\"x\": 1}\n```</call></calls>");
}

/// The templates that models are published with show which way theirs calls.
#[test]
fn published_templates_show_how_their_models_call() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    let tokenizer = Tokenizer::from_dir(&folder.join("demo/target")).expect("the demo's tokenizer loads");
    let named = MistralCalls::Named { has_id: true, has_mark: true };
    for (file, wanted) in [
        ("Qwen-Qwen2.5-7B-Instruct", Some(ToolFormat::Hermes)),
        ("Qwen-Qwen3-0.6B", Some(ToolFormat::Hermes)),
        ("Qwen3-Coder", Some(ToolFormat::QwenXml)),
        ("mistralai-Mistral-Nemo-Instruct-2407", Some(ToolFormat::Mistral(MistralCalls::List))),
        ("Mistral-Small-3.2-24B-Instruct-2506", Some(ToolFormat::Mistral(named))),
        ("deepseek-ai-DeepSeek-V3.1", Some(ToolFormat::DeepSeek(DeepSeekCalls::Bare))),
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", Some(ToolFormat::DeepSeek(DeepSeekCalls::Fenced))),
        ("openai-gpt-oss-120b", Some(ToolFormat::Harmony)),
        ("microsoft-Phi-3.5-mini-instruct", None),
    ] {
        let path = folder.join(format!("tests/golden/templates/{file}.jinja"));
        let source = std::fs::read_to_string(&path).expect("the template is there");
        let template = ChatTemplate::from_source(&source, Some("<s>"), Some("</s>")).expect("it compiles");
        assert_eq!(Dialect::detect(Some(&template), &tokenizer).format(), wanted, "{file}");
    }
}

#[test]
fn tagged_pieces_of_a_text() {
    let text = |text: &str| vec![Piece::Text(text.to_owned())];
    let tag = |begin: &str, schema_of: Value, end: &str| Tag {
        begin: text(begin),
        schema: schema(schema_of),
        end: text(end),
    };
    let of = |triggers: &[&str], tags: Vec<Tag>| {
        let triggers = triggers.iter().map(|trigger| text(trigger)).collect();
        grammar_text(None, Some(&Format::Tags(Tags { triggers, tags })), None)
    };
    let tags = vec![
        tag("<function=a>\n", json!({ "type": "integer" }), "</function>"),
        tag("<function=b>\n", json!({ "type": "boolean" }), ""),
        tag("{{", json!({ "type": "string" }), "}}"),
    ];
    let grammar = of(&["<function=", "{{"], tags.clone()).expect("it can be written");
    takes(&grammar, "");
    takes(&grammar, "Only < text { here\n<func");
    takes(&grammar, "<function=a>\n12</function>");
    takes(&grammar, "One: <function=a>\n12</function> two: <function=b>\ntrue, three: {{\"x\"}}.\n");
    refuses(&grammar, "<function=c>\n12</function>");
    refuses(&grammar, "<function=a>\ntrue</function>");
    refuses(&grammar, "a {{ b");
    refuses(&grammar, "<function=a>\n12");
    assert!(of(&["<function="], tags).is_err(), "a tag without a trigger");
    assert!(of(&["x"], vec![]).is_err(), "no tags");
    // A trigger that begins with another: the shorter one is what comes first.
    for triggers in [["<function=", "<f"], ["<f", "<function="]] {
        let grammar = of(&triggers, vec![tag("<function=a>", json!({ "type": "integer" }), ";")]);
        let grammar = grammar.expect("it can be written");
        takes(&grammar, "x <function=a>12; y");
        refuses(&grammar, "x <f y");
    }
    let inside = of(&["x<fy", "<f"], vec![tag("x<fy", json!({}), "")]).expect_err("it can never be begun");
    assert!(inside.to_string().contains("\"<f\""), "{inside}");
    // Ordinary text is not forbidden for the sake of a token that follows it.
    let mark = vec![Piece::Text("\n".to_owned()), Piece::Token(5)];
    let after_text = Tag { begin: mark.clone(), schema: schema(json!({})), end: vec![] };
    let late = Tags { triggers: vec![mark], tags: vec![after_text] };
    let late = grammar_text(None, Some(&Format::Tags(late)), None).expect_err("it begins with text");
    assert!(late.to_string().contains("control token"), "{late}");
}
