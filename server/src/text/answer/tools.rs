//! The tools of a request, as far as reading an answer needs them.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

/// Names, and which parameters are strings.
#[derive(Debug, Default)]
pub struct ToolSet {
    tools: HashMap<String, Tool>,
}

#[derive(Debug)]
struct Tool {
    strings: HashSet<String>,
    is_strict: bool,
}

impl ToolSet {
    /// From a JSON array of `{"type": "function", "function": {"name", "parameters"}}`.
    pub fn new(tools: &[Value]) -> Self {
        let one = |tool: &Value| {
            let function = &tool["function"];
            let properties = function["parameters"]["properties"].as_object();
            let strings = properties
                .into_iter()
                .flatten()
                .filter(|(_, schema)| schema["type"] == "string")
                .map(|(name, _)| name.clone())
                .collect();
            let tool = Tool { strings, is_strict: function["strict"] == true };
            Some((function["name"].as_str()?.to_owned(), tool))
        };
        ToolSet { tools: tools.iter().filter_map(one).collect() }
    }

    /// The arguments of every tool are held to its schema, as those of strict ones are.
    pub fn hold_all(&mut self) {
        self.tools.values_mut().for_each(|tool| tool.is_strict = true);
    }

    /// True if the request has a tool of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tools.contains_key(name)
    }

    /// True if the tool's schema says that this parameter is a string.
    pub(super) fn is_string(&self, tool: &str, parameter: &str) -> bool {
        self.tools.get(tool).is_some_and(|tool| tool.strings.contains(parameter))
    }

    /// True if the tool's arguments are held to its schema.
    pub(super) fn is_strict(&self, tool: &str) -> bool {
        self.tools.get(tool).is_some_and(|tool| tool.is_strict)
    }
}
