//! Every name that clients have for it, on every endpoint, and what is refused.

use serde_json::{Value, json};

use crate::demo;
use crate::support::TestServer;

const HERMES: &str = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}\
    {% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}\
    {% for call in message.tool_calls or [] %}<tool_call>\n\
    {\"name\": \"{{ call.function.name }}\", \"arguments\": {{ call.function.arguments | tojson }}}\n\
    </tool_call>{% endfor %}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn with(mut body: Value, extra: &Value) -> Value {
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

fn schema() -> Value {
    json!({ "type": "object", "properties": { "ok": { "type": "boolean" }, "n": { "enum": [1, 2] } },
        "required": ["ok", "n"], "additionalProperties": false })
}

fn is_right(text: &Value) -> bool {
    let value: Value = serde_json::from_str(text.as_str().expect("text")).unwrap_or(Value::Null);
    value["ok"].is_boolean() && (value["n"] == 1 || value["n"] == 2)
}

#[tokio::test]
async fn each_name_for_it_is_understood() {
    let server = demo().await;
    let completion = |extra: Value| with(json!({ "prompt": "x = ", "max_tokens": 200, "seed": 1 }), &extra);
    for extra in [
        json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "a", "schema": schema() } } }),
        json!({ "response_format": { "type": "json_schema", "schema": schema() } }),
        json!({ "response_format": { "type": "json_object", "schema": schema() } }),
        json!({ "guided_json": schema() }),
        json!({ "guided_json": schema().to_string() }),
        json!({ "structured_outputs": { "json": schema(), "regex": null, "disable_fallback": true } }),
        json!({ "json_schema": schema(), "grammar": "" }),
    ] {
        let answer = server.post("/v1/completions", &completion(extra.clone())).await.json();
        assert!(is_right(&answer["choices"][0]["text"]), "{extra}: {answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    for (extra, wanted) in [
        (json!({ "guided_choice": ["left", "right"] }), ["left", "right"]),
        (json!({ "guided_regex": "(left|right)" }), ["left", "right"]),
        (json!({ "structured_outputs": { "choice": ["left", "right"] } }), ["left", "right"]),
        (json!({ "guided_grammar": "start: \"left\" | \"right\"" }), ["left", "right"]),
        (json!({ "grammar": "root ::= \"left\" | right\nright ::= [r] \"ight\"" }), ["left", "right"]),
        (json!({ "response_format": { "type": "text" }, "guided_choice": ["a", "b"] }), ["a", "b"]),
    ] {
        let answer = server.post("/v1/completions", &completion(extra.clone())).await.json();
        let text = answer["choices"][0]["text"].as_str().expect("text");
        assert!(wanted.contains(&text), "{extra}: {answer}");
    }
    let native = json!({ "prompt": "x = ", "n_predict": 200, "seed": 1, "json_schema": schema() });
    let answer = server.post("/completion", &native).await.json();
    assert!(is_right(&answer["content"]), "{answer}");
    assert_eq!(answer["stop_type"], "eos");
    let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 1000, "n": 2, "seed": 1,
        "response_format": { "type": "json_schema", "json_schema": { "schema": schema() } } });
    let answer = server.post("/v1/chat/completions", &chat).await.json();
    assert!(is_right(&answer["choices"][0]["message"]["content"]), "{answer}");
    assert!(is_right(&answer["choices"][1]["message"]["content"]), "{answer}");
    let response = json!({ "input": "x", "seed": 1, "text": { "format": { "type": "json_schema", "name": "a", "schema": schema() } } });
    let answer = server.post("/v1/responses", &response).await.json();
    assert!(is_right(&answer["output"][0]["content"][0]["text"]), "{answer}");
    assert_eq!(answer["text"]["format"]["type"], "json_schema");
    for name in ["output_format", "output_config"] {
        let mut format = json!({ "type": "json_schema", "schema": schema() });
        if name == "output_config" {
            format = json!({ "format": format });
        }
        let message = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 200, "seed": 1, name: format });
        let answer = server.post("/v1/messages", &message).await.json();
        assert!(is_right(&answer["content"][0]["text"]), "{answer}");
    }
    server.stop().await;
}

