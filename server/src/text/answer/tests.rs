//! Every format over tables of answers: as a whole, cut in two at every place, letter by letter, and
//! broken off at every place.

use std::sync::Arc;

use serde_json::json;

use super::deepseek::DeepSeek;
use super::format::Format;
use super::harmony::Harmony;
use super::llama::Llama;
use super::reader::Tags;
use super::tagged::Tagged;
use super::xml::Xml;
use super::{AnswerEvent, AnswerMessage, AnswerReader, ToolCall, ToolSet};

const THINK: Option<Tags> = Some(("<think>", "</think>"));

fn tools() -> Arc<ToolSet> {
    let parameters = json!({ "type": "object", "properties": {
        "city": { "type": "string" }, "days": { "type": "integer" }, "code": { "type": "string" } } });
    let tool =
        |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": parameters } });
    Arc::new(ToolSet::new(&[tool("weather"), tool("now")]))
}

fn hermes() -> Option<Box<dyn Format>> {
    Some(Box::new(Tagged::new("<tool_call>", Some("</tool_call>"))))
}

fn mistral() -> Option<Box<dyn Format>> {
    Some(Box::new(Tagged::new("[TOOL_CALLS]", None)))
}

fn granite() -> Option<Box<dyn Format>> {
    Some(Box::new(Tagged::new("<|tool_call|>", None)))
}

fn llama() -> Option<Box<dyn Format>> {
    Some(Box::new(Llama::new()))
}

fn qwen_xml() -> Option<Box<dyn Format>> {
    Some(Box::new(Xml::new(tools())))
}

fn deepseek() -> Option<Box<dyn Format>> {
    Some(Box::new(DeepSeek::default()))
}

fn harmony() -> Option<Box<dyn Format>> {
    Some(Box::new(Harmony::new()))
}

fn none() -> Option<Box<dyn Format>> {
    None
}

type MakeFormat = fn() -> Option<Box<dyn Format>>;

/// Reads the pieces; also checks the order of a call's events.
fn read(format: MakeFormat, thinking: Option<Tags>, is_thinking: bool, pieces: &[&str]) -> AnswerMessage {
    let mut reader = AnswerReader::new(format(), Some(tools()), thinking, is_thinking);
    let mut events = Vec::new();
    for piece in pieces {
        reader.push(piece, &mut events);
    }
    reader.finish(&mut events);
    let mut message = AnswerMessage::default();
    let mut in_call = false;
    for event in events {
        match &event {
            AnswerEvent::CallStart { .. } => {
                assert!(!std::mem::replace(&mut in_call, true), "a call in a call")
            }
            AnswerEvent::CallArguments(_) => assert!(in_call, "arguments of no call"),
            AnswerEvent::CallEnd => assert!(std::mem::replace(&mut in_call, false), "the end of no call"),
            AnswerEvent::Text(_) | AnswerEvent::Reasoning(_) => assert!(!in_call, "text in a call"),
        }
        message.absorb(event);
    }
    assert!(!in_call, "a call without an end");
    message
}

fn expect(
    format: MakeFormat,
    thinking: Option<Tags>,
    is_thinking: bool,
    answer: &str,
    text: &str,
    reasoning: &str,
    calls: &[(&str, &str)],
) {
    let call = |(name, arguments): &(&str, &str)| ToolCall {
        id: None,
        name: (*name).to_owned(),
        arguments: (*arguments).to_owned(),
    };
    let wanted = AnswerMessage {
        text: text.to_owned(),
        reasoning: reasoning.to_owned(),
        calls: calls.iter().map(call).collect(),
    };
    assert_eq!(read(format, thinking, is_thinking, &[answer]), wanted, "{answer:?}");
    let places: Vec<usize> = (0..=answer.len()).filter(|&at| answer.is_char_boundary(at)).collect();
    for &at in &places {
        let (before, after) = answer.split_at(at);
        assert_eq!(read(format, thinking, is_thinking, &[before, after]), wanted, "{before:?} | {after:?}");
        broken_off(format, thinking, is_thinking, before, &wanted);
    }
    let letters: Vec<&str> = places.windows(2).map(|pair| &answer[pair[0]..pair[1]]).collect();
    assert_eq!(read(format, thinking, is_thinking, &letters), wanted, "{answer:?} letter by letter");
}

