//! The dates that chat templates print: Python's `strftime`, in UTC, for the directives they use.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `time` by `format`; the directive at fault if one is not known.
pub(super) fn strftime(time: SystemTime, format: &str) -> Result<String, char> {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let month_name = MONTHS[month as usize - 1];
    let weekday = WEEKDAYS[(days % 7) as usize];
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            text.push(char);
            continue;
        }
        match chars.next().unwrap_or('%') {
            'Y' => text += &format!("{year:04}"),
            'y' => text += &format!("{:02}", year % 100),
            'm' => text += &format!("{month:02}"),
            'B' => text += month_name,
            'b' => text += &month_name[..3],
            'd' => text += &format!("{day:02}"),
            'A' => text += weekday,
            'a' => text += &weekday[..3],
            'H' => text += &format!("{hour:02}"),
            'I' => text += &format!("{:02}", (hour + 11) % 12 + 1),
            'p' => text += if hour < 12 { "AM" } else { "PM" },
            'M' => text += &format!("{minute:02}"),
            'S' => text += &format!("{second:02}"),
            '%' => text.push('%'),
            unknown => return Err(unknown),
        }
    }
    Ok(text)
}

/// Year, month and day of a day counted from 1970-01-01. From Howard Hinnant,
/// "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, format: &str) -> String {
        strftime(UNIX_EPOCH + Duration::from_secs(seconds), format).unwrap()
    }

    #[test]
    fn dates_equal_pythons() {
        // python: datetime.fromtimestamp(t, timezone.utc).strftime(...)
        assert_eq!(at(0, "%a %d %b %Y"), "Thu 01 Jan 1970");
        assert_eq!(at(951_782_400, "%Y-%m-%d %A"), "2000-02-29 Tuesday");
        assert_eq!(
            at(4_107_542_399, "%B %d, %Y %H:%M:%S %I %p %y%%"),
            "February 28, 2100 23:59:59 11 PM 00%"
        );
        assert_eq!(at(4_107_542_400, "%d %b"), "01 Mar");
        assert_eq!(strftime(UNIX_EPOCH, "%Q"), Err('Q'));
    }
}