#[tokio::test]
async fn what_cannot_be_kept_is_refused_by_name() {
    let server = demo().await;
    let schema_field = |schema: Value| json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": schema } } });
    let in_format = "response_format.json_schema.schema";
    let huge: Vec<String> = (0..20_000).map(|i| format!("property number {i}")).collect();
    let tags_field =
        |format: Value| json!({ "response_format": { "type": "structural_tag", "format": format } });
    let tag = json!({ "begin": "<a>", "schema": {}, "end": "" });
    let mut long_triggers: Vec<String> = (0..60).map(|i| format!("{i}{}", "/".repeat(3000))).collect();
    long_triggers.push("<".to_owned());
    for (extra, param, word) in [
        (json!({ "response_format": { "type": "yaml" } }), "response_format.type", "json_schema"),
        (json!({ "response_format": "json" }), "response_format", "an object"),
        (json!({ "response_format": { "type": "json_schema" } }), "response_format.schema", "an object"),
        (schema_field(json!([])), in_format, "an object"),
        (
            schema_field(json!({ "type": "object", "unevaluatedProperties": false })),
            in_format,
            "unevaluatedProperties",
        ),
        (schema_field(json!({ "$ref": "http://127.0.0.1:1/x.json" })), in_format, "127.0.0.1"),
        (schema_field(json!({ "type": "number", "minimum": 3, "maximum": 1 })), in_format, "kept"),
        (schema_field(json!({ "enum": huge })), in_format, "bytes"),
        (json!({ "guided_regex": "(" }), "guided_regex", "regex"),
        (json!({ "guided_regex": 7 }), "guided_regex", "a string"),
        (json!({ "guided_choice": [] }), "guided_choice", "1 to"),
        (json!({ "guided_choice": [1] }), "guided_choice[0]", "a string"),
        (json!({ "guided_json": "{" }), "guided_json", "JSON"),
        (json!({ "guided_grammar": "start: missing" }), "guided_grammar", "missing"),
        (json!({ "grammar": "root ::= other" }), "grammar", "other"),
        (
            json!({ "structured_outputs": { "structural_tag": "{}" } }),
            "structured_outputs.structural_tag.triggers",
            "an array",
        ),
        (
            json!({ "response_format": { "type": "structural_tag", "triggers": ["<a"],
                "structures": [{ "begin": "<b>", "schema": {}, "end": "" }] } }),
            "response_format.structures[0].begin",
            "triggers",
        ),
        (
            json!({ "response_format": { "type": "structural_tag", "format": { "type": "sequence" } } }),
            "response_format.format.type",
            "triggered_tags",
        ),
        (
            tags_field(
                json!({ "type": "triggered_tags", "triggers": ["<"], "tags": [{ "begin": "<", "end": ">",
                "content": { "type": "qwen_xml_parameter", "json_schema": {} } }] }),
            ),
            "response_format.format.tags[0].content.type",
            "\"json_schema\"",
        ),
        (
            json!({ "response_format": { "type": "structural_tag", "triggers": vec!["<"; 65], "structures": [tag] } }),
            "response_format.triggers",
            "at most 64",
        ),
        (
            json!({ "response_format": { "type": "structural_tag", "triggers": ["<"], "structures": vec![&tag; 1001] } }),
            "response_format.structures",
            "at most 1000",
        ),
        // What is long is planned elsewhere, and refused all the same.
        (
            json!({ "response_format": { "type": "structural_tag", "triggers": long_triggers, "structures": [tag] } }),
            "response_format",
            "bytes",
        ),
        (json!({ "guided_regex": "a", "guided_choice": ["a"] }), "guided_choice", "guided_regex"),
    ] {
        let answer = server.post("/v1/completions", &with(json!({ "prompt": "x" }), &extra)).await;
        assert_eq!(answer.status, 400, "{}", extra.to_string().chars().take(200).collect::<String>());
        let error = answer.error();
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().expect("a message").contains(word), "{error}");
        assert!(error["message"].as_str().expect("a message").len() < 600, "{error}");
    }
    // A schema that need not be kept exactly is followed as far as it is known.
    let loose = json!({ "response_format": { "type": "json_schema", "json_schema": { "strict": false,
        "schema": { "type": "boolean", "unevaluatedProperties": false } } }, "prompt": "x" });
    let answer = server.post("/v1/completions", &loose).await.json();
    assert!(["true", "false"].contains(&answer["choices"][0]["text"].as_str().expect("text")), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn an_answer_that_is_cut_says_so_and_one_that_is_whole_ends() {
    let server = demo().await;
    let asked = |max_tokens: usize| json!({ "prompt": "x = ", "max_tokens": max_tokens, "guided_regex": "[0-9]{40}", "ignore_eos": true, "temperature": 0 });
    let cut = server.post("/v1/completions", &asked(5)).await.json();
    assert_eq!(cut["choices"][0]["finish_reason"], "length", "{cut}");
    let whole = server.post("/v1/completions", &asked(60)).await.json();
    assert_eq!(whole["choices"][0]["finish_reason"], "stop", "{whole}");
    let text = whole["choices"][0]["text"].as_str().expect("text");
    assert!(text.len() == 40 && text.starts_with(cut["choices"][0]["text"].as_str().expect("text")));
    let events = server.post("/v1/completions", &with(asked(60), &json!({ "stream": true }))).await.events();
    let streamed: String =
        events.iter().filter_map(|event| event["choices"][0]["text"].as_str().map(str::to_owned)).collect();
    assert_eq!(streamed, text);
    // Log-probabilities are the model's own, and take a pass where there is no choice.
    let scored = server.post("/v1/completions", &with(asked(60), &json!({ "logprobs": 1 }))).await.json();
    assert_eq!(scored["choices"][0]["text"], text);
    let scores = scored["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("scores").len();
    assert_eq!(scores as u64, scored["usage"]["completion_tokens"].as_u64().expect("a count"));
    server.stop().await;
}

#[tokio::test]
async fn a_form_beyond_its_limits_ends_its_own_answer_only() {
    let server = demo().await;
    for regex in ["(.*a.{200}){8}b", "((a|b)*c(a|b){60}){20}", "([a-z]*[0-9]{0,300}x){40}"] {
        let asked = json!({ "prompt": "x = ", "guided_regex": regex, "max_tokens": 300, "temperature": 1 });
        let answer = server.post("/v1/completions", &asked).await;
        assert!(answer.status == 200 || answer.status == 400, "{}", answer.status);
        if answer.status == 400 {
            let message = answer.error()["message"].as_str().expect("a message").to_owned();
            assert!(message.contains("cannot be"), "{message}");
        }
    }
    let answer = server.post("/v1/completions", &json!({ "prompt": "x = ", "max_tokens": 5 })).await;
    assert_eq!(answer.status, 200);
    server.stop().await;
}

fn weather(strict: bool, extra: Value) -> Value {
    let parameters = json!({ "type": "object", "properties": { "city": { "enum": ["Rome", "Oslo"] } },
        "required": ["city"], "additionalProperties": false });
    let tool = json!({ "type": "function", "function": { "name": "weather", "strict": strict, "parameters": parameters } });
    with(
        json!({ "messages": [{ "role": "user", "content": "x" }], "tools": [tool], "max_tokens": 120 }),
        &extra,
    )
}

#[tokio::test]
async fn arguments_of_tools_are_what_their_schemas_say() {
    let server = TestServer::scripted(HERMES, &["<think>", "</think>", "<tool_call>", "</tool_call>"]).await;
    let path = "/v1/chat/completions";
    let arguments = |answer: &Value| -> Value {
        let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
        assert_eq!(call["name"], "weather", "{answer}");
        serde_json::from_str(call["arguments"].as_str().expect("text")).expect("JSON")
    };
    // The model would say something else.
    server.say("Paris, of course, and a lot more that is no call of any tool at all.");
    for choice in [json!("required"), json!({ "type": "function", "function": { "name": "weather" } })] {
        let answer = server
            .post(path, &weather(false, json!({ "tool_choice": choice, "parallel_tool_calls": false })))
            .await
            .json();
        let city = arguments(&answer)["city"].clone();
        assert!(city == "Rome" || city == "Oslo", "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    }
    // It may call or not, and what it calls strictly is right.
    let free = server.post(path, &weather(true, json!({ "temperature": 0 }))).await.json();
    assert!(free["choices"][0]["message"]["content"].as_str().is_some_and(|text| text.starts_with("Paris")));
    server.say("<think>hm</think>\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>");
    let held = server.post(path, &weather(true, json!({ "temperature": 0 }))).await.json();
    let city = arguments(&held)["city"].clone();
    assert!(city == "Rome" || city == "Oslo", "{held}");
    assert_eq!(held["choices"][0]["message"]["reasoning_content"], "hm");
    let loose = server.post(path, &weather(false, json!({ "temperature": 0 }))).await.json();
    assert_eq!(arguments(&loose)["city"], "Paris");
    server.stop().await;
}

#[tokio::test]
async fn a_format_begins_after_the_reasoning() {
    let server = TestServer::scripted(HERMES, &["<think>", "</think>", "<tool_call>", "</tool_call>"]).await;
    server.say("<think>{\"no\": 1}</think>\n\n{\"ok\": false, \"n\": 2}");
    let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 200, "temperature": 0,
        "response_format": { "type": "json_schema", "json_schema": { "schema": schema() } } });
    let answer = server.post("/v1/chat/completions", &chat).await.json();
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["reasoning_content"], "{\"no\": 1}", "{answer}");
    assert!(is_right(&message["content"]), "{answer}");
    server.stop().await;
}

/// Each family's template shows how its model calls, and strict tools are kept in it.
#[tokio::test]
async fn strict_tools_in_every_familys_calls() {
    let head = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}{% for message in messages %}\
        <|im_start|>{{ message.role }}\n{{ message.content or '' }}{% for call in message.tool_calls or [] %}";
    let tail = "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let name = "{{ call.function.name }}";
    let arguments = "{{ call.function.arguments | tojson }}";
    let city = "{\"city\": \"Paris\"}";
    let xml = "<tool_call>\n<function={{ call.function.name }}>\n{% for key, value in call.function.arguments | items %}\
        <parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>";
    let families: [(String, String, &'static [&'static str]); 5] = [
        (
            xml.to_owned(),
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>".to_owned(),
            &["<tool_call>", "</tool_call>"],
        ),
        (
            format!("[TOOL_CALLS][{{\"name\": \"{name}\", \"arguments\": {arguments}}}]"),
            format!("[TOOL_CALLS][{{\"name\": \"weather\", \"arguments\": {city}}}]"),
            &["[TOOL_CALLS]"],
        ),
        (
            format!("[TOOL_CALLS]{name}[ARGS]{arguments}"),
            format!("[TOOL_CALLS]weather[ARGS]{city}"),
            &["[TOOL_CALLS]", "[ARGS]"],
        ),
        (
            format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```\
                <｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
            format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{city}\n```\
                <｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
            DEEPSEEK,
        ),
        (
            format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
            format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{city}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
            DEEPSEEK,
        ),
    ];
    for (shown, said, tokens) in families {
        // A template lives as long as the process: there are five.
        let template: &'static str = format!("{head}{shown}{tail}").leak();
        let server = TestServer::scripted(template, tokens).await;
        let path = "/v1/chat/completions";
        let city = |answer: &Value| -> Value {
            let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
            assert_eq!(call["name"], "weather", "{shown}: {answer}");
            let arguments: Value =
                serde_json::from_str(call["arguments"].as_str().expect("text")).expect("JSON");
            arguments["city"].clone()
        };
        server.say(&said);
        let greedy = |extra: Value| with(json!({ "temperature": 0, "parallel_tool_calls": false }), &extra);
        let loose = server.post(path, &weather(false, greedy(json!({})))).await.json();
        assert_eq!(city(&loose), "Paris");
        let held = server.post(path, &weather(true, greedy(json!({})))).await.json();
        assert!(city(&held) == "Rome" || city(&held) == "Oslo", "{held}");
        assert_eq!(held["choices"][0]["finish_reason"], "tool_calls");
        server.say("Paris, of course.");
        let free = server.post(path, &weather(true, greedy(json!({})))).await.json();
        assert_eq!(free["choices"][0]["message"]["content"], "Paris, of course.", "{shown}: {free}");
        for choice in [json!("required"), json!({ "type": "function", "function": { "name": "weather" } })] {
            let forced =
                server.post(path, &weather(false, greedy(json!({ "tool_choice": choice })))).await.json();
            assert!(city(&forced) == "Rome" || city(&forced) == "Oslo", "{forced}");
        }
        server.stop().await;
    }
}