/// What is there of a call when the answer ends too early is a beginning of it, and broken text is
/// never longer than what was written.
fn broken_off(
    format: MakeFormat,
    thinking: Option<Tags>,
    is_thinking: bool,
    answer: &str,
    whole: &AnswerMessage,
) {
    let partial = read(format, thinking, is_thinking, &[answer]);
    assert!(partial.calls.len() <= whole.calls.len(), "{answer:?} gave {partial:?}");
    for (call, whole) in partial.calls.iter().zip(&whole.calls) {
        assert!(whole.name.starts_with(&call.name), "{answer:?} gave {partial:?}");
        assert!(whole.arguments.starts_with(&call.arguments), "{answer:?} gave {partial:?}");
    }
    assert!(partial.text.len() + partial.reasoning.len() <= answer.len(), "{answer:?} gave {partial:?}");
}

const PARIS: &str = "{\"city\": \"Paris \\\"}\\\" {\", \"days\": 3}";

fn with(template: &str) -> String {
    template.replace("ARGS", PARIS)
}

/// Where a grammar keeps the values, a mark inside of a JSON string ends none of them.
#[test]
fn strict_values_in_xml_are_whole() {
    let parameters = json!({ "type": "object", "properties": { "list": { "type": "array" } } });
    let tool = |strict: bool| {
        let function = json!({ "name": "t", "parameters": parameters, "strict": strict });
        Arc::new(ToolSet::new(&[json!({ "type": "function", "function": function })]))
    };
    let answer = "<tool_call>\n<function=t>\n<parameter=list>\n[\"a</parameter>\", \"</function>\"]\n\
        </parameter>\n</function>\n</tool_call>";
    let read = |strict: bool, at: usize| {
        let mut reader = AnswerReader::new(Some(Box::new(Xml::new(tool(strict)))), None, None, false);
        let mut events = Vec::new();
        reader.push(&answer[..at], &mut events);
        reader.push(&answer[at..], &mut events);
        reader.finish(&mut events);
        let mut message = AnswerMessage::default();
        events.into_iter().for_each(|event| message.absorb(event));
        message.calls[0].arguments.clone()
    };
    for at in 0..=answer.len() {
        assert_eq!(read(true, at), "{\"list\": [\"a</parameter>\",\"</function>\"]}", "{at}");
    }
    assert_ne!(read(false, 0), read(true, 0));
}

/// Where only the call is held and not its values, what is no JSON ends where it seems to.
#[test]
fn held_values_in_xml_that_are_no_json_end() {
    let function = json!({ "name": "t", "parameters": { "type": "object", "properties": {} } });
    let mut tools = ToolSet::new(&[json!({ "type": "function", "function": function })]);
    tools.hold_all();
    let tools = Arc::new(tools);
    for (value, wanted) in [
        ("words", "\"words\""),
        ("", "\"\""),
        ("True", "true"),
        ("[words]", "\"[words]\""),
        ("[\"</parameter>\"]", "[\"</parameter>\"]"),
    ] {
        let mut reader = AnswerReader::new(Some(Box::new(Xml::new(tools.clone()))), None, None, false);
        let mut events = Vec::new();
        let answer = format!("<function=t>\n<parameter=a>\n{value}\n</parameter>\n</function>");
        reader.push(&answer, &mut events);
        reader.finish(&mut events);
        let mut message = AnswerMessage::default();
        events.into_iter().for_each(|event| message.absorb(event));
        assert_eq!(message.calls[0].arguments, format!("{{\"a\": {wanted}}}"), "{value}");
    }
}

