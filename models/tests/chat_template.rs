//! Chat templates render as transformers renders them. The golden file is made by golden/chat.py.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use tandem_models::{ChatTemplate, TemplateError, Tokenizer};

mod checkpoint_support;

/// The clock of golden/chat.py: 2024-07-26 12:00.
fn clock() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_721_995_200)
}

/// What differs from the golden file at `path`, one line a case, and how many cases agree.
fn compare(path: &Path) -> (Vec<String>, usize) {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let extra: Map<String, Value> = golden["extra"].as_object().unwrap().clone();
    let mut differences = vec![];
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let conversation = &golden["conversations"][case["conversation"].as_str().unwrap()];
        // Published ones are files of their own.
        let source = golden["templates"][name]
            .as_str()
            .map(str::to_owned)
            .unwrap_or_else(|| std::fs::read_to_string(path.with_file_name("templates").join(name)).unwrap());
        let template = match ChatTemplate::from_source(&source, Some("<s>"), Some("</s>")) {
            Ok(template) => template.with_clock(clock),
            Err(error) => {
                differences.push(format!("{name}: {error}"));
                continue;
            }
        };
        let tools = Some(&conversation["tools"]).filter(|tools| !tools.is_null());
        let prompt = conversation["add_generation_prompt"].as_bool().unwrap();
        let found = template.render(&conversation["messages"], tools, prompt, &extra);
        match (&found, case["expected"].as_str()) {
            (Ok(found), Some(expected)) if found == expected => {}
            (Err(_), None) => {}
            _ => differences.push(format!(
                "{name}, {}:\n found  {found:?}\n wanted {:?}",
                case["conversation"], case["expected"]
            )),
        }
    }
    (differences, cases.len())
}

#[test]
fn templates_render_as_transformers_renders_them() {
    // Templates of this repository and published ones, each with seven conversations.
    for (file, templates) in [("chat.json", 4), ("published.json", 11)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
        let (differences, cases) = compare(&path);
        assert!(differences.is_empty(), "{}", differences.join("\n"));
        assert_eq!(cases, 7 * templates);
    }
}

/// For templates that cannot be in this repository; see golden/chat.py.
#[test]
#[ignore = "needs TANDEM_CHAT_GOLDEN, a file made by golden/chat.py"]
fn templates_of_your_own_render_as_transformers_renders_them() {
    let path = std::env::var("TANDEM_CHAT_GOLDEN").expect("TANDEM_CHAT_GOLDEN names the golden file");
    let (differences, cases) = compare(Path::new(&path));
    assert!(differences.is_empty(), "{} of {cases} differ:\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn a_refusal_is_the_clients_fault_and_says_why() {
    let template =
        ChatTemplate::from_source("{{ raise_exception('roles ' ~ 'must alternate') }}", None, None);
    let error = template.unwrap().render(&json!([]), None, true, &Map::new()).unwrap_err();
    assert!(matches!(&error, TemplateError::Refused(why) if why == "roles must alternate"), "{error}");
    let inner = "{% macro m() %}{{ raise_exception('inner') }}{% endmacro %}{{ m() }}";
    let error = ChatTemplate::from_source(inner, None, None).unwrap();
    let error = error.render(&json!([]), None, true, &Map::new()).unwrap_err();
    assert!(matches!(&error, TemplateError::Refused(why) if why == "inner"), "{error}");
}

fn from_dir(files: &[(&str, &str)]) -> Result<Option<ChatTemplate>, tandem_models::ModelError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), checkpoint_support::byte_level_tokenizer(&[])).unwrap();
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    ChatTemplate::from_dir(dir.path(), &Tokenizer::from_dir(dir.path()).unwrap())
}

fn render(template: &ChatTemplate, tools: Option<&Value>) -> String {
    template.render(&json!([]), tools, true, &Map::new()).unwrap()
}

#[test]
fn templates_are_found_where_checkpoints_keep_them() {
    assert!(from_dir(&[]).unwrap().is_none());
    let config = r#"{"chat_template": "config {{ bos_token }}{{ eos_token }}", "bos_token": "<s>",
                     "eos_token": {"content": "</s>", "lstrip": false}}"#;
    let found = from_dir(&[("tokenizer_config.json", config)]).unwrap().unwrap();
    assert_eq!(render(&found, None), "config <s></s>");
    let json = r#"{"chat_template": "json"}"#;
    let found =
        from_dir(&[("tokenizer_config.json", config), ("chat_template.json", json)]).unwrap().unwrap();
    assert_eq!(render(&found, None), "json");
    let all =
        [("tokenizer_config.json", config), ("chat_template.json", json), ("chat_template.jinja", "jinja")];
    assert_eq!(render(&from_dir(&all).unwrap().unwrap(), None), "jinja");
}

#[test]
fn a_list_of_templates_has_one_for_tools() {
    let config =
        r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    let template = from_dir(&[("tokenizer_config.json", config)]).unwrap().unwrap();
    assert_eq!(render(&template, None), "D");
    assert_eq!(render(&template, Some(&json!([{"name": "f"}]))), "T");
}

/// Found by `examples/fuzz`.
#[test]
fn a_tag_that_seems_to_close_itself_is_an_error() {
    for source in ["{%}", "{%} x %}", "a {%-}{% generation %}"] {
        assert!(ChatTemplate::from_source(source, None, None).is_err(), "{source}");
    }
}

#[test]
fn damaged_templates_name_file_and_place() {
    let error = from_dir(&[("chat_template.jinja", "{% if x %}\n{{ y")]).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja") && error.contains("syntax error"), "{error}");
    let error = from_dir(&[("tokenizer_config.json", r#"{"chat_template": 3}"#)]).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("\"default\""), "{error}");
}