/// A call that is forced is held to its schema, and so it is read as a strict one: a mark inside of a JSON string
/// ends nothing.
#[tokio::test]
async fn forced_calls_in_xml_are_read_whole() {
    const XML: &str = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}{% for message in messages %}\
        <|im_start|>{{ message.role }}\n{{ message.content or '' }}{% for call in message.tool_calls or [] %}\
        <tool_call>\n<function={{ call.function.name }}>\n{% for key, value in call.function.arguments | items %}\
        <parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n\
        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let server = TestServer::scripted(XML, &["<tool_call>", "</tool_call>"]).await;
    server.say("Rather not.");
    let parameters = json!({ "type": "object", "properties": { "list": { "const": ["a</parameter>b", "</function>"] } },
        "required": ["list"], "additionalProperties": false });
    let tool = json!({ "type": "function", "function": { "name": "t", "parameters": parameters } });
    for choice in [json!("required"), json!({ "type": "function", "function": { "name": "t" } })] {
        let asked = json!({ "messages": [{ "role": "user", "content": "x" }], "tools": [tool], "temperature": 0,
            "max_tokens": 200, "tool_choice": choice, "parallel_tool_calls": false });
        let answer = server.post("/v1/chat/completions", &asked).await.json();
        let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
        let arguments: Value =
            serde_json::from_str(call["arguments"].as_str().expect("a call")).expect("JSON");
        assert_eq!(arguments, json!({ "list": ["a</parameter>b", "</function>"] }), "{answer}");
    }
    server.stop().await;
}

