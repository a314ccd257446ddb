//! Every client protocol over the real server and engine. A scripted model writes reasoning and tool
//! calls in its family's format; clients get them in their own.

#[path = "../support/mod.rs"]
mod support;

mod anthropic;
mod llamacpp;
mod responses;
mod tools;

/// As Qwen's, in what matters: tools first, calls as JSON between tags.
pub(crate) const HERMES: &str = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}\
    {% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}\
    {% for call in message.tool_calls or [] %}<tool_call>\n\
    {\"name\": \"{{ call.function.name }}\", \"arguments\": {{ call.function.arguments | tojson }}}\n\
    </tool_call>{% endfor %}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}\
    <think>\n\n</think>\n\n{% endif %}{% endif %}";
pub(crate) const TOKENS: &[&str] = &["<think>", "</think>"];

/// Reasoning, text and two calls.
pub(crate) const CALL: &str = "<think>\nWhich city?\n</think>\n\nLet me look.\n<tool_call>\n\
    {\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\"}\n</tool_call>";
