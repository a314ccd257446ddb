//! Work too long for the async threads: parsing large bodies, rendering templates, tokenizing, writing vectors.
//!
//! A megabyte of text takes the better part of a second to tokenize and would hold up every other
//! client's tokens. It runs on blocking threads instead, at most one job a CPU; more wait their turn,
//! so that many large requests cost time and not memory.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::error::{ApiError, ErrorKind};

/// Bounds how much long work runs at a time.
pub(super) struct HeavyWork {
    permits: Arc<Semaphore>,
}

impl HeavyWork {
    pub(super) fn new() -> Self {
        let num_cpus = std::thread::available_parallelism().map_or(1, usize::from);
        HeavyWork { permits: Arc::new(Semaphore::new(num_cpus)) }
    }

    /// Runs `work` here, or on a blocking thread if it is long.
    pub(super) async fn run_if<R: Send + 'static>(
        &self,
        is_long: bool,
        work: impl FnOnce() -> Result<R, ApiError> + Send + 'static,
    ) -> Result<R, ApiError> {
        if !is_long {
            return work();
        }
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed: this is a bug");
        let job = tokio::task::spawn_blocking(move || {
            // Here, not outside: a client that leaves does not stop a job that has begun.
            let _permit = permit;
            work()
        });
        match job.await {
            Ok(result) => result,
            Err(_) => Err(ApiError::new(
                ErrorKind::Internal,
                "an internal error in reading the request or writing its answer",
            )),
        }
    }
}
