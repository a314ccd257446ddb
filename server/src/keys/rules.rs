//! What a key may do.

use std::fmt;
use std::str::FromStr;

use tandem_engine::{Lane, Priority};

/// The lanes that a key opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lanes {
    /// The draft answers.
    pub fast: bool,
    /// The target answers.
    pub deep: bool,
}

impl Lanes {
    /// Both.
    pub const ALL: Lanes = Lanes { fast: true, deep: true };

    /// True if the key opens this lane.
    pub fn allows(self, lane: Lane) -> bool {
        match lane {
            Lane::Fast => self.fast,
            Lane::Deep => self.deep,
        }
    }
}

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.fast, self.deep) {
            (true, true) => "fast,deep",
            (true, false) => "fast",
            (false, true) => "deep",
            (false, false) => "none",
        })
    }
}

impl FromStr for Lanes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut lanes = Lanes { fast: false, deep: false };
        for name in text.split(',') {
            match name.trim() {
                "fast" => lanes.fast = true,
                "deep" => lanes.deep = true,
                _ => return Err(format!("the lanes are {text:?}; they must be fast, deep or fast,deep")),
            }
        }
        Ok(lanes)
    }
}

/// So much in each window of time. Windows lie end to end from the epoch on: a day is a day in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Most in a window.
    pub amount: u64,
    /// Length of a window, in seconds; at least one.
    pub window: u64,
}

impl Budget {
    /// When the window that holds `now` began, and when it ends. Seconds since the epoch.
    pub fn window_at(self, now: u64) -> (u64, u64) {
        let start = now - now % self.window;
        (start, start.saturating_add(self.window))
    }
}

const UNITS: [(&str, u64); 5] =
    [("second", 1), ("minute", 60), ("hour", 3_600), ("day", 86_400), ("week", 604_800)];

/// Longest window and longest life of a key that can be asked for: ten years.
const MAX_SECONDS: u64 = 10 * 366 * 86_400;

/// `s`, `min`, `minute`, `30days`, `24h`: seconds.
///
/// # Errors
/// Says what would be right.
pub fn duration_from_text(text: &str) -> Result<u64, String> {
    let fault = || format!("{text:?} is no time; it must be like 30s, 5min, 24h, 7days or day");
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = if number.is_empty() { 1 } else { number.parse().map_err(|_| fault())? };
    let unit = unit.trim();
    if unit == "ms" {
        return Err(fault());
    }
    let unit = unit.strip_suffix('s').unwrap_or(unit);
    // Any beginning of a unit's name will do, and an `s` after it: no two begin alike.
    let is_seconds = unit.is_empty() && text.ends_with('s');
    let unit = UNITS.iter().find(|(name, _)| (is_seconds && *name == "second") || begins(name, unit));
    let seconds = unit.and_then(|(_, seconds)| number.checked_mul(*seconds)).ok_or_else(fault)?;
    if (1..=MAX_SECONDS).contains(&seconds) { Ok(seconds) } else { Err(fault()) }
}

fn begins(name: &str, unit: &str) -> bool {
    !unit.is_empty() && name.starts_with(unit)
}

impl FromStr for Budget {
    type Err = String;

    /// `60/min`, `1M/day`, `500k/24h`.
    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("the budget is {text:?}; it must be like 60/min, 500k/24h or 2M/day");
        let (amount, window) = text.split_once('/').ok_or_else(fault)?;
        let amount = amount.trim();
        let (digits, factor) = match amount.char_indices().last() {
            Some((at, 'k' | 'K')) => (&amount[..at], 1_000),
            Some((at, 'M')) => (&amount[..at], 1_000_000),
            Some((at, 'G')) => (&amount[..at], 1_000_000_000),
            _ => (amount, 1u64),
        };
        let amount = digits.parse::<u64>().ok().and_then(|amount| amount.checked_mul(factor));
        // SQLite counts in i64.
        let amount = amount.filter(|amount| (1..=i64::MAX as u64).contains(amount)).ok_or_else(fault)?;
        Ok(Budget { amount, window: duration_from_text(window).map_err(|_| fault())? })
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, seconds) =
            UNITS.iter().rev().find(|(_, seconds)| self.window.is_multiple_of(*seconds)).unwrap_or(&UNITS[0]);
        match self.window / seconds {
            1 => write!(f, "{}/{unit}", self.amount),
            count => write!(f, "{}/{count}{unit}s", self.amount),
        }
    }
}

/// What a key may do, and until when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRules {
    /// Lanes that it opens.
    pub lanes: Lanes,
    /// Requests that it may make.
    pub requests: Option<Budget>,
    /// Tokens of prompts and answers together that it may use.
    pub tokens: Option<Budget>,
    /// The highest priority that its requests can have.
    pub priority: Priority,
    /// Seconds since the epoch from which on it opens nothing.
    pub expires_at: Option<u64>,
}

impl Default for KeyRules {
    fn default() -> Self {
        KeyRules {
            lanes: Lanes::ALL,
            requests: None,
            tokens: None,
            priority: Priority::Interactive,
            expires_at: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_read_as_people_write_them() {
        for (text, amount, window, shown) in [
            ("60/min", 60, 60, "60/minute"),
            ("1M/day", 1_000_000, 86_400, "1000000/day"),
            ("500k/24h", 500_000, 86_400, "500000/day"),
            ("5/10s", 5, 10, "5/10seconds"),
            ("7 / 2 weeks", 7, 1_209_600, "7/2weeks"),
            ("3/s", 3, 1, "3/second"),
        ] {
            let budget: Budget = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((budget.amount, budget.window), (amount, window), "{text}");
            assert_eq!(budget.to_string(), shown);
            assert_eq!(shown.parse(), Ok(budget), "what is shown can be read");
        }
        for wrong in
            ["", "60", "0/min", "-1/min", "1.5M/day", "60/", "60/fortnight", "60/0s", "9999999999G/s"]
        {
            assert!(wrong.parse::<Budget>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn windows_lie_end_to_end() {
        let budget = Budget { amount: 1, window: 60 };
        assert_eq!(budget.window_at(119), (60, 120));
        assert_eq!(budget.window_at(120), (120, 180));
    }

    #[test]
    fn lanes_are_one_or_both() {
        assert_eq!("fast, deep".parse(), Ok(Lanes::ALL));
        assert_eq!("fast".parse(), Ok(Lanes { fast: true, deep: false }));
        assert!("".parse::<Lanes>().is_err() && "slow".parse::<Lanes>().is_err());
    }
}
