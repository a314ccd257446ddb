//! Some thousands of random scenarios; `examples/simulate` runs as many as one likes.

mod common;
#[path = "../examples/simulate/sim.rs"]
mod sim;

/// Seeds of each test.
const SEEDS: u64 = 1_500;

fn simulate(first_seed: u64) -> sim::Summary {
    let mut total = sim::Summary::default();
    for seed in first_seed..first_seed + SEEDS {
        match sim::simulate(seed, false) {
            Ok(summary) => total.add(&summary),
            Err(violation) => panic!("{violation}"),
        }
    }
    total
}

#[test]
fn a_first_run_of_seeds_holds_no_violation() {
    simulate(0);
}

#[test]
fn a_second_run_of_seeds_holds_no_violation_and_leaves_nothing_out() {
    let total = simulate(SEEDS);
    // A simulation that never comes to the interesting places proves nothing.
    assert!(total.stopped > 0 && total.at_length > 0 && total.at_deadline > 0, "{total}");
    assert!(total.aborted > 0 && total.failed > 0, "{total}");
    assert!(total.cached_tokens > 0 && total.preemptions > 0 && total.evictions > 0, "{total}");
    assert!(total.accepted_tokens.iter().all(|&accepted| accepted > 0), "{total}");
    assert!(total.embeddings > 0 && total.kv_events > 0 && total.found_tokens > 0, "{total}");
    assert!(total.accepted_head_tokens > 0 && total.accepted_head_tokens < total.head_tokens, "{total}");
    let rejected = total.draft_tokens.iter().zip(total.accepted_tokens).map(|(o, a)| o - a);
    assert!(rejected.min() > Some(0), "{total}");
}
