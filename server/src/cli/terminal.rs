//! What is written to people: numbers with units, colours where there is a terminal.

use std::io::IsTerminal as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// `12.3 MiB`.
pub(super) fn bytes(size_bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = size_bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{size_bytes} B") } else { format!("{size:.1} {}", units[unit]) }
}

/// `5.2 M`, `7.6 B`: parameters and tokens as the field writes them.
pub(super) fn count(number: u64) -> String {
    match number {
        0..1_000 => number.to_string(),
        1_000..1_000_000 => format!("{:.1} k", number as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", number as f64 / 1e6),
        _ => format!("{:.1} B", number as f64 / 1e9),
    }
}

/// Seconds since the epoch.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// `2026-11-21`: the day, in UTC. Howard Hinnant's civil_from_days.
pub(super) fn date(unix_seconds: u64) -> String {
    let days = (unix_seconds / 86_400) as i64 + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

/// True if standard output is a terminal and `NO_COLOR` (https://no-color.org) is not set.
pub(super) fn colour_stdout() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Logs go to standard error, so that standard output is the answer's alone.
///
/// `filter` is the setting; without one `RUST_LOG` counts, then `default`.
pub(super) fn init_logging(filter: Option<&str>, default: &str) {
    let from_env = || std::env::var("RUST_LOG").ok().filter(|value| !value.is_empty());
    let filter = filter.map(str::to_owned).or_else(from_env).unwrap_or_else(|| default.to_owned());
    // The setting was checked; a broken RUST_LOG is no reason not to start.
    let filter = tracing_subscriber::EnvFilter::new(filter);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// The processor's name, as the system gives it.
pub(super) fn cpu_model() -> String {
    let from_linux = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    from_linux.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_days_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(951_782_400), "2000-02-29");
        assert_eq!(date(1_798_761_599), "2026-12-31");
    }

    #[test]
    fn sizes_and_counts_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(10_809_760), "10.3 MiB");
        assert_eq!(bytes(5 << 40), "5.0 TiB");
        assert_eq!(count(999), "999");
        assert_eq!(count(5_204_224), "5.2 M");
        assert_eq!(count(7_600_000_000), "7.6 B");
    }
}