#[test]
fn calls_between_tags() {
    let weather = &[("weather", PARIS)][..];
    let both = &[("weather", PARIS), ("now", "{}")][..];
    for (answer, text, calls) in [
        ("Just text.\n", "Just text.\n", &[][..]),
        ("a < b, <tool_ and </tool_call>", "a < b, <tool_ and </tool_call>", &[]),
        ("<tool_call>\n{\"name\": \"weather\", \"arguments\": ARGS}\n</tool_call>", "", weather),
        (
            "Let me see.\n\n<tool_call>{\"arguments\":ARGS ,\"name\":\"weather\"}</tool_call>\n",
            "Let me see.",
            weather,
        ),
        (
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": ARGS}\n</tool_call>\n\
             <tool_call>\n{\"name\": \"now\"}\n</tool_call>",
            "",
            both,
        ),
        // Two in one, as small models do.
        (
            "<tool_call>{\"name\": \"weather\", \"arguments\": ARGS}\n{\"name\": \"now\"}</tool_call>",
            "",
            both,
        ),
        (
            "<tool_call>{\"type\": \"function\", \"function\": {\"name\": \"now\", \"x\": [1, {}]}, \"y\": true}</tool_call>",
            "",
            &both[1..],
        ),
        (
            "<tool_call>{\"name\": \"now\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>",
            "",
            &[("now", "{\"a\": 1}")],
        ),
        ("<tool_call>{\"name\": \"now\", \"arguments\": null}</tool_call>", "", &both[1..]),
        ("<tool_call>never mind", "<tool_call>never mind", &[]),
        ("<tool_call>{\"title\": \"a\"}", "<tool_call>{\"title\": \"a\"}", &[]),
        ("<tool_call>{\"name\": 7}", "<tool_call>{\"name\": 7}", &[]),
    ] {
        expect(hermes, THINK, false, &with(answer), &with(text), "", calls);
    }
    for answer in [
        "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": ARGS}, {\"name\": \"now\", \"arguments\": {}}]",
        "[TOOL_CALLS] weather[ARGS]WITH[TOOL_CALLS]now[ARGS]{}",
        "[TOOL_CALLS]weatherWITH[TOOL_CALLS]now{}",
    ] {
        let answer = if answer.contains("WITH") { answer.replace("WITH", PARIS) } else { with(answer) };
        expect(mistral, None, false, &answer, "", "", both);
    }
    let listed = "Now.<|tool_call|>[{\"name\": \"weather\", \"arguments\": ARGS},\n{\"name\": \"now\"}]";
    expect(granite, None, false, &with(listed), "Now.", "", both);
}

#[test]
fn an_id_that_the_model_gives_is_kept() {
    let answer = "[TOOL_CALLS][{\"id\": \"abc123def\", \"name\": \"now\", \"arguments\": {}}]";
    assert_eq!(read(mistral, None, false, &[answer]).calls[0].id.as_deref(), Some("abc123def"));
    let answer = "[TOOL_CALLS]now[CALL_ID]abc123def[ARGS]{}";
    let call = &read(mistral, None, false, &[answer]).calls[0];
    assert_eq!((call.id.as_deref(), call.name.as_str()), (Some("abc123def"), "now"));
}

#[test]
fn calls_as_xml() {
    let code = "{\"city\": \"a\\n<b>\\\"c\\\"\", \"days\": 3}";
    for (answer, text, calls) in [
        ("No <function call.", "No <function call.", &[][..]),
        (
            "Now:\n<tool_call>\n<function=weather>\n<parameter=city>\na\n<b>\"c\"\n</parameter>\n\
             <parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            "Now:",
            &[("weather", code)],
        ),
        // Without the outer tag, and without the layout.
        (
            "<function=weather><parameter=city>Rome</parameter></function></tool_call>",
            "",
            &[("weather", "{\"city\": \"Rome\"}")],
        ),
        ("<tool_call>\n<function=now>\n</function>\n</tool_call>\n", "", &[("now", "{}")]),
        (
            "<tool_call><function=now>\n<parameter=x>\nTrue\n</parameter>\n<parameter=y>\n[1, {\"a\": null}]\n</parameter>\n\
             <parameter=city>\n\n</parameter>\n<parameter=z>\nwords\n</parameter>\n</function></tool_call>",
            "",
            &[("now", "{\"x\": true, \"y\": [1,{\"a\":null}], \"city\": \"\", \"z\": \"words\"}")],
        ),
        // The end of the value is missing.
        (
            "<function=weather>\n<parameter=city>\nRome\n</function>",
            "",
            &[("weather", "{\"city\": \"Rome\"}")],
        ),
    ] {
        expect(qwen_xml, None, false, answer, text, "", calls);
    }
}

