//! The output head: the product whose outputs are a row's logits, of which mostly nobody wants to see more than the
//! token they give ([`choice`](crate::sampling::choice)).
//!
//! A task computes 512 outputs of some dozens of rows at a time into a scratch of its own, looks for the
//! best of each row, and goes on: over a vocabulary of 152 thousand tokens that spares sixteen rows ten megabytes
//! written and read again, and what is done with a row is done on all threads. Rows that are wanted whole are
//! copied from the scratch. Of a row whose token takes more than the best of its tasks (top-k, top-p, reports) what
//! tasks have kept is joined afterwards, on all threads if there are several such rows. The operations on a logit are
//! those of [`matmul`](super::matmul()), [`scale`](crate::scaling::scale) and
//! [`soft_cap`](crate::scaling::soft_cap); those of the choice are of its own row alone, and the same however outputs
//! are shared out.

use std::cell::RefCell;
use std::ops::Range;

use super::{Input, Place, Tile, check, compute, panel_ns, with_input};
use crate::LANES;
use crate::pack::{PackedMatrix, Part};
use crate::pool::ThreadPool;
use crate::sampling::choice::{Choice, Chosen, SHARE_CHUNK};
use crate::sampling::part::{Joined, Masses, Part as RowPart};
use crate::shared_out::SharedOut;

/// What is wanted of a row.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Wanted {
    /// Every logit.
    #[default]
    Whole,
    /// One token.
    Token(Choice),
}

impl Wanted {
    /// True if it is every logit.
    pub fn is_whole(&self) -> bool {
        matches!(self, Wanted::Whole)
    }
}

/// The head of a model.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// `[outputs, inputs]`, of one type.
    pub weights: &'a PackedMatrix,
    /// What logits are multiplied by.
    pub scale: f32,
    /// What they are capped at afterwards, as [`crate::scaling::soft_cap`] does it.
    pub soft_cap: Option<f32>,
    /// The first outputs, which stand for tokens; the others, if there are any, are padding and never chosen.
    pub num_token_ids: usize,
}

/// Rows that a task computes at a time.
const SCRATCH_ROWS: usize = 48;
/// Panels of a chunk.
const CHUNK_PANELS: usize = SHARE_CHUNK / LANES;
const _: () = assert!(SHARE_CHUNK.is_multiple_of(LANES));

/// What tasks leave behind, and what comes of it; buffers that are used again and again. A pass of few rows between two
/// of many gives none back.
#[derive(Debug, Default)]
pub struct HeadRoom {
    /// `[rows, tasks]`, at least.
    parts: Vec<RowPart>,
    /// `[rows]`, at least.
    joined: Vec<Joined>,
    /// `[rows, chunks]`
    masses: Vec<Masses>,
    /// `[rows]`: where whole rows go.
    places: Vec<usize>,
    /// `[rows]`
    outcomes: Vec<Chosen>,
    chosen: Vec<Chosen>,
    top: Vec<(u32, f32)>,
}

