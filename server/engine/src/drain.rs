//! How fast a lane's queue drains, which is what somebody who is sent away is told to wait for.

use std::time::Duration;

/// Weight of the past, for each start.
const DECAY: f64 = 0.9;

/// Longest wait that is told.
const LONGEST_SECONDS: f64 = 3600.0;

/// How fast the waiting sequences of a lane start.
///
/// Only starts that had to be waited for count: a burst into empty seats comes as fast as its requests do, and
/// says nothing of how fast they will be done.
#[derive(Debug, Default)]
pub(crate) struct DrainRate {
    /// Seconds between starts, decayed; `None` before the first that was waited for.
    interval: Option<f64>,
    /// Since when somebody waits and nobody has started.
    since: Option<Duration>,
    /// How long that has been.
    waited: Duration,
}

impl DrainRate {
    /// Takes up what a look at the queue came to: so many started together, and others still wait or do not.
    pub(crate) fn observe(&mut self, num_started: usize, others_wait: bool, now: Duration) {
        if num_started > 0
            && let Some(since) = self.since.take()
        {
            let seconds = now.saturating_sub(since).as_secs_f64() / num_started as f64;
            let past = DECAY.powi(i32::try_from(num_started).unwrap_or(i32::MAX));
            self.interval = Some(self.interval.map_or(seconds, |i| past * i + (1.0 - past) * seconds));
        }
        self.since = others_wait.then(|| self.since.unwrap_or(now));
        self.waited = self.since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
    }

    /// Notes that the last who waited has gone without having started.
    pub(crate) fn nobody_waits(&mut self) {
        self.since = None;
        self.waited = Duration::ZERO;
    }

    /// Time until so many have started. A wait that already takes longer than others did is what to expect of the
    /// first; of all, if there were no others.
    pub(crate) fn time_for(&self, num_starts: usize) -> Duration {
        let Some(num_later) = num_starts.checked_sub(1) else { return Duration::ZERO };
        let waited = self.waited.as_secs_f64();
        let interval = self.interval.unwrap_or(waited);
        let seconds = interval.max(waited) + num_later as f64 * interval;
        Duration::from_secs_f64(seconds.min(LONGEST_SECONDS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn sequences_that_start_together_share_the_time_they_waited() {
        let mut rate = DrainRate::default();
        // Eight seats fill at once, and four more wait.
        rate.observe(8, true, seconds(0));
        assert_eq!(rate.time_for(4), Duration::ZERO);
        for turn in 1..50 {
            rate.observe(0, true, seconds(20 * turn - 1));
            rate.observe(4, true, seconds(20 * turn));
            assert_eq!(rate.time_for(4), seconds(20), "turn {turn}");
        }
    }

    #[test]
    fn between_two_starts_only_the_first_place_is_overdue() {
        let mut rate = DrainRate::default();
        for turn in 0..50 {
            rate.observe(16, true, seconds(10 * turn));
        }
        assert_eq!((rate.time_for(0), rate.time_for(64)), (Duration::ZERO, seconds(40)));
        rate.observe(0, true, seconds(490) + Duration::from_millis(9_900));
        let told = rate.time_for(64);
        assert!((seconds(40)..seconds(50)).contains(&told), "{told:?}");
    }

    #[test]
    fn time_in_which_nobody_waits_does_not_count() {
        let mut rate = DrainRate::default();
        rate.observe(0, true, seconds(0));
        rate.observe(1, false, seconds(2));
        assert_eq!(rate.time_for(3), seconds(6));
        rate.observe(1, false, seconds(900));
        rate.observe(0, true, seconds(1_000));
        rate.observe(1, true, seconds(1_002));
        assert_eq!(rate.time_for(3), seconds(6));
        // The last one gives up.
        rate.observe(0, false, seconds(1_300));
        assert_eq!(rate.time_for(3), seconds(6));
        // Another does, and nobody looks at the queue until somebody comes.
        rate.observe(0, true, seconds(1_400));
        rate.nobody_waits();
        rate.observe(1, false, seconds(5_000));
        assert_eq!(rate.time_for(3), seconds(6));
    }

    #[test]
    fn a_wait_without_end_shows_before_it_ends() {
        let mut rate = DrainRate::default();
        rate.observe(1, true, seconds(0));
        rate.observe(0, true, seconds(7));
        assert_eq!(rate.time_for(2), seconds(14));
        rate.observe(0, true, seconds(1 << 40));
        assert_eq!(rate.time_for(2), seconds(3_600));
    }
}