#[test]
fn calls_without_a_marker() {
    let weather = &[("weather", PARIS)][..];
    let both = &[("weather", PARIS), ("now", "{}")][..];
    for (answer, text, calls) in [
        ("Hello {\"name\": \"now\"}", "Hello {\"name\": \"now\"}", &[][..]),
        ("{\"name\": \"weather\", \"parameters\": ARGS}", "", weather),
        (
            "\n<|python_tag|>{\"name\": \"weather\", \"parameters\": ARGS}; {\"name\": \"now\", \"parameters\": {}}",
            "",
            both,
        ),
        // An answer in JSON that names no tool.
        ("{\"name\": \"Ada\", \"age\": 36}", "{\"name\": \"Ada\", \"age\": 36}", &[]),
        ("{\"a\": [1, 2]}\n", "{\"a\": [1, 2]}\n", &[]),
        (
            "[weather(city='Paris', days=3), now()]",
            "",
            &[("weather", "{\"city\":\"Paris\",\"days\":3}"), ("now", "{}")],
        ),
        (
            "[now(a=[1, -2.5, (True, None)], b={'k': \"v)\"}, c='it\\'s')]",
            "",
            &[("now", "{\"a\":[1,-2.5,[true,null]],\"b\":{\"k\":\"v)\"},\"c\":\"it's\"}")],
        ),
        ("[1, 2, 3] are numbers", "[1, 2, 3] are numbers", &[]),
        ("[link](http://x)", "[link](http://x)", &[]),
        ("[other(a=1)]", "[other(a=1)]", &[]),
    ] {
        expect(llama, None, false, &with(answer), text, "", calls);
    }
}

#[test]
fn calls_between_control_tokens() {
    let both = &[("weather", PARIS), ("now", "{}")][..];
    let old = "Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\nARGS\n```<｜tool▁call▁end｜>\n\
        <｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    let new = "Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>ARGS<｜tool▁call▁end｜>\
        <｜tool▁call▁begin｜>now<｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    for answer in [old, new] {
        expect(deepseek, THINK, false, &with(answer), "Wait.", "", both);
    }
    expect(deepseek, None, false, "a <｜tool b", "a <｜tool b", "", &[]);
}

#[test]
fn channels() {
    let call = "<|channel|>analysis<|message|>Hm. <|end|><|start|>assistant<|channel|>commentary to=functions.weather \
        <|constrain|>json<|message|>ARGS<|call|>";
    expect(harmony, None, false, &with(call), "", "Hm.", &[("weather", PARIS)]);
    let recipient_first = " to=functions.weather<|channel|>commentary<|message|>ARGS";
    expect(harmony, None, false, &with(recipient_first), "", "", &[("weather", PARIS)]);
    let text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello **you**\n<|return|>";
    expect(harmony, None, false, text, "Hello **you**\n", "Hm.", &[]);
    assert_eq!(read(harmony, None, false, &["Just text"]).text, "Just text");
}

#[test]
fn reasoning() {
    for (is_thinking, answer, text, reasoning) in [
        (false, "<think>\nHm, <b>\n</think>\n\nHello\n", "Hello\n", "Hm, <b>"),
        (true, "\nHm, </thin\n</think>\n\nHello", "Hello", "Hm, </thin"),
        (true, "Hm", "", "Hm"),
        (false, "\n <think></think>a <think> b", "a <think> b", ""),
        (false, " plain </think>", " plain </think>", ""),
        (false, "<thinner>", "<thinner>", ""),
    ] {
        expect(none, THINK, is_thinking, answer, text, reasoning, &[]);
        expect(hermes, THINK, is_thinking, answer, text, reasoning, &[]);
    }
    let then_call = "<think>Hm</think>\n<tool_call>{\"name\": \"now\"}</tool_call>";
    expect(hermes, THINK, false, then_call, "", "Hm", &[("now", "{}")]);
}