/// The outputs of every row of `x: [rows, inputs]`, as `wanted: [rows]` has them: `whole` is
/// `[rows wanted whole, outputs]`, and a token of each of the others is in [`HeadRoom::chosen`] afterwards, with what
/// is to be reported in [`HeadRoom::top`], all in the order of the rows.
///
/// # Panics
/// If a length does not fit the others, if no output stands for a token, or if outputs are of several types: chunks
/// begin anew with each, and those of a whole row ([`choose`](crate::sampling::choose())) do not.
pub fn head(
    pool: &ThreadPool,
    x: &[f32],
    head: &Head<'_>,
    wanted: &[Wanted],
    room: &mut HeadRoom,
    whole: &mut [f32],
) {
    let Head { weights, num_token_ids, .. } = *head;
    let rows = check("head", x.len(), weights, None);
    let num_outputs = weights.out_features();
    let num_whole = wanted.iter().filter(|wanted| wanted.is_whole()).count();
    assert!(rows == wanted.len(), "head: {rows} rows, of which {} are wanted", wanted.len());
    assert!(
        whole.len() == num_whole * num_outputs,
        "head: {} elements for shape [{num_whole}, {num_outputs}]",
        whole.len()
    );
    assert!(
        (1..=num_outputs).contains(&num_token_ids),
        "head: {num_token_ids} tokens of {num_outputs} outputs"
    );
    let [part] = weights.parts() else {
        panic!("head: outputs of {} types; wanted one", weights.parts().len());
    };
    room.chosen.clear();
    room.top.clear();
    if rows == 0 {
        return;
    }
    let num_computed = if num_whole > 0 { num_outputs } else { num_token_ids };
    let num_chunks = num_computed.div_ceil(SHARE_CHUNK);
    let tasks = pool.num_tasks(num_chunks, CHUNK_PANELS * panel_ns(part, rows, weights.in_features()));
    room.begin(rows, tasks, num_chunks, wanted);
    let HeadRoom { parts, masses, places, .. } = &mut *room;
    let out = Outputs {
        parts: SharedOut::new(&mut parts[..rows * tasks]),
        masses: SharedOut::new(masses),
        whole: SharedOut::new(whole),
        places,
        num_tasks: tasks,
    };
    with_input(pool, x, weights, |input| {
        pool.run(tasks, &|task| {
            let range = task * num_chunks / tasks..(task + 1) * num_chunks / tasks;
            // SAFETY: lengths are checked, and every task has parts and chunks of its own.
            unsafe { work(pool, &Work { input, head, wanted, part, num_chunks }, range, task, &out) };
        });
    });
    room.choose(pool, wanted, tasks, num_chunks, num_token_ids);
}

impl HeadRoom {
    /// Of each row of the last product that was not wanted whole.
    pub fn chosen(&self) -> &[Chosen] {
        &self.chosen
    }

    /// The likeliest tokens and their bare logits of the rows of which they were to be reported, likeliest first;
    /// how many of each row is in its [`Chosen::report`].
    pub fn top(&self) -> &[(u32, f32)] {
        &self.top
    }

    fn begin(&mut self, rows: usize, tasks: usize, num_chunks: usize, wanted: &[Wanted]) {
        let num_parts = rows * tasks;
        if self.parts.len() < num_parts {
            self.parts.resize_with(num_parts, RowPart::default);
        }
        self.parts[..num_parts].iter_mut().for_each(RowPart::clear);
        if self.joined.len() < rows {
            self.joined.resize_with(rows, Joined::default);
        }
        let sums = wanted.iter().any(|wanted| matches!(wanted, Wanted::Token(choice) if choice.sums()));
        // Of rows that sum nothing they stay as they are.
        self.masses.resize(if sums { rows * num_chunks } else { 0 }, Masses::default());
        self.outcomes.resize(rows, Chosen::default());
        let mut next = 0;
        self.places.clear();
        self.places.extend(wanted.iter().map(|wanted| {
            let place = next;
            next += usize::from(wanted.is_whole());
            place
        }));
    }

    /// Chooses every row's token of what tasks have found.
    fn choose(
        &mut self,
        pool: &ThreadPool,
        wanted: &[Wanted],
        tasks: usize,
        num_chunks: usize,
        num_tokens: usize,
    ) {
        let HeadRoom { parts, joined, masses, outcomes, chosen, top, .. } = self;
        let (joined_of, chosen_of) = (SharedOut::new(joined), SharedOut::new(outcomes));
        let choose = |row: usize| {
            let Wanted::Token(choice) = &wanted[row] else { return };
            let masses = if choice.sums() { &masses[row * num_chunks..][..num_chunks] } else { &[] };
            let parts = &parts[row * tasks..][..tasks];
            // SAFETY: the row's own.
            let (joined, chosen) = unsafe { (joined_of.part(row, 1), chosen_of.part(row, 1)) };
            chosen[0] = RowPart::choose(parts, choice, masses, num_tokens, &mut joined[0]);
        };
        let is_joined = |wanted: &&Wanted| matches!(wanted, Wanted::Token(choice) if choice.is_joined());
        match wanted.iter().filter(is_joined).count() {
            0 | 1 => (0..wanted.len()).for_each(choose),
            _ => pool.run(wanted.len(), &choose),
        }
        for (row, wanted) in wanted.iter().enumerate() {
            if !wanted.is_whole() {
                top.extend_from_slice(joined[row].top(&outcomes[row]));
                chosen.push(outcomes[row]);
            }
        }
    }
}

