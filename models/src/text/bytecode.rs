//! Compiles a chat template so that every value it makes passes through the [`Meter`](super::meter).
//!
//! minijinja's fuel counts instructions, but one instruction can double a string, multiply a list or
//! nest a value until printing it overflows the stack. The engine has no hook there, so the compiled
//! instructions are rewritten, one at a time:
//!
//! - `+`, `~` and `*` become calls of filters that look at the sizes first;
//! - literal text is printed as a value, so that all output, captured or not, passes the formatter;
//! - what lists, calls, filters and captures leave on the stack is passed to a filter that charges it;
//! - what is stored in a namespace, the only mutable thing, is checked first: a namespace within
//!   itself would recurse for ever.

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::machinery::{CompiledTemplate, Instruction, Instructions, TemplateConfig};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Error, Value};

/// Filters that the rewritten instructions call; the names cannot be written in a template.
pub(super) const ADD: &str = "+";
pub(super) const CONCAT: &str = "~";
pub(super) const MULTIPLY: &str = "*";
pub(super) const CHARGE: &str = "#charge";
pub(super) const CHECK_STORED: &str = "#check-stored";

/// Tells the engine not to cache the filter in a numbered slot.
const UNCACHED: u8 = !0;

/// A compiled template. Borrows its source.
pub(super) struct Program<'source> {
    pub(super) instructions: Instructions<'source>,
    pub(super) blocks: BTreeMap<&'source str, Instructions<'source>>,
}

impl<'source> Program<'source> {
    /// Compiles `source` with the whitespace rules that transformers uses.
    pub(super) fn compile(source: &'source str) -> Result<Self, Error> {
        let syntax_config = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
        let config = TemplateConfig { syntax_config, default_auto_escape: Arc::new(|_| AutoEscape::None) };
        let compiled = CompiledTemplate::new("chat_template", source, &config)?;
        Ok(Program {
            instructions: metered(&compiled.instructions),
            blocks: compiled.blocks.iter().map(|(name, block)| (*name, metered(block))).collect(),
        })
    }
}

fn metered<'source>(original: &Instructions<'source>) -> Instructions<'source> {
    let rewritten: Vec<Vec<Instruction<'source>>> =
        (0..).map_while(|index| original.get(index)).map(rewrite).collect();
    // Where each original instruction begins now; one more entry for jumps to the end.
    let mut starts = vec![0];
    starts.extend(rewritten.iter().scan(0, |start, group| {
        *start += group.len() as u32;
        Some(*start)
    }));
    let mut result = Instructions::new(original.name(), original.source());
    for (index, group) in rewritten.into_iter().enumerate() {
        for mut instruction in group {
            if let Some(target) = jump_target(&mut instruction) {
                *target = starts[*target as usize];
            }
            match (original.get_span(index as u32), original.get_line(index as u32)) {
                (Some(span), _) => result.add_with_span(instruction, span),
                (None, Some(line)) => result.add_with_line(instruction, line as u16),
                (None, None) => result.add(instruction),
            };
        }
    }
    result
}

fn rewrite<'source>(instruction: &Instruction<'source>) -> Vec<Instruction<'source>> {
    let filter = |name, arguments| Instruction::ApplyFilter(name, Some(arguments), UNCACHED);
    match instruction {
        Instruction::EmitRaw(text) => {
            vec![Instruction::LoadConst(Value::from_safe_string((*text).to_owned())), Instruction::Emit]
        }
        Instruction::Add => vec![filter(ADD, 2)],
        Instruction::StringConcat => vec![filter(CONCAT, 2)],
        Instruction::Mul => vec![filter(MULTIPLY, 2)],
        Instruction::SetAttr(_) => {
            vec![Instruction::Swap, filter(CHECK_STORED, 1), Instruction::Swap, instruction.clone()]
        }
        Instruction::BuildList(_)
        | Instruction::BuildTuple(_)
        | Instruction::BuildMap(_)
        | Instruction::Slice
        | Instruction::ApplyFilter(..)
        | Instruction::CallFunction(..)
        | Instruction::CallMethod(..)
        | Instruction::CallObject(..)
        | Instruction::EndCapture => vec![instruction.clone(), filter(CHARGE, 1)],
        other => vec![other.clone()],
    }
}

fn jump_target<'a>(instruction: &'a mut Instruction<'_>) -> Option<&'a mut u32> {
    match instruction {
        Instruction::Iterate(target)
        | Instruction::Jump(target)
        | Instruction::JumpIfFalse(target)
        | Instruction::JumpIfFalseOrPop(target)
        | Instruction::JumpIfTrueOrPop(target)
        | Instruction::BuildMacro(_, target, _) => Some(target),
        _ => None,
    }
}