const DEEPSEEK: &[&str] = &[
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
];

/// Marks that are tokens of their own are drawn as such, and what follows them has its form.
#[tokio::test]
async fn tagged_pieces_have_a_form() {
    let server = TestServer::scripted(HERMES, &["<think>", "</think>", "<tool_call>", "</tool_call>"]).await;
    let schema = json!({ "type": "object", "properties": { "city": { "enum": ["Rome", "Oslo"] } },
        "required": ["city"], "additionalProperties": false });
    let tag = json!({ "begin": "<tool_call>\n", "schema": schema, "end": "\n</tool_call>" });
    let legacy = json!({ "type": "structural_tag", "structures": [tag], "triggers": ["<tool_call>"] });
    let content = json!({ "type": "json_schema", "json_schema": schema });
    let tag = json!({ "begin": "<tool_call>\n", "content": content, "end": "\n</tool_call>" });
    let nested = json!({ "type": "triggered_tags", "tags": [tag], "triggers": ["<tool_call>"] });
    server.say("Look:\n<tool_call>\n{\"city\": \"Paris\"}\n</tool_call> Done.");
    for asked in [
        json!({ "response_format": legacy }),
        json!({ "response_format": { "type": "structural_tag", "format": nested } }),
        json!({ "structured_outputs": { "structural_tag": legacy.to_string() } }),
    ] {
        let chat =
            json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 200, "temperature": 0 });
        let answer = server.post("/v1/chat/completions", &with(chat, &asked)).await.json();
        let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
        let (before, rest) = text.split_once("<tool_call>\n").expect("the tag");
        let (json, _) = rest.split_once("\n</tool_call>").expect("its end");
        assert_eq!(before, "Look:\n", "{answer}");
        let city = serde_json::from_str::<Value>(json).expect("JSON")["city"].clone();
        assert!(city == "Rome" || city == "Oslo", "{answer}");
    }
    // The token counts wherever it stands, and a line break is no trigger.
    let nested = json!({ "type": "triggered_tags", "triggers": ["\n<tool_call>"], "tags": [
        { "begin": "\n<tool_call>", "content": { "type": "json_schema", "json_schema": {} }, "end": "" }] });
    let asked = json!({ "messages": [{ "role": "user", "content": "x" }],
        "response_format": { "type": "structural_tag", "format": nested } });
    let answer = server.post("/v1/chat/completions", &asked).await;
    assert_eq!(answer.status, 400);
    let message = answer.error()["message"].as_str().expect("a message").to_owned();
    assert!(message.contains("control token") && message.contains("\\n"), "{message}");
    server.stop().await;
}