/// What all tasks share.
struct Work<'a> {
    input: Input<'a>,
    head: &'a Head<'a>,
    wanted: &'a [Wanted],
    /// All of the head's outputs.
    part: &'a Part,
    /// Of a row, as far as it is computed.
    num_chunks: usize,
}

/// Where they leave their results.
struct Outputs<'a> {
    parts: SharedOut<'a, RowPart>,
    masses: SharedOut<'a, Masses>,
    whole: SharedOut<'a>,
    places: &'a [usize],
    num_tasks: usize,
}

thread_local! {
    /// One for each thread, `[rows, SHARE_CHUNK]`: clearing it for every task would cost as much as the choice.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The chunks of a task.
///
/// # Safety
/// Lengths are checked; no other call has the same task or any of the chunks.
unsafe fn work(pool: &ThreadPool, work: &Work<'_>, chunks: Range<usize>, task: usize, out: &Outputs<'_>) {
    let (num_rows, part) = (work.input.num_rows, work.part);
    SCRATCH.with_borrow_mut(|scratch| {
        let len = num_rows.min(SCRATCH_ROWS) * SHARE_CHUNK;
        scratch.resize(scratch.len().max(len), 0.0);
        for chunk in chunks {
            let first = chunk * CHUNK_PANELS;
            let panels = first..part.num_panels().min(first + CHUNK_PANELS);
            for begin in (0..num_rows).step_by(SCRATCH_ROWS) {
                let rows = begin..num_rows.min(begin + SCRATCH_ROWS);
                let first_output = first * LANES;
                let width = (panels.len() * LANES).min(part.outputs - first_output);
                let shared = SharedOut::new(scratch);
                let place = Place { to: &shared, stride: SHARE_CHUNK, first_row: begin, first_output };
                let (input, weights, tile_rows) = (work.input, work.head.weights, rows.clone());
                let tile = Tile {
                    input,
                    weights,
                    part,
                    bias: None,
                    rows: tile_rows,
                    panels: panels.clone(),
                    out: place,
                };
                // SAFETY: lengths are checked; the scratch is this task's and holds all rows and outputs.
                unsafe { compute(pool, &tile) };
                for (row, logits) in rows.zip(scratch.chunks_exact_mut(SHARE_CHUNK)) {
                    // SAFETY: the chunk of a row is this task's.
                    unsafe { work.take(pool, (row, chunk, task), first_output, &mut logits[..width], out) };
                }
            }
        }
    });
}

impl Work<'_> {
    /// Does with the logits of a chunk of a row what is wanted.
    ///
    /// # Safety
    /// As for [`work`].
    unsafe fn take(
        &self,
        pool: &ThreadPool,
        (row, chunk, task): (usize, usize, usize),
        first_output: usize,
        logits: &mut [f32],
        out: &Outputs<'_>,
    ) {
        let (kernels, head) = (pool.kernels(), self.head);
        // SAFETY: the pool's table is for this processor; what is written is this task's, by the caller's promise.
        unsafe {
            if head.scale != 1.0 {
                (kernels.scale)(logits, head.scale);
            }
            if let Some(cap) = head.soft_cap {
                (kernels.soft_cap)(logits, cap);
            }
            match &self.wanted[row] {
                Wanted::Whole => {
                    let at = out.places[row] * head.weights.out_features() + first_output;
                    out.whole.part(at, logits.len()).copy_from_slice(logits);
                }
                Wanted::Token(choice) => {
                    let num_tokens = head.num_token_ids.saturating_sub(first_output).min(logits.len());
                    let (logits, of) = (&mut logits[..num_tokens], (first_output as u32, head.num_token_ids));
                    let part = &mut out.parts.part(row * out.num_tasks + task, 1)[0];
                    let masses = part.look(kernels, choice, of, logits);
                    if choice.sums() {
                        out.masses.part(row * self.num_chunks + chunk, 1)[0] = masses;
                    }
                }
            }
        }
    }
}
