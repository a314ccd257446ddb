//! A few thousand hostile files of each kind; `examples/fuzz` runs as many as one likes.

#[path = "../examples/fuzz/fuzz.rs"]
mod fuzz;

#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;

/// Executions of each target.
const COUNT: u64 = 1_500;

#[test]
fn hostile_files_give_models_or_errors_and_take_little() {
    for target in &fuzz::TARGETS {
        let mut failures = Vec::new();
        let summary = fuzz::run(target, 1, COUNT, |failure| failures.push(failure));
        assert!(failures.is_empty(), "{}", failures.join("\n"));
        assert_eq!(summary.executions, COUNT);
        // A mutator whose files are all refused, or all accepted, tests little.
        let accepted = summary.accepted;
        assert!((1..COUNT).contains(&accepted), "{}: {accepted} of {COUNT} accepted", target.name);
    }
}
