//! Compiles a chat template so that every value it makes passes through the [`Meter`](super::meter).
//!
//! minijinja's fuel counts instructions, but one instruction can double a string, multiply a list or
//! nest a value until printing it overflows the stack. The engine has no hook there, so the compiled
//! instructions are rewritten, one at a time:
//!
//! - `+`, `~` and `*` become calls of filters that look at the sizes first;
//! - literal text is printed as a value, so that all output, captured or not, passes the formatter;
//! - what lists, calls, filters and captures leave on the stack is passed to a filter that charges it,
//!   and lazy sequences, which could come to hold themselves, are made lists there;
//! - what is stored in a namespace, the only mutable thing, is checked first: a namespace within
//!   itself would recurse for ever;
//! - a loop over `none` fails, as in Python, where minijinja takes it for an empty list.
//!
//! The compiler itself multiplies literals, up to 100 MB, so `*` gets a factor that it does not know.

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::machinery::{CompiledTemplate, Instruction, Instructions, TemplateConfig, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Error, Value};

/// Filters that the rewritten instructions call; the names cannot be written in a template.
pub(super) const ADD: &str = "+";
pub(super) const CONCAT: &str = "~";
pub(super) const MULTIPLY: &str = "*";
pub(super) const CHARGE: &str = "#charge";
pub(super) const CHARGE_CALL: &str = "#charge-call";
pub(super) const CHECK_LOOP: &str = "#check-loop";
pub(super) const CHECK_STORED: &str = "#check-stored";

/// The global that is 1.
pub(super) const ONE: &str = "_one_";

/// Tells the engine not to cache the filter in a numbered slot.
const UNCACHED: u8 = !0;

/// A compiled template. Borrows its source.
pub(super) struct Program<'source> {
    pub(super) instructions: Instructions<'source>,
    pub(super) blocks: BTreeMap<&'source str, Instructions<'source>>,
}

impl<'source> Program<'source> {
    /// Compiles `source`, which must have gone through [`without_constant_products`].
    pub(super) fn compile(source: &'source str) -> Result<Self, Error> {
        let config =
            TemplateConfig { syntax_config: syntax()?, default_auto_escape: Arc::new(|_| AutoEscape::None) };
        let compiled = CompiledTemplate::new("chat_template", source, &config)?;
        Ok(Program {
            instructions: metered(&compiled.instructions),
            blocks: compiled.blocks.iter().map(|(name, block)| (*name, metered(block))).collect(),
        })
    }
}

/// The whitespace rules that transformers uses.
fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// `source` with every product `a * b` written as `a * _one_ * b`, so that the compiler cannot
/// evaluate it. Line numbers stay as they are.
pub(super) fn without_constant_products(source: &str) -> Result<String, Error> {
    let mut result = String::with_capacity(source.len());
    let mut copied = 0;
    let mut previous_ends_operand = false;
    for token in tokenize(source, false, syntax()?) {
        let (token, span) = token?;
        // In `f(*list)` the star is no product.
        if matches!(token, Token::Mul) && previous_ends_operand {
            let end = span.end_offset as usize;
            result.push_str(&source[copied..end]);
            result.push_str(&format!(" {ONE} *"));
            copied = end;
        }
        previous_ends_operand = !matches!(token, Token::ParenOpen | Token::Comma);
    }
    result.push_str(&source[copied..]);
    Ok(result)
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
        | Instruction::CallFunction(..)
        | Instruction::EndCapture => vec![instruction.clone(), filter(CHARGE, 1)],
        Instruction::Slice
        | Instruction::ApplyFilter(..)
        | Instruction::CallMethod(..)
        | Instruction::CallObject(..) => vec![instruction.clone(), filter(CHARGE_CALL, 1)],
        Instruction::PushLoop(_) => vec![filter(CHECK_LOOP, 1), instruction.clone()],
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
